"""The folder that a result goes to, while nobody else applies anything to it.

STATE_FOLDER/<directory>/lock                   held while something is applied to that directory, or taken back
STATE_FOLDER/<directory>/unfinished             which directory it is, while something is half done
STATE_FOLDER/<directory>/<task>/                what was done to its files (journal.py)
STATE_FOLDER/<directory>/<task>.<place>/        which branch and worktree were made (place.py)
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cloudagent_mcp.apply.journal import Journal, keep, recognised
from cloudagent_mcp.apply.layers import Layers, beneath
from cloudagent_mcp.apply.tree import InTheWay, Tree
from cloudagent_queue import git
from cloudagent_queue.repository import LocalRepository, Quarantine, origin_of
from cloudagent_storage.errors import Busy, RepositoryNotFound, TargetNotAllowed, TaskNotFound
from cloudagent_storage.records import ID_LENGTH

MARK = "unfinished"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_TASK_ID = re.compile(rf"task_[a-z2-7]{{{ID_LENGTH}}}")


class Target:
    """A directory, its repository, and what is recorded of what was done to it."""

    def __init__(self, top: Path, repository: LocalRepository | None, task_id: str, state: Path) -> None:
        self.top = top
        self.repository = repository
        self.tree = Tree(top) if top.is_dir() else None
        self.task_id = task_id
        self.state = state

    @classmethod
    @contextmanager
    def locked(cls, directory: Path, task_id: str, state_folder: Path, *, may_be_new: bool) -> Generator[Target]:
        """Find the working tree and lock it. Raises `TargetNotAllowed`, `TaskNotFound` and `Busy`."""
        if not _TASK_ID.fullmatch(task_id):
            raise TaskNotFound()
        top, repository = _find(directory, may_be_new=may_be_new)
        state = state_folder / hashlib.sha256(str(top).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with cls._holding(top, repository, task_id, state) as target:
            yield target

    @classmethod
    @contextmanager
    def marked(cls, state: Path) -> Generator[Target | None]:
        """The directory in which something was left half done, locked. None where it is gone, or is another one by
        now. Raises `Busy` while somebody is at work there."""
        about = json.loads((state / MARK).read_bytes())
        top = Path(about["directory"])
        try:
            same = top.lstat().st_ino == about["inode"] and top.resolve() == top
            found, repository = _find(top, may_be_new=False) if same else (None, None)
        except (OSError, RuntimeError, TargetNotAllowed):
            found, repository = None, None
        if found != top:
            yield None
            return
        with cls._holding(top, repository, "", state) as target:
            yield target

    @classmethod
    @contextmanager
    def _holding(cls, top: Path, repository: LocalRepository | None, task_id: str, state: Path) -> Generator[Target]:
        try:
            with FileLock(state / "lock", timeout=0):
                target = cls(top, repository, task_id, state)
                try:
                    yield target
                finally:
                    if target.tree is not None:
                        target.tree.close()
        except Timeout:
            raise Busy() from None

    def journals(self) -> list[Journal]:
        """What was done to the files here, by any task."""
        folders = [entry for entry in self.state.iterdir() if _TASK_ID.fullmatch(entry.name)]
        return [journal for folder in folders if (journal := Journal.open(folder)) is not None]

    def journal(self) -> Journal | None:
        """The record of this task's apply to the files, when it was applied here."""
        folder = self.state / self.task_id
        return Journal.open(folder) if folder.is_dir() else None

    def holds(self, fingerprint: str) -> bool:
        """Was this very result applied here, and is it all still here?"""
        journal = self.journal()
        if journal is None or self.tree is None or journal.about["fingerprint"] != fingerprint:
            return False
        earlier, changes = self.earlier(), journal.changes()
        try:
            now = {path: recognised(self.tree.read(path)) for path in journal.differing(self.tree)}
        except InTheWay:
            return False
        return all(earlier.covers(path, changes[path][1], found) for path, found in now.items())

    def earlier(self, goes_on_from: Sequence[str] = ()) -> Layers:
        """What other results have made of this folder; those of the tasks that this one goes on from, the last first,
        are replaced by its own."""
        folders = (entry for entry in self.state.iterdir() if _TASK_ID.fullmatch(entry.name))
        found = {folder.name: Journal.open(folder) for folder in sorted(folders) if folder.name != self.task_id}
        journals = {name: journal for name, journal in found.items() if journal is not None}
        replaced = [journals[name] for name in goes_on_from if name in journals]
        return Layers([*journals.values()], beneath(self.tree, replaced) if self.tree is not None else {})

    def check_holds_base(self, quarantine: Quarantine) -> None:
        """Is this the repository that the task started from?"""
        origin = origin_of(quarantine.run("show", "--no-patch", "--format=%B", quarantine.base).text)
        if self.repository is None:
            raise TargetNotAllowed("The directory lies in no git repository.")
        if not any(self.repository.commit(name) for name in (quarantine.base, origin) if name):
            raise TargetNotAllowed(
                "This repository does not hold the commit that the task started from.",
                remedy="Pass the repository that the task is about; if it is this one, `git fetch` first.",
            )

    @contextmanager
    def half_done(self) -> Generator[None]:
        """While something is: whoever dies in it leaves a mark by which the next start finds this directory."""
        keep(self.state / MARK, {"directory": str(self.top), "inode": self.top.lstat().st_ino})
        yield
        self.settled()

    def settled(self) -> None:
        """Nothing is half done here."""
        (self.state / MARK).unlink(missing_ok=True)


def cannot_write(error: OSError | git.GitFailed) -> TargetNotAllowed:
    """What to say of it."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return TargetNotAllowed("The disk is full; the working tree is as it was.", remedy="Free some space.")
    return TargetNotAllowed("The directory may not be written to; it is as it was.", remedy="Check its permissions.")


def _find(directory: Path, *, may_be_new: bool) -> tuple[Path, LocalRepository | None]:
    """The working tree that a directory lies in, or, without a repository, the directory itself."""
    try:
        directory = directory.resolve()
    except (OSError, RuntimeError):
        raise TargetNotAllowed() from None
    if any(part.lower() == ".git" for part in directory.parts):
        raise TargetNotAllowed("The directory lies in git's own folder.")
    if not directory.is_dir() and not (may_be_new and directory.parent.is_dir() and not directory.exists()):
        raise TargetNotAllowed("There is no such directory.")
    repository: LocalRepository | None = None
    try:
        repository = LocalRepository.find(directory if directory.is_dir() else directory.parent)
    except RepositoryNotFound as error:
        if any((folder / ".git").exists() for folder in (directory, *directory.parents)):
            raise TargetNotAllowed(error.message, remedy=error.remedy) from None
    if repository is not None and not directory.is_dir():
        raise TargetNotAllowed("There is no such directory.")
    top = directory if repository is None else repository.top.resolve()
    if repository is not None and repository.bare:
        raise TargetNotAllowed("A bare repository has no working tree.")
    if top in (Path("/"), Path.home().resolve()):
        raise TargetNotAllowed("The root of the file system and a home folder are no targets.")
    return top, repository
