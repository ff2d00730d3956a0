"""What an apply is asked for, and what it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cloudagent_storage.records import Record

Onto = Literal["files", "branch", "worktree"]


class Destination(Record):
    """Where in a repository a result goes to, and as what."""

    onto: Onto = "files"
    """The files of the working tree; a branch, with neither working tree nor index touched; or a new worktree on it."""
    branch: str | None = None
    """Another name than the task's own."""
    path: Path | None = None
    """Where the worktree goes. Default: beside the repository."""
    squash: bool = False
    """As one commit, not as those that the agent made."""
    title: str = ""
    """What that commit says first."""


FILES = Destination()


class AppliedFile(Record):
    """One file of a result."""

    path: str
    change: Literal["added", "modified", "deleted", "renamed"] | None = None
    """None only where a refusal names the file."""
    sensitive: bool = False
    """Worth a look, since it can make a machine execute things. Some need to be named before they are written."""
    insertions: int = 0
    deletions: int = 0
    binary: bool = False
    executable: bool = False
    """Does it become executable?"""
    merged: bool = False
    """Is it merged with what the user has committed meanwhile?"""


class Danger(Record):
    """What somebody should know of a file before it is written."""

    path: str
    why: str


class Totals(Record):
    """The whole result, also where not every file of it is listed."""

    files: int
    insertions: int
    deletions: int
    binary: int
    merged: int


class ApplyOutcome(Record):
    """What was done, or would be."""

    outcome: Literal["applied", "would_apply", "undone", "instructions", "conflict", "refused"]
    """What it says of itself; the last two only together with an error's code."""
    files: tuple[AppliedFile, ...] = ()
    totals: Totals | None = None
    dangers: tuple[Danger, ...] = ()
    preview: str | None = None
    """Of a dry run: the token with which exactly this is done, or nothing."""
    backup_ref: str | None = None
    """A commit of everything that was in the working tree before."""
    branch: str | None = None
    """The local branch that the result is on as well, to be looked at or merged."""
    worktree: str | None = None
    """The folder in which that branch is checked out."""
    message: str
