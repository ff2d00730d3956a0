"""What is on somebody's screen goes to a real server, as it is: by the bridge and by `ca`, and by hostile hands."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpx2
import pytest

from cloudagent_mcp.bridge import Bridge
from cloudagent_mcp.operations import Caller
from cloudagent_mcp.remote_server import RemoteServer
from cloudagent_mcp.settings import Settings
from cloudagent_mcp.uploads import Uploads
from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.errors import CloudAgentError, SecretsFound
from cloudagent_storage.store import Store
from tests.support.elsewhere import ADMIN, refusal, stdio, structured
from tests.support.git_repos import Workshop, files_of, make_repository
from tests.support.worlds import World, git, until

pytestmark = pytest.mark.anyio

NOISE = b"".join(hashlib.sha512(b"%d" % number).digest() for number in range(5000))
"""What git cannot make smaller."""


@pytest.fixture
def dirty(repo: Path) -> Path:
    """A working tree with everything in it, and no remote."""
    (repo / "noise.bin").write_bytes(NOISE)
    (repo / "gone.txt").write_text("gone\n")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "second")
    (repo / "staged.txt").write_text("staged\n")
    git(repo, "add", "staged.txt")
    (repo / "calc.py").write_text("unstaged\n")
    (repo / "gone.txt").unlink()
    (repo / "untracked é.txt").write_text("untracked\n")
    (repo / "ignored.log").write_text("ignored\n")
    return repo


def there(world: World, account_id: str, task_id: str, folder: Path) -> dict[str, Any]:
    """The files with which a task starts, as the server keeps them."""
    bundle = world.app().store.blobs.get(account_id, task_id, "input")
    assert bundle is not None and b"canary" not in bundle
    return files_of(Workshop(folder, bundle).folder)


def here(folder: Path) -> dict[str, Any]:
    return {name: what for name, what in files_of(folder).items() if name != "ignored.log"}


def ca(user: dict[str, str], folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cloudagent_mcp", *words]
    return subprocess.run(command, cwd=folder, env=user, capture_output=True, text=True, timeout=60)


async def submitted(user: dict[str, str], folder: Path, **arguments: Any) -> tuple[Any, list[float]]:
    """A task of the folder, and how many bytes went for it, as its user was told."""
    totals: list[float] = []

    async def progress(_: float, total: float, message: str) -> None:
        if message.startswith("Upload"):
            totals.append(total)

    bridge = Bridge(Settings.read(user))
    caller = Caller(local=True, operator=True, folder=folder, progress=progress)
    try:
        return await bridge.operations["submit_task"].call(caller, {"prompt": "x", **arguments}), totals
    finally:
        await bridge.server.close()


async def test_the_bridge_takes_along_what_is_on_the_screen_and_says_what_it_leaves(
    user: dict[str, str], world: World, dirty: Path, tmp_path: Path
) -> None:
    told: list[tuple[float, float, str]] = []

    async def progress(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, total or 0, message or ""))

    before = git(dirty, "status", "--porcelain"), git(dirty, "count-objects")
    async with stdio(user, dirty) as client:
        result = await client.call_tool("submit_task", {"prompt": "x"}, progress_callback=progress)
        task = structured(result)
        assert task["repository"].startswith("upload:upl_") and task["base_sha"] is not None
    assert there(world, "ada", task["task_id"], tmp_path / "there") == here(dirty)
    assert (git(dirty, "status", "--porcelain"), git(dirty, "count-objects")) == before
    done = [number for number, _, message in told if message.startswith("Upload")]
    assert len(done) > 1 and done == sorted(done) and done[-1] == told[-1][1] > 300_000


async def test_what_looks_like_a_secret_stops_the_upload_by_name_unless_its_user_allows_it(
    user: dict[str, str], world: World, dirty: Path, tmp_path: Path
) -> None:
    (dirty / "sub").mkdir()
    for name in (".env", "sub/server.pem"):
        (dirty / name).write_text("TOKEN=a-word-that-stays-here\n")
    git(dirty, "add", "sub")
    async with stdio(user, dirty) as client:
        refused = refusal(await client.call_tool("submit_task", {"prompt": "x"}))
    assert refused["code"] == "secrets_found" and refused["field"] == "allow_secrets"
    assert ".env, sub/server.pem" in refused["detail"] and ".gitignore" in refused["remedy"]
    made = ca(user, dirty, "task", "create", "x", "--json", "--allow-secret", ".env")
    assert made.returncode == 2 and json.loads(made.stdout)["code"] == "secrets_found"
    assert "sub/server.pem" in made.stdout and ".env" not in made.stdout and "a-word" not in made.stdout + made.stderr
    with world.client(dirty) as client, pytest.raises(SecretsFound):  # on this machine as well
        client.call("submit_task", prompt="x")
    assert world.app().store.tasks.list("ada").total == world.app().store.tasks.list("local").total == 0

    allowed = ca(
        user, dirty, "task", "create", "x", "--json", "--allow-secret", ".env", "--allow-secret", "./sub/server.pem"
    )
    assert allowed.returncode == 0 and "Goes along, though it looks like a secret: .env" in allowed.stderr
    task_id = json.loads(allowed.stdout)["task_id"]
    assert there(world, "ada", task_id, tmp_path / "there") == here(dirty)
    # Where all else is pushed as well: a server that fetches would not see it.
    pushed = make_repository(tmp_path / "pushed", {"a.txt": "a\n"})
    git(pushed, "remote", "add", "origin", "https://github.com/example/shop")
    git(pushed, "update-ref", "refs/remotes/origin/main", "HEAD")
    (pushed / ".env").write_text("TOKEN=x\n")
    fetched, sizes = await submitted(user, pushed)
    assert fetched.repository == "https://github.com/example/shop" and not sizes
    with_it, _ = await submitted(user, pushed, allow_secrets=[".env"])
    assert with_it.repository.startswith("upload:")
    assert there(world, "ada", with_it.task_id, tmp_path / "with it") == here(pushed)
    with (dirty / ".gitignore").open("a") as ignored:
        ignored.write(".env\n*.pem\n")
    git(dirty, "rm", "-q", "--cached", "sub/server.pem")
    made = ca(user, dirty, "task", "create", "x", "--json")
    assert made.returncode == 0 and ".env" not in there(
        world, "ada", json.loads(made.stdout)["task_id"], tmp_path / "2"
    )


async def test_ca_takes_it_along_and_says_so_in_a_line(
    user: dict[str, str], world: World, dirty: Path, tmp_path: Path
) -> None:
    made = ca(user, dirty, "task", "create", "x", "--json")
    assert made.returncode == 0, made.stderr
    task = json.loads(made.stdout)
    assert "0.3 of 0.3 MB" in made.stderr
    assert there(world, "ada", task["task_id"], tmp_path / "there") == here(dirty)
    from_elsewhere = ca(user, tmp_path, "task", "create", "x", "--json", "--repository", str(dirty / "."))
    assert json.loads(from_elsewhere.stdout)["base_sha"] == task["base_sha"]
    only = ca(user, dirty, "task", "create", "x", "--json", "--base-ref", "main")
    assert json.loads(only.stdout)["base_sha"] == git(dirty, "rev-parse", "main")
    schedule = ca(user, dirty, "schedule", "create", "n", "0 3 * * *", "x", "--json")
    assert schedule.returncode == 2 and json.loads(schedule.stdout)["code"] == "repository_not_pushed"


async def test_the_second_time_only_what_the_server_lacks_is_sent(
    user: dict[str, str], world: World, dirty: Path, tmp_path: Path
) -> None:
    first, sent = await submitted(user, dirty)
    assert sent[-1] > len(NOISE)
    same, sent = await submitted(user, dirty)
    assert sent[-1] == 0 and same.repository == first.repository
    (dirty / "calc.py").write_text("later\n")
    second, sent = await submitted(user, dirty)
    assert 0 < sent[-1] < 3000 and second.base_sha != first.base_sha
    git(dirty, "add", "-A", ":!.env")
    git(dirty, "commit", "-q", "-m", "third")
    git(dirty, "checkout", "-q", "--detach")
    (dirty / "calc.py").write_text("after that\n")
    third, sent = await submitted(user, dirty)
    assert 0 < sent[-1] < 3000
    for number, task in enumerate((first, second, third)):
        found = there(world, "ada", task.task_id, tmp_path / str(number))
        assert found["noise.bin"] == here(dirty)["noise.bin"]
    assert there(world, "ada", third.task_id, tmp_path / "last") == here(dirty)


async def test_what_the_server_has_lost_since_it_was_asked_is_sent_again(
    user: dict[str, str], world: World, dirty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = await submitted(user, dirty)
    ask = RemoteServer.known_commits
    lost: list[int] = []

    async def known(self: RemoteServer, commits: Sequence[str]) -> list[str]:
        found = await ask(self, commits)
        assert found
        lost.append(world.app().store.uploads.prune(unused_s=-1))
        return found

    monkeypatch.setattr(RemoteServer, "known_commits", known)
    same, _ = await submitted(user, dirty)
    (dirty / "calc.py").write_text("later\n")
    second, sent = await submitted(user, dirty)
    assert lost == [1, 1] and sent[0] < 3000 and sent[-1] > len(NOISE)
    assert same.base_sha == first.base_sha and same.repository != first.repository
    assert there(world, "ada", second.task_id, tmp_path / "there") == here(dirty)


async def test_an_upload_is_its_accounts_alone_and_gone_after_a_day(
    user: dict[str, str], world: World, dirty: Path
) -> None:
    task, _ = await submitted(user, dirty)
    upload, head = task.repository, git(dirty, "rev-parse", "HEAD")
    other = {**user, "CLOUDAGENT_API_KEY": ADMIN}
    async with stdio(other, dirty) as client:
        asked = {"prompt": "x", "repository": upload}
        assert refusal(await client.call_tool("submit_task", asked))["code"] == "upload_not_found"
    server = RemoteServer(Settings.read(other))
    assert await server.known_commits([head]) == []
    thin = bundle_working_tree(dirty, base_ref=None, held=lambda _: [head])

    async def told(_: int) -> None: ...

    for sent, code in ((thin.bundle, "upload_incomplete"), (b"", "upload_not_found")):
        with pytest.raises(CloudAgentError) as caught:
            await server.upload(sent, base_sha=thin.base_sha, notes=[], told=told)
        assert caught.value.code == code
    await server.close()
    world.app().store.uploads.prune(unused_s=-1)
    async with stdio(user, dirty) as client:
        gone = refusal(await client.call_tool("submit_task", {"prompt": "x", "repository": upload}))
        assert gone["code"] == "upload_not_found" and gone["field"] == "repository"
        assert structured(await client.call_tool("retry_task", {"task_id": await cancelled(client, task.task_id)}))


async def cancelled(client: Any, task_id: str) -> str:
    await client.call_tool("cancel_task", {"task_id": task_id})
    return task_id


async def test_the_same_key_is_the_same_task_whatever_was_changed_meanwhile(user: dict[str, str], dirty: Path) -> None:
    first, _ = await submitted(user, dirty, idempotency_key="k")
    (dirty / "calc.py").write_text("later\n")
    second, _ = await submitted(user, dirty, idempotency_key="k")
    assert second.replayed and second.task_id == first.task_id


async def test_an_upload_is_one_commit_and_not_for_a_schedule(url: str, user: dict[str, str], dirty: Path) -> None:
    task, _ = await submitted(user, dirty)
    place = {"prompt": "x", "repository": task.repository}
    async with httpx2.AsyncClient(base_url=f"{url}/api/v1", headers=authorized(user)) as http:
        for path, body, code, field in (
            ("/tasks", {**place, "base_ref": "main"}, "invalid_input", "base_ref"),
            ("/tasks", {**place, "repository": "upload:upl_x"}, "repository_not_allowed", "repository"),
            ("/tasks", {**place, "repository": "upload:../../x"}, "repository_not_allowed", "repository"),
            ("/schedules", {"name": "n", "cron": "0 3 * * *", "task": place}, "repository_not_allowed", None),
        ):
            said = (await http.post(path, json=body)).json()
            assert said["code"] == code and said["field"] in (field, "task.repository"), (path, body, said)


def authorized(user: dict[str, str]) -> dict[str, str]:
    return {"Authorization": f"Bearer {user['CLOUDAGENT_API_KEY']}"}


async def test_bad_uploads_are_refused_by_code_and_nothing_is_kept(
    url: str, user: dict[str, str], world: World, dirty: Path
) -> None:
    bundle = bundle_working_tree(dirty, base_ref=None).bundle
    notes = "cloudagent-notes"
    async with httpx2.AsyncClient(base_url=f"{url}/api/v1", headers=authorized(user), timeout=30) as http:

        async def drip() -> Any:
            yield bundle[:100]
            yield bundle[100:-1]

        cases: list[tuple[Any, dict[str, str], int, str]] = [
            (b"", {}, 422, "invalid_upload"),
            (b"garbage", {}, 422, "invalid_upload"),
            (drip(), {}, 422, "invalid_upload"),
            (bundle, {notes: "%5B"}, 422, "invalid_json"),
            (bundle, {notes: "%ff"}, 422, "invalid_json"),
            (bundle, {notes: "[" * 5000}, 422, "invalid_json"),
            (bundle, {notes: "{}"}, 422, "invalid_json"),
            (bundle, {notes: "[1]"}, 422, "invalid_json"),
            (bundle, {notes: json.dumps(["x"] * 21)}, 422, "out_of_range"),
            (bundle, {notes: json.dumps(["\0"])}, 422, "invalid_character"),
            (bundle, {notes: json.dumps(["\ud800"])}, 422, "invalid_unicode"),
            (bundle, {"Authorization": "Bearer wrong"}, 401, "unauthorized"),
        ]
        for content, headers, status, code in cases:
            answer = await http.post("/uploads", content=content, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (status, code), (headers, answer.text)
        bodies: list[tuple[dict[str, Any], str]] = [
            ({}, "missing_argument"),
            ({"commits": "x"}, "wrong_type"),
            ({"commits": ["x"] * 1001}, "out_of_range"),
            ({"commits": [], "more": 1}, "unknown_argument"),
            ({"commits": ["\0"]}, "invalid_character"),
        ]
        for body, code in bodies:
            assert (await http.post("/uploads/known", json=body)).json()["code"] == code, body
        assert (await http.get("/uploads")).status_code in (404, 405)
        assert world.app().store.uploads.prune(unused_s=-1) == 0
        answer = await http.post("/uploads", content=bundle, headers={notes: json.dumps(["a\x1b[31mb"])})
        said = answer.json()
        assert answer.status_code == 201 and said["sha256"] == hashlib.sha256(bundle).hexdigest()
        task = (await http.post("/tasks", json={"prompt": "x", "repository": f"upload:{said['upload_id']}"})).json()
        lines = (await http.get(f"/tasks/{task['task_id']}/logs")).json()["lines"]
        assert "a[31mb" in [line["message"] for line in lines]


async def test_one_that_says_that_it_is_too_large_is_refused_before_it_is_sent(
    url: str, user: dict[str, str], world: World
) -> None:
    place = urlsplit(url)
    assert place.hostname is not None and place.port is not None
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        key = user["CLOUDAGENT_API_KEY"]
        head = f"POST /api/v1/uploads HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {key}\r\n"
        connection.sendall(f"{head}Content-Length: 200000001\r\n\r\n".encode())
        answer = ""
        while "}" not in answer and (part := connection.recv(10_000)):
            answer += part.decode()
        assert " 413 " in answer.splitlines()[0] and "repository_too_large" in answer and ".gitignore" in answer


async def test_one_that_breaks_off_leaves_nothing_and_can_be_repeated(
    url: str, user: dict[str, str], world: World, dirty: Path
) -> None:
    bundle = bundle_working_tree(dirty, base_ref=None).bundle
    place = urlsplit(url)
    assert place.hostname is not None and place.port is not None
    key = user["CLOUDAGENT_API_KEY"]
    head = f"POST /api/v1/uploads HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {key}\r\n"
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(5):  # more than may be under way at once
        with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
            connection.sendall(f"{head}Content-Length: {len(bundle)}\r\n\r\n".encode() + bundle[:100_000])
    assert set(os.listdir("/proc/self/fd")) == before
    assert world.app().store.uploads.prune(unused_s=-1) == 0
    made: list[subprocess.CompletedProcess[str]] = []

    def again() -> bool:
        made.append(ca(user, dirty, "task", "create", "x", "--json"))
        return made[-1].returncode == 0

    until(again, "those that broke off count no more")
    assert json.loads(made[-1].stdout)["repository"].startswith("upload:")


# -- the limits, in this process ------------------------------------------------------------------------------------


async def parts(*said: bytes) -> AsyncIterator[bytes]:
    for part in said:
        yield part


async def test_one_that_grows_beyond_the_limit_or_falls_silent_is_given_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudagent_mcp.uploads.BUNDLE_LIMIT", 1000)
    monkeypatch.setattr("cloudagent_mcp.uploads.SILENT_S", 0.2)
    uploads, taken = Uploads(lambda: store), list[int]()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            taken.append(1)
            yield b"x" * 300

    async def silent() -> AsyncIterator[bytes]:
        yield b"x"
        await anyio.sleep_forever()

    for sent, code in ((endless(), "repository_too_large"), (silent(), "invalid_upload")):
        with anyio.fail_after(20), pytest.raises(CloudAgentError) as caught:
            await uploads.receive(Caller(), sent, length=None, base=None, notes=[])
        assert caught.value.code == code
    assert len(taken) == 4


async def test_an_account_has_only_so_many_under_way(store: Store) -> None:
    uploads, going = Uploads(lambda: store), anyio.Event()

    async def slow() -> AsyncIterator[bytes]:
        await going.wait()
        yield b"x"

    async def start(caller: Caller, sent: AsyncIterator[bytes]) -> str:
        with pytest.raises(CloudAgentError) as caught:
            await uploads.receive(caller, sent, length=None, base=None, notes=[])
        return caught.value.code

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(start, Caller(account_id="ada"), slow())
        await anyio.wait_all_tasks_blocked()
        assert await start(Caller(account_id="ada"), parts(b"x")) == "limit_reached"
        assert await start(Caller(account_id="bob"), parts(b"x")) == "invalid_upload"
        going.set()
    assert await start(Caller(account_id="ada"), parts(b"x")) == "invalid_upload"


async def test_what_arrived_otherwise_than_it_was_sent_is_noticed(
    user: dict[str, str], dirty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = RemoteServer.upload

    async def altered(self: RemoteServer, bundle: bytes, **arguments: Any) -> str:
        monkeypatch.setattr("cloudagent_mcp.remote_server.hashlib.sha256", hashlib.sha512)
        try:
            return await send(self, bundle, **arguments)
        finally:
            monkeypatch.undo()

    monkeypatch.setattr(RemoteServer, "upload", altered)
    with pytest.raises(CloudAgentError, match="something else"):
        await submitted(user, dirty)


async def test_submodules_and_lfs_are_named_and_many_notes_become_few(
    user: dict[str, str], world: World, repo: Path
) -> None:
    (repo / ".gitattributes").write_text("*.psd filter=lfs diff=lfs merge=lfs -text\n")
    git(repo, "add", "-A")
    git(repo, "update-index", "--add", "--cacheinfo", f"160000,{git(repo, 'rev-parse', 'HEAD')},vendor/lib")
    (repo / "vendor" / "lib").mkdir(parents=True)  # as git leaves one that is not initialised
    for number in range(30):
        git(repo, "init", "-q", f"inner{number}")
    task, _ = await submitted(user, repo)
    page = world.app().store.events.list("ada", task.task_id, after=0, limit=100)
    said = [line.message for line in page.lines]
    assert len(said) == 21 and said[1] == "Left out, since it is a repository of its own: inner0/"
    assert said[-1] == "Of 13 more things the agent gets less than is here."
    with world.client(repo) as client:  # on this machine all of it is told
        own = client.call("submit_task", prompt="x")
        told = " ".join(line["message"] for line in world.log(client, own["task_id"]))
    assert "The submodule vendor/lib is an empty folder there" in told and "Files of Git LFS are pointers" in told


async def test_what_is_told_of_a_delegation_only_grows(user: dict[str, str], dirty: Path) -> None:
    told: list[tuple[float, str]] = []

    async def progress(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, message or ""))
        if "was submitted" in (message or ""):
            submitted.set()

    submitted = anyio.Event()
    async with stdio(user, dirty) as client, anyio.create_task_group() as group:

        async def delegate() -> None:
            await client.call_tool("delegate", {"prompt": "x"}, progress_callback=progress)

        group.start_soon(delegate)
        with anyio.fail_after(30):
            await submitted.wait()
        group.cancel_scope.cancel()
    assert any("Upload" in message for _, message in told) and [n for n, _ in told] == sorted(n for n, _ in told)
