"""A task's result comes home: into a working tree on the user's own machine, all of it or nothing.

policy.py    which changes are written at all, and which only when the user names them
plan.py      what is to be done to each file
layers.py    results on top of each other
tree.py      files of a working tree, without a way out of it
journal.py   originals on the disk before the first write
"""

from __future__ import annotations

import errno
import hashlib
import re
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from cloudagent_mcp.apply.journal import Journal, Step, recognised
from cloudagent_mcp.apply.layers import Layers
from cloudagent_mcp.apply.plan import make_plan
from cloudagent_mcp.apply.policy import check_changes, is_notable, is_sensitive, listed
from cloudagent_mcp.apply.tree import Changed, InTheWay, Tree
from cloudagent_queue import git
from cloudagent_queue.repository import ChangedFile, LocalRepository, Quarantine, check_ref, origin_of
from cloudagent_storage.errors import (
    AlreadyApplied,
    ApplyConflict,
    Busy,
    ConfirmationNeeded,
    NoChanges,
    NothingToUndo,
    RepositoryNotFound,
    TargetNotAllowed,
    TaskNotFound,
)
from cloudagent_storage.records import ID_LENGTH, Record, short_id

__all__ = ["AppliedFile", "ApplyOutcome", "apply", "undo"]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_TASK_ID = re.compile(rf"task_[a-z2-7]{{{ID_LENGTH}}}")


class AppliedFile(Record):
    """One file of a result."""

    path: str
    change: Literal["added", "modified", "deleted", "renamed"]
    sensitive: bool = False
    """Worth a look, since it can make a machine execute things. Some need to be named before they are written."""


class ApplyOutcome(Record):
    """What was done to a working tree, or would be."""

    outcome: Literal["applied", "would_apply", "undone"]
    files: tuple[AppliedFile, ...]
    backup_ref: str | None = None
    """A commit of everything that was in the working tree before."""
    branch: str | None = None
    """The local branch that the result is on as well, to be looked at or merged."""
    message: str


def apply(
    directory: Path,
    *,
    task_id: str,
    branch: str,
    base_sha: str,
    input_bundle: bytes | None,
    result_bundle: bytes,
    state_folder: Path,
    dry_run: bool = False,
    allow_sensitive: Sequence[str] = (),
) -> ApplyOutcome:
    """Write a result into the working tree that `directory` lies in. Only files are written: no commit, no index.

    Without `input_bundle` the task had no repository, and any working tree will do, or a folder without one; an empty
    or new folder becomes a repository. Where the user has committed changes to the same files meanwhile, both are
    merged. `state_folder` keeps what `undo` needs. With `dry_run` nothing is written.

    Raises `TargetNotAllowed`, `UnsafeChange`, `ConfirmationNeeded`, `ApplyConflict`, `AlreadyApplied`, `Busy`; in each
    case the working tree is as it was.
    """
    check_ref(branch)
    fingerprint = hashlib.sha256(result_bundle).hexdigest()
    with _Target.locked(directory, task_id, state_folder, may_be_new=input_bundle is None) as target:
        if target.holds(fingerprint):
            raise AlreadyApplied()
        with Quarantine.holding(input_bundle, base_sha, result_bundle, branch, strict=False) as quarantine:
            if input_bundle is not None:
                target.check_holds_base(quarantine)
            changes = quarantine.changed_files(renames=False, lines=False)
            if not changes:
                raise NoChanges()
            check_changes(quarantine, changes)
            steps = make_plan(quarantine, changes, target.tree, target.repository, target.earlier())
            if not steps:
                raise AlreadyApplied()
            files = _files_of(quarantine, changes)
            missing = sorted({s.path for s in steps if is_sensitive(s.path)} - set(allow_sensitive))
            if dry_run:
                message = f"{_count(files)} would be written."
                if missing:
                    message += f" These need to be named in allow_sensitive: {listed(missing)}."
                return ApplyOutcome(outcome="would_apply", files=files, message=message)
            if missing:
                refusal = ConfirmationNeeded(
                    f"These files can make a machine execute things: {listed(missing)}. Nothing was written."
                )
                refusal.files = tuple(missing)
                raise refusal
            return target.write(quarantine, branch, steps, files, fingerprint)


