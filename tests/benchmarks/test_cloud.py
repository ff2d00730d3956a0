"""What the cloud provider costs beside the bare SDK, on a test server on loopback. Prints ratios, asserts nothing.

uv run pytest -m benchmark -n 0 -s tests/benchmarks/test_cloud.py
"""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import e2b
import psutil
import pytest

from cloudagent_mcp.scripted_model import Rule, ScriptedModel
from cloudagent_queue.repository import bundle_working_tree, check_out, fetch
from cloudagent_queue.sandboxes import Provider, Sandbox, open_provider
from cloudagent_storage.errors import SandboxUnreachable
from tests.support.e2b_server.client import E2bServer, e2b_server
from tests.support.git_repos import git, make_repository
from tests.support.git_server import git_server
from tests.support.scripts import say
from tests.support.worlds import World

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(900)]

MEGABYTES = 100


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[E2bServer]:
    with e2b_server(tmp_path_factory.mktemp("e2b"), most_sandboxes=2000) as running:
        yield running


@pytest.fixture
def provider(server: E2bServer, tmp_path: Path) -> Iterator[Provider]:
    made = open_provider("e2b", data_folder=tmp_path, env=server.environment)
    yield made
    for info in made.list({}):
        made.connect(info.id).kill()


def took(work: Callable[[], object], *, times: int = 1) -> float:
    """The median of some runs, in seconds."""
    found: list[float] = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def tell(what: str, ours_s: float, theirs_s: float, theirs: str) -> None:
    print(f"\n{what}: {ours_s * 1000:.0f} ms, {ours_s / theirs_s:.2f}x of {theirs} ({theirs_s * 1000:.0f} ms)")


def test_each_operation_beside_the_bare_sdk(server: E2bServer, provider: Provider) -> None:
    bare: Any = e2b.Sandbox.create(**server.options)
    box = provider.create(metadata={})
    tell(
        "create and kill",
        took(lambda: provider.create(metadata={}).kill(), times=10),
        took(lambda: e2b.Sandbox.create(**server.options).kill(), times=10),
        "the bare SDK",
    )
    run = took(lambda: bare.commands.run("true"), times=30)
    tell("run true", took(lambda: box.run(["true"], timeout_s=20), times=30), run, "commands.run")
    tell("alive", took(box.alive, times=30), run, "commands.run")
    tell(
        "watch, nothing new", took(lambda: box.watch("no", offset=0, max_bytes=9, wait_s=0), times=30), run, "the same"
    )
    write = took(lambda: bare.files.write("/home/user/x", b"x" * 1000), times=30)
    tell("write 1 kB", took(lambda: box.write("x", b"x" * 1000), times=30), write, "files.write")
    read = took(lambda: bare.files.read("/home/user/x"), times=30)
    tell("read 1 kB", took(lambda: box.read("x", max_bytes=1000), times=30), read, "files.read")
    large = os.urandom(100_000_000)
    write = took(lambda: bare.files.write("/home/user/large", large))
    tell("write 100 MB", took(lambda: box.write("large", large)), write, "files.write")
    read = took(lambda: bare.files.read("/home/user/large", format="bytes"))
    tell("read 100 MB", took(lambda: box.read("large", max_bytes=200_000_000)), read, "files.read")
    bare.kill()


def test_a_repository_of_100_mb_from_an_address_into_a_sandbox(provider: Provider, tmp_path: Path) -> None:
    shop = make_repository(tmp_path / "shop", {"a.txt": "a\n"})
    for number in range(MEGABYTES):
        (shop / f"{number}.bin").write_bytes(os.urandom(1_000_000))
    bundled = bundle_working_tree(shop, base_ref=None)
    git(shop, "add", "-A")
    git(shop, "commit", "-q", "-m", "large")
    (tmp_path / "served").mkdir()
    git(tmp_path, "clone", "--quiet", "--bare", "shop", "served/shop.git")
    with git_server(tmp_path / "tls", {"": tmp_path / "served"}) as served:
        home = tmp_path / "home"
        home.mkdir()
        served.trusted_by(home)
        env = {"HOME": str(home), "PATH": os.environ["PATH"]}
        address = served.address("shop.git")

        def bring() -> bytes:
            return fetch(address, base_ref=None, cache_folder=tmp_path / "cache", env=env, timeout_s=600).bundle

        floor = took(lambda: git(tmp_path, "clone", "--quiet", "--bare", "--no-local", "served/shop.git", "floor"))
        first = took(bring)
        second = took(bring)
        size = len(bring())
    tell(f"fetch and bundle {size / 1e6:.0f} MB, first time", first, floor, "a local clone")
    tell("the second time", second, first, "the first")
    box = provider.create(metadata={})
    into = took(lambda: check_out(box, bundle=bundled.bundle, base_sha=bundled.base_sha, branch="task/x"))
    tell("its bundle into a cloud sandbox and checked out", into, floor, "a local clone")


