"""Several results on top of each other: each is verified where it then stands, in a sandbox, by a real worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.records import LOCAL_ACCOUNT, TaskSpec
from tests.support.git_repos import Workshop
from tests.support.served import KEY, served
from tests.support.stored import with_result
from tests.support.worlds import World

TEST = "python3 -m unittest -q"
MENDED = "def add(a, b):\n    return a + b\n"
CASE = "import unittest\nimport calc\n\nclass M(unittest.TestCase):\n    def test(self): self.assertEqual({}, {})\n"
MENDS = {"calc.py": MENDED}
ADDS = {"test_mul.py": CASE.format("2 * 3", 6)}
RELIES_ON_THE_MISTAKE = {"test_mistake.py": CASE.format("calc.add(2, 3)", -1)}

Make = Callable[..., str]


@pytest.fixture
def made(world: World, repo: Path, tmp_path: Path) -> Make:
    """Makes a task that has ended with these files, all on the same base, and was verified by the tests."""
    bundle = bundle_working_tree(repo, base_ref=None).bundle

    def make(files: Mapping[str, str], *, verify: str | None = TEST, parent: str | None = None) -> str:
        result = Workshop(tmp_path / f"workshop{len(list(tmp_path.iterdir()))}", bundle).result(files)
        spec = TaskSpec(prompt="x", title="Some work", repository=str(repo), verify=verify, retries=2)
        return with_result(world.app().store, result, spec, parent_task_id=parent)

    return make


def ca(world: World, folder: Path, *words: str, **environment: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "cloudagent_mcp", "task", *words, "--json"]
    env = {**world.environment, **environment}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def told(answer: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    return [(step["outcome"], step["verdict"]) for step in answer["steps"]]


def test_each_is_verified_on_top_of_those_before_it_and_what_fails_there_is_taken_back(
    world: World, repo: Path, made: Make
) -> None:
    world = world.without_credential()  # nobody asks a model anything
    world.start_worker()
    tasks = [made(files) for files in (MENDS, ADDS, RELIES_ON_THE_MISTAKE, {"never.txt": "x\n"})]
    (repo / "notes.txt").write_text("mine\n")
    code, answer = ca(world, repo, "apply", *tasks)
    became = [("applied", "passed"), ("applied", "passed"), ("undone", "failed"), ("waiting", None)]
    assert told(answer) == became, answer
    assert code == 1 and answer["finished"]
    names = {path.name for path in repo.iterdir()}
    assert names == {".git", ".gitignore", "calc.py", "test_calc.py", "test_mul.py", "notes.txt"}
    assert (repo / "calc.py").read_text() == MENDED
    with world.client(repo) as client:
        check = client.call("get_task", task_id=answer["steps"][2]["verified_by"])
    assert check["agent"] == "none" and check["usage"]["cost_usd"] == 0 and check["parent_task_id"] == tasks[2]
    assert "AssertionError: 5 != -1" in check["result"]["verify"]["output"] and "failed" in check["next_action"]
    assert (check["retries_used"], check["result"]["verify"]["tries"]) == (0, 1), "nobody is there to mend it"
    # Once more goes on from there: what is there is not verified again.
    again = ca(world, repo, "apply", *tasks[:2])
    assert again[0] == 0 and again[1]["steps"][1]["verified_by"] == answer["steps"][1]["verified_by"]


def test_the_tasks_of_a_server_are_applied_here_and_verified_there(world: World, repo: Path, made: Make) -> None:
    (repo / ".env").write_text("TOKEN=x\n")  # nobody is asked about it: it is no part of what is verified
    with served(world) as url:
        world.start_worker()
        first, second = made(MENDS), made(ADDS)
        code, answer = ca(world, repo, "apply", first, second, CLOUDAGENT_URL=url, CLOUDAGENT_API_KEY=KEY)
        assert code == 0 and told(answer) == [("applied", "passed"), ("applied", "passed")], answer
        check = world.app().tasks._store.tasks.get(LOCAL_ACCOUNT, answer["steps"][1]["verified_by"])  # pyright: ignore[reportPrivateUsage]
        assert check.repository.startswith("upload:")


def test_a_conflict_stops_there_and_names_what_was_applied_before(world: World, repo: Path, made: Make) -> None:
    first, second = made(MENDS), made({"calc.py": "def add(a, b):\n    return b - a\n"})
    code, refused = ca(world, repo, "apply", first, second)
    assert code == 1 and refused["code"] == "conflict"
    assert second[5:13] in refused["detail"] and f"still so: {first[5:13]}" in refused["detail"]
    assert (repo / "calc.py").read_text() == MENDED


def test_what_has_no_verify_command_stays_and_is_said_to_be_unverified(world: World, repo: Path, made: Make) -> None:
    first, second = made(MENDS, verify=None), made(ADDS, verify=None)
    code, answer = ca(world, repo, "apply", first, second)
    assert code == 0 and told(answer) == [("applied", "passed"), ("applied", "unverified")]
    assert f"Nothing has verified: {second[5:13]}" in answer["next_action"]


def test_a_result_is_verified_once_more_as_it_was_or_as_the_folder_is(world: World, repo: Path, made: Make) -> None:
    world.start_worker()
    task_id = made(MENDS)
    with served(world) as url:
        (repo / ".env").write_text("TOKEN=x\n")
        server = {"CLOUDAGENT_URL": url, "CLOUDAGENT_API_KEY": KEY}
        own, here = (
            ca(world, repo, "verify", task_id),
            ca(world, repo, "verify", task_id, "--repository", ".", **server),
        )
    with world.client(repo) as client:
        for (_, created), verdict in ((own, "passed"), (here, "failed")):
            check = world.wait(client, created["task_id"])
            assert (check["status"], check["verdict"]) == ("completed", verdict), check
            assert check["result"]["verify"]["command"] == TEST


def test_a_task_that_goes_on_from_an_applied_one_takes_its_place(world: World, repo: Path, made: Make) -> None:
    first = made({"calc.py": "def add(a, b):\n    return sum((a, b))\n", "note.txt": "draft\n"})
    second = made({"calc.py": MENDED, "note.txt": "done\n"}, parent=made({"other.txt": "x\n"}, parent=first))
    with served(world) as url:
        for server in ({}, {"CLOUDAGENT_URL": url, "CLOUDAGENT_API_KEY": KEY}):
            assert ca(world, repo, "apply", first, **server)[0] == 0
            code, applied = ca(world, repo, "apply", second, **server)
            assert (code, applied["outcome"]) == (0, "applied"), applied
            assert (repo / "calc.py").read_text() == MENDED and (repo / "note.txt").read_text() == "done\n"
            assert ca(world, repo, "undo", second, **server)[0] == 0 and (repo / "note.txt").read_text() == "draft\n"
            assert ca(world, repo, "undo", first, **server)[0] == 0 and not (repo / "note.txt").exists()