def undo(directory: Path, *, task_id: str, state_folder: Path) -> ApplyOutcome:
    """Take an applied result back: every file of it is again what it was, byte for byte.

    Raises `NothingToUndo`, and `ApplyConflict`, naming them, when files were changed since; then nothing is written.
    """
    with _Target.locked(directory, task_id, state_folder, may_be_new=False) as target:
        journal = target.journal()
        if journal is None or target.tree is None:
            raise NothingToUndo()
        if changed := journal.differing(target.tree):
            raise ApplyConflict(
                f"Changed since the result was applied: {listed(changed)}. Nothing was written.",
                remedy="Undo those changes first, or take what you need from the backup ref.",
            )
        files = tuple(AppliedFile(**file) for file in journal.about["files"])
        backup_ref, branch = journal.about["backup_ref"], journal.about["branch"]
        try:
            changed = journal.take_back(target.tree)
        except OSError as error:
            raise _cannot_write(error) from error
        if changed:
            raise ApplyConflict(f"Changed in this very moment, and left alone: {listed(changed)}.")
        message = f"{_count(files)} put back as before."
        return ApplyOutcome(outcome="undone", files=files, backup_ref=backup_ref, branch=branch, message=message)


class _Target:
    """The folder that a result goes to, while nobody else applies anything to it."""

    def __init__(self, top: Path, repository: LocalRepository | None, task_id: str, state: Path) -> None:
        self.top = top
        self.repository = repository
        self.tree = Tree(top) if top.is_dir() else None
        self._task_id = task_id
        self._state = state

    @classmethod
    @contextmanager
    def locked(cls, directory: Path, task_id: str, state_folder: Path, *, may_be_new: bool) -> Generator[_Target]:
        """Find the working tree, lock it, and take back what an interrupted apply left half done."""
        if not _TASK_ID.fullmatch(task_id):
            raise TaskNotFound()
        top, repository = _find(directory, may_be_new=may_be_new)
        state = state_folder / hashlib.sha256(str(top).encode("utf-8", "surrogateescape")).hexdigest()[:32]
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with FileLock(state / "lock", timeout=0):
                target = cls(top, repository, task_id, state)
                try:
                    target._finish_interrupted()
                    yield target
                finally:
                    if target.tree is not None:
                        target.tree.close()
        except Timeout:
            raise Busy() from None

    def journal(self) -> Journal | None:
        """The record of this task's apply, when it was applied here."""
        folder = self._state / self._task_id
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

    def earlier(self) -> Layers:
        """What other results have made of this folder."""
        folders = (entry for entry in self._state.iterdir() if _TASK_ID.fullmatch(entry.name))
        journals = [Journal.open(folder) for folder in sorted(folders) if folder.name != self._task_id]
        return Layers([journal for journal in journals if journal is not None])

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

    def write(
        self,
        quarantine: Quarantine,
        branch: str,
        steps: Sequence[Step],
        files: tuple[AppliedFile, ...],
        fingerprint: str,
    ) -> ApplyOutcome:
        """Make the backup, then write, and take everything back when that fails."""
        try:
            self._prepare(steps)
            backup_ref = self._backup()
            kept_branch = self._keep_branch(quarantine, branch)
        except (OSError, git.GitFailed) as error:
            raise _cannot_write(error) from error
        assert self.tree is not None
        about = {
            "files": [file.model_dump() for file in files],
            "backup_ref": backup_ref,
            "branch": kept_branch,
            "fingerprint": fingerprint,
        }
        left: list[str] = []
        try:
            journal = Journal.begin(self._state / self._task_id, self.tree, steps, about=about)
            try:
                journal.write(self.tree, steps)
            except BaseException:
                left = journal.take_back(self.tree)
                raise
        except (Changed, InTheWay) as error:
            changed = sorted({error.path, *left})
            raise ApplyConflict(
                f"Changed in this very moment, and left alone: {listed(changed)}. All else is as it was.",
                remedy=f"Look at these files; {backup_ref} has them as they were before." if backup_ref else None,
            ) from None
        except OSError as error:
            raise _cannot_write(error) from error
        message = f"{_count(files)} written. `ca task undo {self._task_id}` takes it back."
        if self.repository is not None and kept_branch is None:
            message += " A branch of the result's name exists already and was left alone."
        return ApplyOutcome(outcome="applied", files=files, backup_ref=backup_ref, branch=kept_branch, message=message)

    def _finish_interrupted(self) -> None:
        for folder in [entry for entry in self._state.iterdir() if _TASK_ID.fullmatch(entry.name)]:
            journal = Journal.open(folder)
            if journal is not None and not journal.done and self.tree is not None:
                try:
                    journal.take_back(self.tree)
                except OSError as error:
                    raise _cannot_write(error) from error

    def _prepare(self, steps: Sequence[Step]) -> None:
        """Make the folder if it is new, and a repository if it is empty."""
        if self.tree is None:
            self.top.mkdir()
            self.tree = Tree(self.top)
        for folder in {step.path.rpartition("/")[0] for step in steps}:
            if not self.tree.may_write(folder):
                raise TargetNotAllowed("The directory may not be written to.", remedy="Check its permissions.")
        if self.repository is None and not self.tree.names(""):
            git.run("init", "--quiet", "--initial-branch=main", folder=self.top)
            self.repository = LocalRepository.find(self.top)

    def _backup(self) -> str | None:
        """A commit of all that is in the working tree and not ignored, under a ref that no branch knows of."""
        if self.repository is None:
            return None
        with tempfile.TemporaryDirectory(prefix="cloudagent-backup-") as temporary:
            nested = [path for path in self.repository.untracked() if path.endswith("/")]
            tree = self.repository.snapshot(Path(temporary), leave_out=nested)
        head = self.repository.commit("HEAD")
        parent = [] if head is None else ["-p", head]
        message = f"The working tree before {self._task_id} was applied\n"
        now = f"@{int(time.time())} +0000"
        env = {**git.AUTHOR, "GIT_AUTHOR_DATE": now, "GIT_COMMITTER_DATE": now}
        commit = self.repository.run("commit-tree", tree, *parent, stdin=message.encode(), env=env).text
        prefix = f"refs/cloudagent/backup/{short_id(self._task_id)}"
        taken = self.repository.run("for-each-ref", "--format=%(refname)", "refs/cloudagent/backup").text.splitlines()
        number = next(n for n in range(1, len(taken) + 2) if f"{prefix}-{n}" not in taken)
        self.repository.run("update-ref", f"{prefix}-{number}", commit, "")
        return f"{prefix}-{number}"

    def _keep_branch(self, quarantine: Quarantine, branch: str) -> str | None:
        """Have the result as a local branch, too. None where a branch of that name is the user's own by now."""
        if self.repository is None:
            return None
        arriving = f"refs/cloudagent/result/{short_id(self._task_id)}"
        options = ["--quiet", "--no-tags", "--no-write-fetch-head", "--no-recurse-submodules", "--no-auto-maintenance"]
        refspec = f"+refs/heads/{branch}:{arriving}"
        self.repository.run("fetch", *options, "--", str(quarantine.folder), refspec, protocols=["file"])
        self.repository.run("update-ref", f"refs/heads/{branch}", quarantine.head, "", ok=(0, 1, 128))
        if self.repository.commit(f"refs/heads/{branch}") != quarantine.head:
            return None
        self.repository.run("update-ref", "-d", arriving)
        return branch


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


def _files_of(quarantine: Quarantine, changes: Sequence[ChangedFile]) -> tuple[AppliedFile, ...]:
    sensitive = {file.path for file in changes if is_sensitive(file.path) or is_notable(file)}
    return tuple(
        AppliedFile.model_validate(
            {"path": file.path, "change": file.status, "sensitive": bool({file.path, file.old_path} & sensitive)}
        )
        for file in quarantine.changed_files(renames=True)
    )


def _count(files: Sequence[Any]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files)} files"


def _cannot_write(error: OSError | git.GitFailed) -> TargetNotAllowed:
    if isinstance(error, OSError) and error.errno in _FULL:
        return TargetNotAllowed("The disk is full; the working tree is as it was.", remedy="Free some space.")
    return TargetNotAllowed("The directory may not be written to; it is as it was.", remedy="Check its permissions.")
