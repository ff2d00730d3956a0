"""What is shown before an apply is what is written, or nothing is; a start settles what a dead one left half done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from cloudagent_mcp.apply import ApplyOutcome, Destination, apply, take_back_interrupted, undo
from cloudagent_mcp.apply.journal import Journal
from cloudagent_mcp.apply.tree import Tree
from cloudagent_mcp.client import LocalClient
from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.errors import ApplyConflict, ApplyRefused, ConfirmationNeeded, NotReady, PreviewOutdated
from cloudagent_storage.records import TaskError, TaskSpec, TaskStatus
from tests.support.git_repos import Result, Workshop, commit, files_of, fingerprint, git, make_repository, put
from tests.support.stored import with_result
from tests.support.worlds import World

LINES = "".join(f"line {n}\n" for n in range(20))
FILES = {f"{n}.txt": f"{n}\n" for n in range(5)}
WORK = {"0.txt": "new\n", "1.txt": None, "new/x.txt": "x\n", "4.txt": "4 new\n"}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "shop", {**FILES, "a.txt": LINES, "sub/c.txt": "c\n"})


@pytest.fixture
def workshop(shop: Path, tmp_path: Path) -> Workshop:
    return Workshop(tmp_path / "workshop", bundle_working_tree(shop, base_ref=None).bundle)


def run_apply(shop: Path, result: Result, **options: Any) -> ApplyOutcome:
    return apply(
        shop,
        **result.given,
        state_folder=shop.parent / "state",
        **options,
    )


def token(shop: Path, result: Result, **options: Any) -> str:
    found = run_apply(shop, result, dry_run=True, **options).preview
    assert found is not None and found.startswith("pv_")
    return found


# -- what a preview tells ---------------------------------------------------------------------------------------------


def test_a_preview_counts_and_warns_in_words(shop: Path, workshop: Workshop) -> None:
    result = workshop.result(
        {
            "a.txt": LINES.replace("line 2\n", "task\n"),
            "1.txt": None,
            "big.bin": os.urandom(2_000_000),
            "small.bin": b"\0\1",
            "link": "-> a.txt",
            "run.sh": "#!/bin/sh\n",
            ".github/workflows/ci.yml": "on: push\n",
            ".husky/pre-commit": "x\n",
            "CLAUDE.md": "x\n",
            "conftest.py": "x\n",
            "plain.py": "x\n",
        },
        executable=("run.sh",),
    )
    commit(shop, {"a.txt": LINES.replace("line 17\n", "user\n")})
    before = fingerprint(shop)
    seen = run_apply(shop, result, dry_run=True)
    assert fingerprint(shop) == before
    files = {file.path: file for file in seen.files}
    assert (files["a.txt"].insertions, files["a.txt"].deletions, files["a.txt"].merged) == (1, 1, True)
    assert files["big.bin"].binary and files["run.sh"].executable and not files["plain.py"].merged
    assert seen.totals is not None
    assert (seen.totals.files, seen.totals.binary, seen.totals.merged, seen.totals.deletions) == (11, 2, 1, 2)
    why = {danger.path: danger.why for danger in seen.dangers}
    assert "plain.py" not in why and "small.bin" not in why and "a.txt" not in why
    for path, word in {
        "1.txt": "deletes",
        "big.bin": "large binary of 1.9 MB",
        "link": "a symlink to a.txt",
        "run.sh": "becomes executable",
        ".github/workflows/ci.yml": "CI workflow",
        ".husky/pre-commit": "runs on `git commit`",
        "CLAUDE.md": "agents",
        "conftest.py": "runs with the tests",
    }.items():
        assert word in why[path]
    named = [danger.path for danger in seen.dangers][:3]
    assert set(named) == {".github/workflows/ci.yml", ".husky/pre-commit", "CLAUDE.md"}, (
        "what must be named comes first"
    )


# -- the token --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("onto", ["files", "branch", "worktree"])
def test_what_was_previewed_is_what_is_written(shop: Path, workshop: Workshop, onto: str) -> None:
    result, destination = workshop.result(WORK), Destination.model_validate({"onto": onto})
    shown = token(shop, result, destination=destination)
    assert token(shop, result, destination=destination) == shown, "it is stateless"
    put(shop, {"sub/c.txt": "mine, and in nobody's way\n"})
    assert run_apply(shop, result, destination=destination, preview=shown).outcome == "applied"


MEANWHILE: dict[str, Callable[[Path], object]] = {
    "changed": lambda shop: put(shop, {"0.txt": "mine\n"}),
    "added": lambda shop: put(shop, {"new/x.txt": "mine\n"}),
    "deleted": lambda shop: put(shop, {"1.txt": None}),
    "its mode": lambda shop: (shop / "0.txt").chmod(0o600),
    "changed to the same": lambda shop: put(shop, {"0.txt": "new\n"}),
    "something to merge": lambda shop: commit(shop, {"a.txt": LINES.replace("line 17\n", "user\n")}),
}


@pytest.mark.parametrize("what", MEANWHILE)
def test_a_preview_is_outdated_when_the_tree_has_changed(shop: Path, workshop: Workshop, what: str) -> None:
    result = workshop.result({**WORK, "a.txt": LINES.replace("line 2\n", "task\n")})
    shown = token(shop, result)
    MEANWHILE[what](shop)
    before = fingerprint(shop)
    with pytest.raises(PreviewOutdated) as refused:
        run_apply(shop, result, preview=shown)
    assert fingerprint(shop) == before
    said = refused.value.as_dict()
    assert (said["code"], said["outcome"], said["field"]) == ("preview_outdated", "refused", "preview")
    assert said["files"]


def test_a_preview_is_of_one_result_one_directory_and_one_way(shop: Path, workshop: Workshop, tmp_path: Path) -> None:
    result = workshop.result(WORK)
    shown = token(shop, result)
    other = workshop.result({**WORK, "4.txt": "4 newer\n"})
    bundle = workshop.folder / ".git" / "again"
    git(workshop.folder, "update-ref", f"refs/heads/{result.branch}", f"refs/heads/{other.branch}")
    base = f"^{result.base_sha}"
    git(workshop.folder, "bundle", "create", "-q", str(bundle), f"refs/heads/{result.branch}", base)
    changed = replace(result, result_bundle=bundle.read_bytes())
    git(tmp_path, "clone", "--quiet", "shop", "clone")
    for directory, what, options in (
        (shop, changed, {}),
        (shop, other, {}),
        (tmp_path / "clone", result, {}),
        (shop, result, {"destination": Destination(onto="branch")}),
    ):
        with pytest.raises(PreviewOutdated):
            run_apply(directory, what, preview=shown, **options)
    on_branch = token(shop, result, destination=Destination(onto="branch"))
    for destination in (
        Destination(onto="branch", branch="other"),
        Destination(onto="worktree"),
        Destination(onto="branch", squash=True, title="T"),
        Destination(),
    ):
        with pytest.raises(PreviewOutdated):
            run_apply(shop, result, preview=on_branch, destination=destination)
    git(shop, "branch", result.branch)
    with pytest.raises(PreviewOutdated):
        run_apply(shop, result, preview=on_branch, destination=Destination(onto="branch"))
    assert files_of(shop) == files_of(tmp_path / "clone")


def test_a_preview_allows_nothing_that_is_not_named(shop: Path, workshop: Workshop) -> None:
    result = workshop.result({".envrc": "x\n", "0.txt": "new\n"})
    shown = token(shop, result)
    with pytest.raises(ConfirmationNeeded) as refused:
        run_apply(shop, result, preview=shown)
    assert refused.value.as_dict()["files"] == [{"path": ".envrc", "why": "runs when a shell enters the folder"}]
    assert run_apply(shop, result, preview=shown, allow_sensitive=[".envrc"]).outcome == "applied"


def test_a_conflict_says_so_with_its_files(shop: Path, workshop: Workshop) -> None:
    result = workshop.result(WORK)
    put(shop, {"0.txt": "mine\n", "4.txt": "mine\n"})
    with pytest.raises(ApplyConflict) as refused:
        run_apply(shop, result)
    said = refused.value.as_dict()
    assert (said["code"], said["outcome"]) == ("conflict", "conflict")
    assert {"code", "detail", "remedy", "field"} < set(said)
    assert [file["path"] for file in said["files"]] == ["0.txt", "4.txt"] and all(file["why"] for file in said["files"])


# -- the next start ---------------------------------------------------------------------------------------------------


class Died(BaseException):
    """The process is no more."""


def do_nothing(journal: Journal, tree: Tree) -> list[str]:
    return []


def die_in_apply(shop: Path, result: Result, monkeypatch: pytest.MonkeyPatch, *, at: int = 2) -> None:
    placed = 0

    def dying(way: Callable[..., None]) -> Callable[..., None]:
        def place(*arguments: object, **options: object) -> None:
            nonlocal placed
            if "src_dir_fd" in options:
                placed += 1
                if placed == at:
                    raise Died()
            way(*arguments, **options)

        return place

    before = files_of(shop)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying(os.rename))
        patch.setattr(os, "link", dying(os.link))
        patch.setattr(Journal, "take_back", do_nothing)
        with pytest.raises(Died):
            run_apply(shop, result)
    assert files_of(shop) != before


@pytest.mark.parametrize("at", [2, 3])
def test_the_next_start_restores_the_tree_wherever_it_is(
    shop: Path, workshop: Workshop, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, before = shop.parent / "state", files_of(shop)
    die_in_apply(shop, workshop.result(WORK), monkeypatch, at=at)
    assert take_back_interrupted(state) == [shop]
    assert files_of(shop) == before
    assert take_back_interrupted(state) == [] and not list(state.glob("*/unfinished"))


def test_a_start_leaves_alone_who_is_at_work_what_is_gone_and_what_is_another_by_now(
    shop: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state, before = shop.parent / "state", files_of(shop)
    die_in_apply(shop, workshop.result(WORK), monkeypatch)
    half = files_of(shop)
    (lock,) = state.glob("*/lock")
    with FileLock(lock):
        assert take_back_interrupted(state) == []
    assert files_of(shop) == half
    shop.rename(tmp_path / "moved")
    assert take_back_interrupted(state) == []
    shutil.copytree(tmp_path / "moved", shop, symlinks=True)
    assert take_back_interrupted(state) == [] and files_of(shop) == half
    shutil.rmtree(shop)
    shop.symlink_to(tmp_path / "moved")
    assert take_back_interrupted(state) == [] and files_of(tmp_path / "moved") == half
    shop.unlink()
    (tmp_path / "moved").rename(shop)
    assert take_back_interrupted(state) == [shop]
    assert files_of(shop) == before


def test_an_interrupted_apply_of_an_older_version_is_taken_back_by_the_next_apply(
    shop: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, before, result = shop.parent / "state", files_of(shop), workshop.result(WORK)
    die_in_apply(shop, result, monkeypatch)
    (mark,) = state.glob("*/unfinished")
    mark.unlink()
    (journal,) = state.glob("*/task_*/journal.json")
    old = json.loads(journal.read_text())
    del old["about"]["at"]
    journal.write_text(json.dumps(old))
    assert take_back_interrupted(state) == []
    run_apply(shop, result)
    undo(shop, task_id=result.task_id, state_folder=state)
    assert files_of(shop) == before


def test_a_mark_that_nobody_can_read_stops_no_start(shop: Path, workshop: Workshop) -> None:
    state = shop.parent / "state"
    for number, text in enumerate(("", "{}", "[]", '{"directory": 1, "inode": 2}', '{"directory": "/", "inode": 2}')):
        (state / str(number)).mkdir(parents=True)
        (state / str(number) / "unfinished").write_text(text)
    assert take_back_interrupted(state) == []


@pytest.mark.parametrize("command", [["mcp"], ["task", "list"], ["mcp", "bridge"]])
def test_every_start_settles_what_a_dead_process_left(
    world: World, shop: Path, workshop: Workshop, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(shop)
    die_in_apply(shop, workshop.result(WORK), monkeypatch)
    world.home.mkdir(exist_ok=True)
    shutil.copytree(shop.parent / "state", world.home / "apply")
    environment = {**world.environment}
    if command[1:] == ["bridge"]:
        environment["CLOUDAGENT_URL"] = "http://127.0.0.1:9"
    done = subprocess.run(
        [sys.executable, "-m", "cloudagent_mcp", *[part for part in command if part != "bridge"]],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=world.home,
        timeout=60,
    )
    assert files_of(shop) == before, done.stderr
    assert str(shop) in done.stderr and str(shop) not in done.stdout


# -- partial results --------------------------------------------------------------------------------------------------


def ended(world: World, shop: Path, result: Result, status: TaskStatus | None) -> LocalClient:
    """A task of that result, in that state; None is one that still runs, with a result that is there already."""
    app = world.app(shop)
    code = {TaskStatus.FAILED: "timed_out", TaskStatus.CANCELLED: "cancelled_by_user"}.get(status or TaskStatus.QUEUED)
    error = None if code is None else TaskError.model_validate({"code": code, "message": "m", "remedy": "r"})
    spec = TaskSpec(prompt="x", title="Do it", repository=str(shop))
    with_result(app.store, result, spec, status=status, error=error)
    return LocalClient(app)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (TaskStatus.FAILED, "partial work: the task failed (timed_out)"),
        (TaskStatus.CANCELLED, "partial work: the task was cancelled"),
        (TaskStatus.COMPLETED, None),
    ],
)
@pytest.mark.parametrize("onto", ["files", "branch"])
def test_what_a_failed_or_cancelled_task_did_is_applied_and_said_to_be_partial(
    world: World, shop: Path, workshop: Workshop, status: TaskStatus, says: str | None, onto: str
) -> None:
    result = workshop.result(WORK)
    client = ended(world, shop, result, status)
    try:
        seen = client.apply(result.task_id, dry_run=True, onto=onto)
        done = client.apply(result.task_id, preview=seen["preview"], onto=onto)
    finally:
        client.close()
    assert done["outcome"] == "applied"
    for answer in (seen, done):
        assert ("partial" in answer["message"]) == (says is not None) and (says or "") in answer["message"]


def test_the_result_of_a_task_that_still_runs_is_not_applied(world: World, shop: Path, workshop: Workshop) -> None:
    result = workshop.result(WORK)
    client, before = ended(world, shop, result, None), files_of(shop)
    try:
        with pytest.raises(NotReady):
            client.apply(result.task_id)
    finally:
        client.close()
    assert files_of(shop) == before


def test_a_refusal_says_the_same_wherever_it_is_read(world: World, shop: Path, workshop: Workshop) -> None:
    result = workshop.result(WORK)
    client = ended(world, shop, result, TaskStatus.COMPLETED)
    put(shop, {"0.txt": "mine\n"})
    try:
        with pytest.raises(ApplyRefused) as refused:
            client.apply(result.task_id)
    finally:
        client.close()
    printed = subprocess.run(
        [sys.executable, "-m", "cloudagent_mcp", "task", "apply", result.task_id, "--json"],
        env={**world.environment},
        cwd=shop,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert printed.returncode == 1 and json.loads(printed.stdout) == refused.value.as_dict()
    assert json.loads(printed.stdout)["files"] == [{"path": "0.txt", "why": "changed here as well as in the task"}]
