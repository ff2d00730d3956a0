"""An apply that dies at any moment leaves, after recovery, the tree as it was before or as it is after."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloudagent_mcp.apply import apply, undo
from cloudagent_mcp.apply.journal import Journal, Step
from cloudagent_mcp.apply.tree import File, Tree
from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.errors import ApplyConflict, NothingToUndo, TargetNotAllowed
from tests.support.git_repos import Result, Workshop, files_of, make_repository, put


def die(what: str, stride: int) -> dict[str, int]:
    """How often it died where, and was right afterwards."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # thousands of fsyncs
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.support.dying", what, folder, str(stride)],
            cwd=Path(__file__).parents[2],
            env={"PATH": os.environ["PATH"], "HOME": folder, "TMPDIR": folder},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_at_whatever_write_it_dies_the_next_start_finds_the_tree_as_before_or_as_wanted(
    request: pytest.FixtureRequest,
) -> None:
    counts = die("journal", 1 if request.config.getoption("--full") else 20)
    assert counts["writing"] > 100
    assert counts["between"] > 50, "the crashes came at moments when the next start had nothing to do"
    assert counts["starting again"] > 100 and counts["undoing"] > 50


def test_at_whatever_write_a_whole_apply_or_undo_dies_the_next_one_puts_it_right(
    request: pytest.FixtureRequest,
) -> None:
    counts = die("apply", 1 if request.config.getoption("--full") else 13)
    assert counts["applying"] > 8 and counts["undoing"] > 2


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "shop", {f"{n}.txt": f"{n}\n" for n in range(5)})


@pytest.fixture
def result(shop: Path, tmp_path: Path) -> Result:
    workshop = Workshop(tmp_path / "workshop", bundle_working_tree(shop, base_ref=None).bundle)
    return workshop.result(
        {"0.txt": "new\n", "1.txt": None, "new/x.txt": "x\n", "new/y.txt": "y\n", "4.txt": "4 new\n"}
    )


def run_apply(shop: Path, result: Result) -> None:
    apply(shop, **result.given, state_folder=shop.parent / "state")


class Died(BaseException):
    """The process is no more."""


def fails_at(number: int, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    """The file of that number is not put in place."""
    put_in_place = 0

    def failing(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            nonlocal put_in_place
            if "src_dir_fd" in options:
                put_in_place += 1
                if put_in_place == number:
                    raise error
            function(*arguments, **options)

        return call

    for name in ("rename", "link"):
        patch.setattr(os, name, failing(getattr(os, name)))


def do_nothing(journal: Journal, tree: Tree) -> list[str]:
    return []


@pytest.mark.parametrize("at", [1, 3, 4])
def test_the_next_call_takes_back_what_a_dead_one_began(
    shop: Path, result: Result, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(shop)
    with monkeypatch.context() as patch:
        fails_at(at, Died(), patch)
        patch.setattr(Journal, "take_back", do_nothing)
        with pytest.raises(Died):
            run_apply(shop, result)
    assert files_of(shop) != before
    with pytest.raises(NothingToUndo):
        undo(shop, task_id=result.task_id, state_folder=shop.parent / "state")
    assert files_of(shop) == before
    run_apply(shop, result)
    assert (shop / "new/y.txt").read_text() == "y\n"


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EROFS])
def test_a_write_that_fails_takes_the_others_back(
    shop: Path, result: Result, at: int, problem: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(shop)
    fails_at(at, OSError(problem, "no"), monkeypatch)
    with pytest.raises(TargetNotAllowed, match="full" if problem == errno.ENOSPC else "may not be written"):
        run_apply(shop, result)
    assert files_of(shop) == before


def test_a_file_that_the_user_saves_in_that_very_moment_is_not_lost(
    shop: Path, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(shop)
    begin = Journal.begin

    def begin_and_save(*arguments: object, **options: object) -> Journal:
        journal = begin(*arguments, **options)  # pyright: ignore[reportArgumentType]
        put(shop, {"4.txt": "mine\n"})
        return journal

    monkeypatch.setattr(Journal, "begin", begin_and_save)
    with pytest.raises(ApplyConflict, match=r"4\.txt"):
        run_apply(shop, result)
    assert files_of(shop) == {**before, "4.txt": (before["4.txt"][0], b"mine\n")}


def test_a_journal_is_forgotten_before_its_originals_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order a file system lists them: without originals a journal could only do harm."""
    put(tmp_path, {"tree/a": "a\n"})
    tree = Tree(tmp_path / "tree")
    steps = [Step("a", tree.read("a"), File(b"after"))]
    journal = Journal.begin(tmp_path / "state", tree, steps, about={})
    journal.write(tree, steps)

    def dies(*_: object, **__: object) -> None:
        raise Died()

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(Died):
            journal.take_back(tree)
    assert (tmp_path / "tree/a").read_text() == "a\n"
    assert Journal.open(tmp_path / "state") is None
    tree.close()
