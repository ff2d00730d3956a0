"""An apply that dies at any moment leaves, after recovery, the tree as it was before or as it is after."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cloudagent_mcp.apply import apply, undo
from cloudagent_mcp.apply.journal import Journal
from cloudagent_mcp.apply.tree import Tree
from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.errors import ApplyConflict, NothingToUndo, TargetNotAllowed
from tests.support.git_repos import Result, Workshop, files_of, make_repository, put

# Every call with which a file system is changed dies, one after the other, in a process of its own.
DIE_EVERYWHERE = '''
import json, os, shutil, sys
from pathlib import Path
from cloudagent_mcp.apply.journal import Journal, Step
from cloudagent_mcp.apply.tree import File, Tree
from tests.support.git_repos import fingerprint

folder = Path(sys.argv[1])
template, tree, state = folder / "template", folder / "tree", folder / "state"
(template / "sub" / "deep").mkdir(parents=True)
(template / "becomes-file").mkdir()
for name in ("a", "b", "c", "sub/deep/d", "becomes-folder", "becomes-file/x", "sub/e"):
    (template / name).write_text(f"{name} before")
(template / "b").chmod(0o640)
(template / "sub").chmod(0o750)
(template / "link").symlink_to("a")
AFTER = {
    "a": File(b"a after"), "b": File(b"b after", mode=0o755), "c": None, "sub/deep/d": None, "sub/e": File(b"e"),
    "new/er/f": File(b"f after"), "new/g": File(b"g after"), "becomes-folder": None, "becomes-folder/h": File(b"h"),
    "becomes-file/x": None, "becomes-file": File(b"file"), "link": File(b"b", link=True),
    "link2": File(b"a", link=True),
}


def begin(opened):
    before = {}
    for path in AFTER:
        try:
            before[path] = opened.read(path)
        except Exception:
            before[path] = None
    steps = [Step(path, before[path], after) for path, after in AFTER.items()]
    return Journal.begin(state / "task", opened, steps, about={}), steps


def do():
    opened = Tree(tree)
    journal, steps = begin(opened)
    journal.write(opened, steps)


def recover():
    opened = Tree(tree)
    journal = Journal.open(state / "task") if (state / "task").is_dir() else None
    if journal is not None and not journal.done:
        assert journal.take_back(opened) == []


def take_back():
    opened = Tree(tree)
    assert Journal.open(state / "task").take_back(opened) == []


def dies(action, at):
    """Run it in a process that dies before its call number `at`; True if it came so far."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), code
        return code == 9
    calls = 0

    def dying(function):
        def call(*arguments, **options):
            nonlocal calls
            if function is not real_open or arguments[1] & os.O_CREAT:
                calls += 1
                if calls == at:
                    os._exit(9)
            return function(*arguments, **options)
        return call

    real_open = os.open
    for name in ("open", "rename", "unlink", "mkdir", "rmdir", "symlink", "fsync", "fchmod", "chown"):
        setattr(os, name, dying(getattr(os, name)))
    action()
    os._exit(0)


def fresh():
    for path in (tree, state):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(template, tree, symlinks=True)
    state.mkdir()


fresh()
before = fingerprint(tree)
do()
after = fingerprint(tree)
assert before != after
take_back()
assert fingerprint(tree) == before

crashes = between = torn_then_dead = 0
for at in range(1, 1000):
    fresh()
    if not dies(do, at):
        break
    crashes += 1
    between += fingerprint(tree) not in (before, after)
    if at % 7 == 0:  # die in the recovery, too, at each of its calls
        torn = folder / "torn"
        for second in range(1, 1000):
            shutil.rmtree(torn, ignore_errors=True)
            shutil.copytree(tree, torn / "tree", symlinks=True)
            shutil.copytree(state, torn / "state")
            died = dies(recover, second)
            torn_then_dead += died
            recover()
            assert fingerprint(tree) in (before, after), (at, second)
            for name in ("tree", "state"):
                shutil.rmtree(folder / name)
                shutil.copytree(torn / name, folder / name, symlinks=True)
            if not died:
                break
    recover()
    assert fingerprint(tree) in (before, after), at
undone = 0
for at in range(1, 1000):
    fresh()
    do()
    if not dies(take_back, at):
        break
    undone += 1
    recover()
    assert fingerprint(tree) in (before, after), at
print(json.dumps({"crashes": crashes, "between": between, "in_recovery": torn_then_dead, "in_undo": undone}))
'''


def test_whatever_call_it_dies_in_the_tree_is_before_or_after() -> None:
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # thousands of fsyncs
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", DIE_EVERYWHERE, folder],
            cwd=Path(__file__).parents[2],
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["crashes"] > 50
    assert counts["between"] > 20, "the crashes came at moments when a recovery had nothing to do"
    assert counts["in_recovery"] > 100 and counts["in_undo"] > 20


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
    apply(
        shop,
        task_id=result.task_id,
        branch=result.branch,
        base_sha=result.base_sha,
        input_bundle=result.input_bundle,
        result_bundle=result.result_bundle,
        state_folder=shop.parent / "state",
    )


class Died(BaseException):
    """The process is no more."""


def do_nothing(journal: Journal, tree: Tree) -> list[str]:
    return []


@pytest.mark.parametrize("at", [1, 3, 4])
def test_the_next_call_takes_back_what_a_dead_one_began(
    shop: Path, result: Result, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(shop)
    renames = 0
    rename = os.rename

    def dying(*arguments: object, **options: object) -> None:
        nonlocal renames
        if "src_dir_fd" in options:
            renames += 1
            if renames == at:
                raise Died()
        rename(*arguments, **options)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dying)
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
    renames = 0
    rename = os.rename

    def failing(*arguments: object, **options: object) -> None:
        nonlocal renames
        if "src_dir_fd" in options:
            renames += 1
            if renames == at:
                raise OSError(problem, "no")
        rename(*arguments, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(os, "rename", failing)
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
