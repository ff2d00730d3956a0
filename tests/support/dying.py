"""A program in which every call that changes a file system is deadly, one after the other, in a process of its own.

    python -m tests.support.dying journal|apply FOLDER STRIDE

`journal` writes and takes back steps of every kind, `apply` a whole result, git and all. It ends with 0 when the tree
was always, after the next start, as before or as it was to become, and prints how often it died where.
"""

from __future__ import annotations

import builtins
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from cloudagent_mcp.apply import apply, undo
from cloudagent_mcp.apply.journal import Journal, Step
from cloudagent_mcp.apply.tree import File, InTheWay, Tree
from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.errors import AlreadyApplied, NothingToUndo
from tests.support.git_repos import Workshop, files_of, fingerprint, make_repository, put

CALLS = (
    *["open", "rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir", "truncate", "ftruncate"],
    *["fsync", "fchmod", "chmod", "chown", "fchown", "utime", "write", "pwrite"],
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_DIED, _UNCOUNTED = 9, 3
_CHANGES = (
    *["os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"],
    *["os.chown", "os.utime"],
)
"""What Python says by itself before it changes something."""


class _Deadly:
    """Counts the calls of this process, and dies before one of them, or in the middle of it if it writes."""

    def __init__(self, at: int) -> None:
        self._at = at
        self._calls = self._within = 0
        for name in CALLS:
            setattr(os, name, self._counted(getattr(os, name), is_open=name == "open"))
        self._open, self._fdopen = builtins.open, os.fdopen
        builtins.open = self._opening(self._open)
        os.fdopen = self._opening(self._fdopen)
        # Nothing must be written that is not counted, or the numbers would mean nothing.
        sys.addaudithook(self._heard)

    def tick(self) -> None:
        self._calls += 1
        if self._calls == self._at:
            os._exit(_DIED)

    def _counted(self, function: Callable[..., Any], *, is_open: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not is_open or arguments[1] & _WRITES:
                self.tick()
            self._within += 1
            try:
                return function(*arguments, **options)
            finally:
                self._within -= 1

        return call

    def _opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if mode != "wb":
                return function(file, mode, *arguments, **options)
            if not isinstance(file, int):
                self.tick()
            self._within += 1
            try:
                return _Torn(function(file, mode, buffering=0), self)
            finally:
                self._within -= 1

        return call

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        # A file without a name, as what git is given on its input, is nobody's.
        named = event == "open" and isinstance(arguments[2], int) and not os.path.isdir(arguments[0])
        writes = named and arguments[2] & _WRITES
        if (writes or event in _CHANGES) and not self._within:
            sys.stderr.write(f"not counted: {event} {arguments}\n")
            os._exit(_UNCOUNTED)


class _Torn:
    """A file of which each half may be the last that is written."""

    def __init__(self, file: Any, deadly: _Deadly) -> None:
        self._file, self._deadly = file, deadly

    def write(self, data: bytes) -> int:
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self._deadly.tick()
            self._file.write(part)
        return len(data)

    def __enter__(self) -> _Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def dies(action: Callable[[], object], at: int) -> bool:
    """Run it in a process that dies at its call of that number. False when it ended before."""
    child = os.fork()
    if not child:
        _live(action, at)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, _DIED), code
    return code == _DIED


def _live(action: Callable[[], object], at: int) -> NoReturn:
    try:
        _Deadly(at)
        action()
        os._exit(0)
    except BaseException as error:
        sys.stderr.write(f"{at}: {error!r}\n")
        os._exit(1)


def deaths(action: Callable[[], object], *, prepare: Callable[[], object], stride: int = 1) -> Iterator[int]:
    """After each of them, until it does not die any more."""
    for at in range(1, 10_000, stride):
        prepare()
        if not dies(action, at):
            return
        yield at
    raise AssertionError("it never ends")


def copy(of: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(of, to, symlinks=True)


# -- the journal ------------------------------------------------------------------------------------------------------

BEFORE = {name: f"{name} before" for name in ("a", "b", "c", "sub/deep/d", "becomes-folder", "becomes-file/x", "sub/e")}
AFTER = {
    **{"a": File(b"a after"), "b": File(b"b after", mode=0o755), "c": None, "sub/deep/d": None, "sub/e": File(b"e")},
    **{"new/er/f": File(b"f after"), "new/g": File(b"g after"), "becomes-folder": None},
    **{"becomes-folder/h": File(b"h"), "becomes-file/x": None, "becomes-file": File(b"file")},
    **{"link": File(b"b", link=True), "link2": File(b"a", link=True)},
}


def die_in_journal(folder: Path, stride: int) -> dict[str, int]:
    template, tree, state = folder / "template", folder / "tree", folder / "state"
    template.mkdir()
    put(template, {**BEFORE, "link": "-> a"})
    (template / "b").chmod(0o640)
    (template / "c").chmod(0o600)
    (template / "sub/deep").chmod(0o700)  # a folder that goes with its last file, and comes back

    def fresh() -> None:
        copy(template, tree)
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir()

    def before(opened: Tree, path: str) -> File | None:
        try:
            return opened.read(path)
        except InTheWay:
            return None

    def write() -> None:
        opened = Tree(tree)
        steps = [Step(path, before(opened, path), after) for path, after in AFTER.items()]
        Journal.begin(state / "task", opened, steps, about={}).write(opened, steps)

    def journal() -> Journal | None:
        return Journal.open(state / "task") if (state / "task").is_dir() else None

    def start_again() -> None:
        found = journal()
        if found is not None and not found.done:
            assert found.take_back(Tree(tree)) == []

    def take_back() -> None:
        found = journal()
        assert found is not None and found.take_back(Tree(tree)) == []

    def written() -> None:
        fresh()
        write()

    fresh()
    first = fingerprint(tree)
    write()
    last = fingerprint(tree)
    assert first != last
    take_back()
    assert fingerprint(tree) == first

    counts: dict[str, int] = {"writing": 0, "between": 0, "starting again": 0, "undoing": 0}
    for at in deaths(write, prepare=fresh):
        counts["writing"] += 1
        counts["between"] += fingerprint(tree) not in (first, last)
        if at % stride == 0:
            for name in ("tree", "state"):
                copy(folder / name, folder / "torn" / name)

            def torn() -> None:
                for name in ("tree", "state"):
                    copy(folder / "torn" / name, folder / name)

            for second in deaths(start_again, prepare=torn):
                counts["starting again"] += 1
                start_again()
                assert fingerprint(tree) in (first, last), (at, second)
            torn()
        start_again()
        found = journal()
        assert fingerprint(tree) == (last if found is not None and found.done else first), at
        assert (found is None) == (fingerprint(tree) == first), at
    for at in deaths(take_back, prepare=written):
        counts["undoing"] += 1
        start_again()
        if journal() is not None:
            assert fingerprint(tree) == last, at
            take_back()
        assert fingerprint(tree) == first, at
    return counts


# -- a whole apply ----------------------------------------------------------------------------------------------------


def die_in_apply(folder: Path, stride: int) -> dict[str, int]:
    shop = make_repository(folder / "shop", {"a": "a\n", "b": "b\n", "sub/c": "c\n", "l": "-> a"})
    workshop = Workshop(folder / "workshop", bundle_working_tree(shop, base_ref=None).bundle)
    result = workshop.result({"a": "A\n", "b": None, "sub": "a file\n", "new/x": "x\n", "l": "-> new"})
    put(shop, {"mine": "mine\n"})
    os.rename(shop, folder / "template")

    def fresh() -> None:
        copy(folder / "template", shop)
        shutil.rmtree(folder / "state", ignore_errors=True)

    def write() -> None:
        apply(shop, **result.given, state_folder=folder / "state")

    def take_back() -> None:
        undo(shop, task_id=result.task_id, state_folder=folder / "state")

    def written() -> None:
        fresh()
        write()

    fresh()
    first = files_of(shop)
    write()
    last = files_of(shop)
    assert first != last
    counts: dict[str, int] = {"applying": 0, "undoing": 0}
    for at in deaths(write, prepare=fresh, stride=stride):
        counts["applying"] += 1
        try:
            take_back()
        except NothingToUndo:
            pass
        assert files_of(shop) == first, at
        write()
        assert files_of(shop) == last, at
    for at in deaths(take_back, prepare=written, stride=stride):
        counts["undoing"] += 1
        try:
            write()
        except AlreadyApplied:
            pass
        assert files_of(shop) == last, at
        take_back()
        assert files_of(shop) == first, at
    return counts


if __name__ == "__main__":
    what, where, every = sys.argv[1:]
    print(json.dumps({"journal": die_in_journal, "apply": die_in_apply}[what](Path(where), int(every))))
