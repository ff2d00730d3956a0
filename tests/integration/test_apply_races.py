"""Somebody swaps folders and files of the tree for symlinks while results are written: nothing is ever followed."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cloudagent_mcp.apply.journal import Journal, Step
from cloudagent_mcp.apply.tree import Changed, File, InTheWay, Tree
from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.errors import CloudAgentError
from tests.support.git_repos import Result, Workshop, commit, fingerprint, put
from tests.support.premises import Premises

AT_FDCWD, RENAME_EXCHANGE = -100, 2
LIBC = ctypes.CDLL(None, use_errno=True)
NAMES = [f"race/{n}.txt" for n in range(12)]


def exchange(one: Path, other: Path) -> None:
    """Two names change places at once."""
    if LIBC.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) != 0:
        raise OSError(ctypes.get_errno(), "cannot be exchanged")


@pytest.fixture
def premises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Premises:
    """With a folder `race` that has a twin outside, and traps of symlinks beside the repository."""
    made = Premises.build(tmp_path)
    made.live_in(monkeypatch)
    commit(made.shop, {**dict.fromkeys(NAMES, "before\n"), "race/deep/x": "before\n"})
    put(made.around, {f"outside/{name}": "before\n" for name in (*NAMES, "race/deep/x")})
    put(made.around, {f"outside/{name.removeprefix('race/')}": "before\n" for name in (*NAMES, "race/deep/x")})
    put(made.around, {"trap": "-> outside", "file trap": "-> outside/1.txt"})
    return made


@pytest.fixture
def result(premises: Premises) -> Result:
    bundle = bundle_working_tree(premises.shop, base_ref="main").bundle
    return Workshop(premises.folder / "workshop2", bundle).result(
        {
            **dict.fromkeys(NAMES, "after\n"),
            "race/0.txt": None,
            "race/new.txt": "after\n",
            "race/new/er.txt": "after\n",
            "race/link": "-> 1.txt",
            "race/deep/x": None,
        }
    )


@contextmanager
def swapping(*pairs: tuple[Path, Path]) -> Generator[Callable[[], int]]:
    """As fast as can be, in a thread. Tells how often until now."""
    stop = threading.Event()
    swaps = 0

    def swap() -> None:
        nonlocal swaps
        while not stop.is_set():
            for one, other in pairs:
                exchange(one, other)
            swaps += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield lambda: swaps
    finally:
        stop.set()
        thread.join()


def test_what_is_swapped_as_fast_as_can_be_is_never_followed(premises: Premises, result: Result) -> None:
    outside = fingerprint(premises.around / "outside")
    pairs = (premises.shop / "race", premises.around / "trap"), (premises.shop / "a.txt", premises.around / "file trap")
    tries = 0
    deadline = time.monotonic() + 60
    with swapping(*pairs) as swaps:
        while (tries < 16 or swaps() < 1000) and time.monotonic() < deadline:
            for action in (premises.apply, premises.undo):
                try:
                    action(result)
                except CloudAgentError as refused:
                    assert refused.code != "internal"
                assert fingerprint(premises.around / "outside") == outside
            tries += 1
        assert tries >= 16 and swaps() >= 1000


def test_no_single_step_follows_what_is_swapped(premises: Premises) -> None:
    outside = fingerprint(premises.around / "outside")
    tree = Tree(premises.shop)
    done = refused = 0
    deadline = time.monotonic() + 30
    with swapping((premises.shop / "race", premises.around / "trap")):
        while (done < 150 or refused < 150) and time.monotonic() < deadline:
            for path, file in (("race/new", File(b"evil")), ("race/1.txt", File(b"evil")), ("race/1.txt", None)):
                try:
                    tree.make_folder("race/folder")
                    tree.remove_folder("race/folder")
                    tree.replace(path, file, expected=tree.read(path), temporary="temporary")
                    done += 1
                except (InTheWay, Changed):
                    refused += 1
    tree.close()
    assert fingerprint(premises.around / "outside") == outside
    assert done >= 150 and refused >= 150


# -- before each single call ------------------------------------------------------------------------------------------


CALLS = ("open", "stat", "readlink", "rename", "unlink", "mkdir", "rmdir", "symlink", "link", "chown", "listdir")
"""All with which tree.py reaches for a name."""
BEFORE = {"race/0": "0\n", "race/1": "1\n", "race/deep/2": "2\n", "race/l": "-> 1", "kind": "kind\n"}
AFTER = {
    **{"race/0": None, "race/1": File(b"evil"), "race/deep/2": None, "race/l": File(b"deep", link=True), "kind": None},
    **{"race/new": File(b"evil"), "race/fresh/new": File(b"evil"), "kind/new": File(b"evil")},
}
SWAPPED = {"a folder": ("race", "trap"), "a file": ("race/1", "file trap"), "a folder below": ("race/deep", "trap")}


class Place:
    """A tree, its journal, and what lies outside, whose names are those of the tree."""

    def __init__(self, folder: Path, swapped: str) -> None:
        folder.mkdir(parents=True)
        self.top, self.outside, self._state = folder / "tree", folder / "outside", folder / "state"
        self.top.mkdir()
        put(self.top, BEFORE)
        put(folder, {f"outside/{name}": "mine\n" for name in ("0", "1", "2", "l", "new", "deep/2", "fresh/new")})
        put(folder, {"trap": "-> outside", "file trap": "-> outside/1"})
        inside, trap = SWAPPED[swapped]
        self._places = self.top / inside, folder / trap
        self.swapped = False
        self.before, self._mine = fingerprint(self.top), fingerprint(self.outside)
        self._tree = Tree(self.top)
        self.journal: Journal | None = None

    def swap(self) -> None:
        """Once more, if it is still there to be swapped."""
        with suppress(FileNotFoundError):
            exchange(*self._places)
            self.swapped = not self.swapped

    def write(self) -> None:
        steps = [Step(path, self._read(path), after) for path, after in AFTER.items()]
        self.journal = Journal.begin(self._state / "task", self._tree, steps, about={})
        self.journal.write(self._tree, steps)

    def take_back(self) -> list[str]:
        return [] if self.journal is None else self.journal.take_back(self._tree)

    def close(self) -> None:
        self._tree.close()
        assert fingerprint(self.outside) == self._mine

    def differing(self) -> set[str]:
        """What is not as before, but for empty folders that were left behind where nobody could see them."""
        for folder in ("race/fresh", "kind"):
            with suppress(OSError):
                (self.top / folder).rmdir()
        now = fingerprint(self.top)
        return {path for path in self.before.keys() | now.keys() if self.before.get(path) != now.get(path)}

    def _read(self, path: str) -> File | None:
        try:
            return self._tree.read(path)
        except InTheWay:
            return None


class At:
    """Swaps right before the call of that number with which a tree is read or written, and back before the next."""

    def __init__(self, number: int, place: Place, patch: pytest.MonkeyPatch, *, back: bool) -> None:
        self.calls = 0
        self._swap = place.swap
        self._at = (number, number + 1) if back else (number,)
        for name in CALLS:
            patch.setattr(os, name, self._before(getattr(os, name)))

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            # The other calls here are those of the journal's own files.
            if {"dir_fd", "src_dir_fd"} & options.keys() or (arguments[:1] and isinstance(arguments[0], int)):
                self.calls += 1
                if self.calls in self._at:
                    self._swap()
            return function(*arguments, **options)

        return call


@pytest.mark.parametrize("back", [False, True], ids=["and stays", "and is swapped back"])
@pytest.mark.parametrize("what", SWAPPED)
@pytest.mark.parametrize("undo", [False, True], ids=["writing", "undoing"])
def test_whatever_is_swapped_before_whichever_call_nothing_is_followed(
    undo: bool, what: str, back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of what cannot be put back, nothing is kept silent."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # thousands of fsyncs
    stopped = whole = 0
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        for number in range(1, 1000):
            place = Place(Path(folder) / str(number), what)
            said: list[str] = []
            if undo:
                place.write()
            with monkeypatch.context() as patch:
                at = At(number, place, patch, back=back)
                try:
                    if undo:
                        said = place.take_back()
                    else:
                        place.write()
                    failed = False
                except (Changed, InTheWay, OSError):
                    failed = True
            if failed:
                stopped += 1
                said = place.take_back()
            over = at.calls < number
            if place.swapped:
                place.swap()
            # What was swapped is in its place again, and whoever did so has had it in their hands.
            touched = {SWAPPED[what][0], *(str(above) for path in said for above in Path(path).parents)}
            if failed or undo:
                assert place.differing() <= {*said, *touched}, number
            whole += not said and not failed
            place.close()
            shutil.rmtree(Path(folder) / str(number))
            if over:
                break
        else:
            raise AssertionError("it never ends")
    assert number > 50 and whole > 5
    assert undo or stopped > 1 or what == "a file"


def after(first: Callable[[], object], then: Callable[..., None], *arguments: Any, **options: Any) -> None:
    first()
    then(*arguments, **options)


def test_a_file_that_appears_in_the_last_moment_is_not_written_over(premises: Premises, result: Result) -> None:
    before = premises.tree()
    for name in ("race/new.txt", "race/new/er.txt", "race/link"):
        mine = premises.shop / name

        def save(mine: Path = mine) -> None:
            if mine.parent.is_dir() and not os.path.lexists(mine):
                mine.write_text("mine\n")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "link", partial(after, save, os.link))
            with pytest.raises(CloudAgentError, match=re.escape(name)) as refused:
                premises.apply(result)
        assert refused.value.code == "conflict"
        assert mine.read_text() == "mine\n"
        mine.unlink()
        shutil.rmtree(premises.shop / "race/new", ignore_errors=True)
        assert premises.tree() == before


def test_what_was_swapped_away_before_it_could_be_put_back_is_named(premises: Premises, result: Result) -> None:
    before = premises.tree()
    swap = partial(exchange, premises.shop / "race", premises.around / "trap")
    swaps = iter([swap])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", partial(after, lambda: next(swaps, int)(), os.link))
        with pytest.raises(CloudAgentError) as refused:
            premises.apply(result)
    swap()
    now = premises.tree()
    changed = {path for path in before if path.count("/") == 1 and before[path] != now.get(path) and path in NAMES}
    assert refused.value.code == "conflict" and len(changed) > 5
    assert all(path in refused.value.message for path in changed)


@pytest.mark.parametrize("becomes", ["symlink", "fifo", "folder", "device"])
def test_a_file_that_becomes_something_else_between_look_and_reading_is_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    file, real = tmp_path / "tree/file", os.stat
    put(tmp_path, {"tree/file": "same\n", "outside": "same\n"})

    def stat_and_swap(*arguments: Any, **options: Any) -> os.stat_result:
        found = real(*arguments, **options)
        if "dir_fd" in options:
            file.unlink()
            match becomes:
                case "symlink":
                    file.symlink_to("../outside")
                case "fifo":
                    os.mkfifo(file)
                case "folder":
                    file.mkdir()
                case _:
                    file.symlink_to("/dev/zero")
        return found

    tree = Tree(tmp_path / "tree")
    monkeypatch.setattr(os, "stat", stat_and_swap)
    with pytest.raises(InTheWay):
        tree.read("file")
    tree.close()


def test_what_has_the_name_of_a_temporary_file_is_not_written_to(tmp_path: Path) -> None:
    put(tmp_path, {"tree/file": "before\n", "tree/link": "-> ../outside", "tree/mine": "mine\n", "outside": "mine\n"})
    tree = Tree(tmp_path / "tree")
    for temporary in ("link", "mine"):
        with pytest.raises(FileExistsError):
            tree.replace("file", File(b"evil"), expected=tree.read("file"), temporary=temporary)
        assert (tmp_path / "outside").read_text() == "mine\n" and (tmp_path / "tree/file").read_text() == "before\n"
    assert (tmp_path / "tree/mine").read_text() == "mine\n"
    tree.close()


def noted(names: list[Any], then: Callable[..., Any], name: Any, *arguments: Any, **options: Any) -> Any:
    names.append(name)
    return then(name, *arguments, **options)


def test_a_step_that_fails_leaves_no_temporary_file_and_opens_nothing_but_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {"file": "before\n"})
    os.mkfifo(tmp_path / "fifo")
    tree = Tree(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(Changed):
        tree.replace("file", File(b"after"), expected=File(b"other"), temporary="temporary")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(os, "fsync", full)
        tree.replace("file", File(b"after"), expected=tree.read("file"), temporary="temporary")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "file"]
    opened: list[Any] = []
    monkeypatch.setattr(os, "open", partial(noted, opened, os.open))
    with pytest.raises(InTheWay):
        tree.read("fifo")
    assert "fifo" not in opened, "who waits at its other end, or a device, would notice"
    tree.close()