@pytest.mark.parametrize("name", ["local", "e2b"])
def test_from_submit_to_the_agents_first_word(name: str, server: E2bServer, world: World) -> None:
    with ScriptedModel([Rule(prompt="^Say", turns=(say("Hello."),))]) as model:
        variables = {**model.environment(), **server.environment, "SANDBOX_PROVIDER": name}
        world = replace(world, environment={**world.environment, **variables})
        world.start_worker()
        found: list[float] = []
        with world.client() as client:
            for _ in range(4):
                began = time.perf_counter()
                task = client.call("submit_task", prompt="Say hello", repository="none")["task_id"]
                while not any(line["kind"] == "text" for line in world.log(client, task)):
                    time.sleep(0.02)
                found.append(time.perf_counter() - began)
                world.wait(client, task)
    print(f"\nsubmit -> first word on {name}: {min(found):.2f} s at best, median {statistics.median(found):.2f} s")


@pytest.mark.parametrize(("count", "silent"), [(200, False), (1000, True)])
def test_looks_held_at_once_in_one_worker(count: int, silent: bool, provider: Provider, server: E2bServer) -> None:
    """Each is a call that waits inside a sandbox; twenty sandboxes share them.

    A thousand would be a thousand processes on this very machine; so their service takes the requests and stays silent,
    and what is measured is the worker: that it holds them all, gives up in time, and works on meanwhile.
    """
    boxes: list[Sandbox] = [provider.create(metadata={}) for _ in range(20)]
    for box in boxes:
        box.start(["sleep", "600"], env={})
    held = threading.Barrier(count + 1)
    late: list[float] = []

    def look(box: Sandbox) -> None:
        held.wait()
        began = time.perf_counter()
        with pytest.raises(SandboxUnreachable) if silent else contextlib.nullcontext():
            box.watch("no", offset=0, max_bytes=9, wait_s=10.0)
        late.append(time.perf_counter() - began - 10.0)

    if silent:
        for box in boxes[1:]:
            server.fault("hang", "/process.Process/Start", sandbox=box.id, count=None)
    threads = [threading.Thread(target=look, args=(boxes[1 + number % 19],)) for number in range(count)]
    before = psutil.Process().memory_info().rss
    for thread in threads:
        thread.start()
    held.wait()
    time.sleep(5)
    streams = sum(one.status == "ESTABLISHED" for one in psutil.Process().net_connections())
    memory = psutil.Process().memory_info().rss - before
    meanwhile = took(boxes[0].alive)
    for thread in threads:
        thread.join()
    server.heal()
    late.sort()
    print(
        f"\n{count} looks of 10 s at once over {streams} connections: {'given up' if silent else 'answered'} "
        f"{late[len(late) // 2]:.1f} s late, "
        f"at most {late[-1]:.1f} s; another meanwhile {meanwhile * 1000:.0f} ms; {memory / count / 1000:.0f} kB each"
    )


def test_how_soon_a_cut_look_is_taken_up_again(server: E2bServer, provider: Provider) -> None:
    box = provider.create(metadata={})
    box.start(["sh", "-c", "sleep 600"], env={})
    undisturbed = took(lambda: box.watch("no", offset=0, max_bytes=9, wait_s=0), times=10)

    def cut() -> None:
        fault = server.fault("cut", "/process.Process/Start", after_bytes=0, count=1)
        box.watch("no", offset=0, max_bytes=9, wait_s=0)
        assert fault.fired == 1

    tell("a look whose stream is cut", took(cut, times=10), undisturbed, "one that is not")
