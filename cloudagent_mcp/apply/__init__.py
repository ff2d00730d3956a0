"""A task's result comes home: into a repository on the user's own machine, all of it or nothing.

policy.py    which changes are written at all, and which only when the user names them
preview.py   what would be done, in numbers and dangers, and the token that binds it
outcome.py   what an apply is asked for, and what it answers
target.py    the directory, locked, and what is recorded of it
plan.py      what is to be done to each file of a working tree
layers.py    results on top of each other
tree.py      files of a working tree, without a way out of it
journal.py   originals on the disk before the first write
files.py     a result as files of a working tree
commits.py   which commits a branch gets
place.py     a result as a branch, or as a worktree on one
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cloudagent_mcp.apply import files as as_files
from cloudagent_mcp.apply import place as as_place
from cloudagent_mcp.apply.commits import Commits, check_history, make_commits
from cloudagent_mcp.apply.journal import Step
from cloudagent_mcp.apply.outcome import FILES, AppliedFile, ApplyOutcome, Danger, Destination, Onto, Totals
from cloudagent_mcp.apply.plan import make_plan
from cloudagent_mcp.apply.policy import check_changes, is_sensitive, listed
from cloudagent_mcp.apply.preview import dangers_of, files_of, token_of, totals_of, why_sensitive
from cloudagent_mcp.apply.target import MARK, Target
from cloudagent_queue.repository import ChangedFile, Quarantine, check_ref
from cloudagent_storage.errors import (
    AlreadyApplied,
    ApplyConflict,
    Busy,
    CloudAgentError,
    ConfirmationNeeded,
    InvalidInput,
    NoChanges,
    NothingToUndo,
    PreviewOutdated,
    TargetExists,
    UnsafeChange,
)

__all__ = [
    "AppliedFile",
    "ApplyOutcome",
    "Danger",
    "Destination",
    "Onto",
    "Totals",
    "apply",
    "take_back_interrupted",
    "undo",
]

log = logging.getLogger(__name__)


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
    destination: Destination = FILES,
    preview: str | None = None,
    goes_on_from: Sequence[str] = (),
) -> ApplyOutcome:
    """Bring a result into the repository that `directory` lies in: to its files, as a branch, or as a worktree.

    As files there is no commit, and the index stays; where the user has committed changes to the same files meanwhile,
    both are merged. Without `input_bundle` the task had no repository, and any working tree will do, or a folder
    without one; an empty or new folder becomes a repository. As a branch or worktree, the working tree is not touched.
    `state_folder` keeps what `undo` needs. `goes_on_from` are tasks whose results this one has within it, the last one
    first: where they are applied as files, this one takes their place.

    With `dry_run` nothing is written, and the answer has a token. With such a token as `preview` exactly what was shown
    is written, or nothing.

    Raises errors under `ApplyRefused`, `AlreadyApplied`, `NoChanges`, `Busy`, and `InvalidInput` for a destination that
    contradicts itself; in each case all is as it was.
    """
    check_ref(branch)
    _check_destination(destination)
    fingerprint = hashlib.sha256(result_bundle).hexdigest()
    may_be_new = input_bundle is None and destination.onto == "files"
    with _opened(directory, task_id, state_folder, may_be_new=may_be_new) as target:
        if destination.onto == "files" and target.holds(fingerprint):
            raise AlreadyApplied()
        with Quarantine.holding(input_bundle, base_sha, result_bundle, branch, strict=False) as quarantine:
            if input_bundle is not None:
                target.check_holds_base(quarantine)
            changes = quarantine.changed_files(renames=False, lines=False)
            if not changes:
                raise NoChanges()
            check_changes(quarantine, changes)
            try:
                plan = _plan(target, quarantine, changes, branch, destination, fingerprint, goes_on_from)
            except (ApplyConflict, TargetExists) as refusal:
                if preview is None:
                    raise
                raise PreviewOutdated(files=refusal.files) from refusal
            token = token_of(
                task_id=task_id,
                top=target.top,
                onto=destination.onto,
                fingerprint=fingerprint,
                steps=plan.steps,
                bound=plan.bound,
            )
            missing = sorted(plan.sensitive - set(allow_sensitive))
            if dry_run:
                return plan.outcome(
                    "would_apply",
                    f"{_count(plan.files)} would be written{plan.where}.{plan.note}"
                    + (f" These need to be named in allow_sensitive: {listed(missing)}." if missing else ""),
                    preview=token,
                )
            if preview is not None and preview != token:
                raise PreviewOutdated(files=[(path, "is part of what would be done now") for path in plan.written])
            if missing:
                raise _confirmation(missing, plan.dangers)
            return plan.carry_out(fingerprint)


def undo(directory: Path, *, task_id: str, state_folder: Path, destination: Destination | None = None) -> ApplyOutcome:
    """Take an applied result back: what was done last, or what was done to that destination.

    Every file is again what it was, byte for byte; a branch or worktree that was made is no more. Raises
    `NothingToUndo`, and `ApplyConflict`, naming it, when something was changed since; then nothing is.
    """
    with _opened(directory, task_id, state_folder, may_be_new=False) as target:
        journal = target.journal()
        if target.tree is None:
            raise NothingToUndo()
        places = as_place.Made.all(target, task_id)
        if destination is not None:
            places = _named(target, places, destination)
            if destination.onto != "files" or places:
                journal = None
        if places and (journal is None or journal.about.get("at", 0.0) < places[-1].entry["at"]):
            made = places[-1]
            as_place.take_back(target, made)
            what = "worktree and its branch are" if made.path and made.entry["branch_made"] else f"{made.onto} is"
            return ApplyOutcome(
                outcome="undone",
                files=made.files,
                branch=made.branch,
                worktree=None if made.path is None else str(made.path),
                message=f"The {what} removed; no file of yours was touched.",
            )
        if journal is None:
            raise NothingToUndo()
        files = tuple(AppliedFile(**file) for file in journal.about["files"])
        backup_ref, branch = journal.about["backup_ref"], journal.about["branch"]
        as_files.take_back(target, journal)
        message = f"{_count(files)} put back as before."
        return ApplyOutcome(outcome="undone", files=files, backup_ref=backup_ref, branch=branch, message=message)


def take_back_interrupted(state_folder: Path) -> list[Path]:
    """Bring to an end what processes that died left half done, in whichever directory; these directories.

    One that is gone, or is another one by now, is left alone, and so is one in which somebody is at work. Raises
    nothing: what cannot be mended now stays as it is for the next time.
    """
    mended: list[Path] = []
    for mark in state_folder.glob(f"*/{MARK}"):
        try:
            with Target.marked(mark.parent) as target:
                if target is not None and _finish_interrupted(target):
                    mended.append(target.top)
        except Busy:
            continue
        except (CloudAgentError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("an apply that was interrupted could not be taken back: %s", type(error).__name__)
    return mended


@dataclass(frozen=True)
class _Plan:
    """What is to be done, and what is said of it."""

    target: Target
    quarantine: Quarantine
    destination: Destination
    files: tuple[AppliedFile, ...]
    dangers: tuple[Danger, ...]
    sensitive: frozenset[str]
    """Those that need to be named."""
    steps: tuple[Step, ...]
    branch: str
    path: Path | None
    commits: Commits | None
    note: str
    """What there is to know of it, in sentences."""

    @property
    def bound(self) -> tuple[str, ...]:
        """What of a branch a preview binds."""
        if self.destination.onto == "files" or self.commits is None:
            return ()
        return (self.branch, str(self.path), *self.commits.about)

    @property
    def written(self) -> list[str]:
        return [step.path for step in self.steps] or [file.path for file in self.files]

    @property
    def where(self) -> str:
        return {"files": "", "branch": f" to the branch {self.branch}", "worktree": " to a worktree"}[
            self.destination.onto
        ]

    def outcome(self, outcome: Literal["applied", "would_apply"], message: str, **more: Any) -> ApplyOutcome:
        return ApplyOutcome(
            outcome=outcome,
            files=self.files,
            totals=totals_of(self.files),
            dangers=self.dangers,
            message=message,
            **{"branch": None if self.destination.onto == "files" else self.branch, **more},
            worktree=None if self.path is None else str(self.path),
        )

    def carry_out(self, fingerprint: str) -> ApplyOutcome:
        target, quarantine, note = self.target, self.quarantine, self.note
        back = f"`ca task undo {target.task_id}` takes it back."
        if self.destination.onto == "files":
            backup_ref, kept = as_files.write(
                target, quarantine, self.branch, self.steps, self.files, fingerprint, self.commits
            )
            if target.repository is not None and kept is None and self.commits is not None:
                note += " A branch of the result's name exists already and was left alone."
            message = f"{_count(self.files)} written. {back}{note}"
            return self.outcome("applied", message, backup_ref=backup_ref, branch=kept)
        assert self.commits is not None
        as_place.make(target, quarantine, self.branch, self.path, self.commits, self.files, fingerprint)
        return self.outcome("applied", f"{_count(self.files)} written{self.where}.{note} {back}")


def _plan(
    target: Target,
    quarantine: Quarantine,
    changes: Sequence[ChangedFile],
    branch: str,
    destination: Destination,
    fingerprint: str,
    goes_on_from: Sequence[str],
) -> _Plan:
    """Raises what stands against it."""
    steps: list[Step] = []
    commits: Commits | None = None
    name, path, note = branch, None, ""
    sensitive = {file.path for file in changes if is_sensitive(file.path)}
    earlier: list[str] = []
    if destination.onto == "files":
        steps = make_plan(quarantine, changes, target.tree, target.repository, target.earlier(goes_on_from))
        if not steps:
            raise AlreadyApplied()
        sensitive &= {step.path for step in steps}
        try:
            if not check_history(quarantine):
                commits = make_commits(quarantine, target.repository, task_id=target.task_id)
        except UnsafeChange:
            pass
        if commits is None:
            note = " Its commits are not kept as a branch: not all of them could be checked out safely."
    else:
        earlier = [] if destination.squash else check_history(quarantine)
        sensitive |= set(earlier)
        name, path = as_place.name_of(destination, branch), as_place.path_of(target, destination)
        commits = make_commits(
            quarantine,
            target.repository,
            task_id=target.task_id,
            title=destination.title,
            squash=destination.squash,
        )
        as_place.check_free(target, name, path, commits, fingerprint)
        note = f" {_what_is_in(commits)}"
    files = files_of(quarantine, changes, merged=[step.path for step in steps if step.merged])
    return _Plan(
        target=target,
        quarantine=quarantine,
        destination=destination,
        files=files,
        dangers=dangers_of(quarantine, changes, binary={file.path for file in files if file.binary}, earlier=earlier),
        sensitive=frozenset(sensitive),
        steps=tuple(steps),
        branch=name,
        path=path,
        commits=commits,
        note=note,
    )


def _what_is_in(commits: Commits) -> str:
    count = "1 commit" if commits.count == 1 else f"{commits.count} commits"
    said = f"The branch is {count} on {commits.start[:12]}."
    if commits.holds_uncommitted:
        return (
            f"{said} Below, as a commit of its own, is what you had not committed when the task was submitted: "
            "the task changed the same lines."
        )
    if commits.left_out_uncommitted:
        return (
            f"{said} What you had not committed when the task was submitted is not in it, though the task was done on "
            "top of it."
        )
    return said


def _named(target: Target, places: list[as_place.Made], wanted: Destination) -> list[as_place.Made]:
    """Those that a destination means. One that says only how its branch or its folder is called may be either kind."""
    if wanted == Destination(title=wanted.title):
        return []
    path = as_place.path_of(target, wanted.model_copy(update={"onto": "worktree"})) if wanted.path else None
    return [
        made
        for made in places
        if wanted.onto in ("files", made.onto) and wanted.branch in (None, made.branch) and path in (None, made.path)
    ]


@contextmanager
def _opened(directory: Path, task_id: str, state_folder: Path, *, may_be_new: bool) -> Generator[Target]:
    """The target, locked, without anything that is half done."""
    with Target.locked(directory, task_id, state_folder, may_be_new=may_be_new) as target:
        _finish_interrupted(target)
        yield target


def _finish_interrupted(target: Target) -> int:
    count = as_files.finish_interrupted(target) + as_place.finish_interrupted(target)
    target.settled()
    return count


def _check_destination(destination: Destination) -> None:
    for name in ("branch", "path", "squash"):
        if getattr(destination, name) and (
            destination.onto == "files" or (name == "path" and destination.onto == "branch")
        ):
            raise InvalidInput(
                f"{name} is for a result that goes to a {'worktree' if name == 'path' else 'branch or worktree'}.",
                remedy="Say so with onto (`--branch`, `--worktree`), or leave it out.",
                field=name,
            )


def _confirmation(missing: Sequence[str], dangers: Sequence[Danger]) -> ConfirmationNeeded:
    why = {danger.path: danger.why for danger in dangers}
    refusal = ConfirmationNeeded(
        f"These files can make a machine execute things: {listed(missing)}. Nothing was written.",
        files=[(path, why.get(path, why_sensitive(path))) for path in missing],
    )
    refusal.dangers = tuple((danger.path, danger.why) for danger in dangers if danger.path not in set(missing))
    return refusal


def _count(files: Sequence[Any]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files)} files"
