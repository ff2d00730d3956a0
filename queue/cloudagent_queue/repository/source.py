"""What goes in with a task when it is submitted: a folder as it is now. A remote address is fetched by its worker."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloudagent_queue.repository.address import is_remote
from cloudagent_queue.repository.working_tree import bundle_working_tree
from cloudagent_storage.records import EventDraft, Level


@dataclass(frozen=True)
class Source:
    """Where a task's files come from."""

    repository: str
    """An address, a folder's whole path, or `none`."""
    bundle: bytes | None = None
    base_sha: str | None = None
    config: bytes | None = None
    manifests: str | None = None
    """As a `Claim` has them; those of a remote repository are not known yet."""
    key: str | None = None
    """What every task of the same repository has, as far as that can be told: the first commit of its history. That of
    a remote repository is not known yet."""
    warnings: Sequence[EventDraft] = field(default_factory=list[EventDraft])


def read_source(place: str, base_ref: str | None, allow_secrets: Collection[str] | None = None) -> Source:
    """What is at a checked address, as far as it is read now; see `bundle_working_tree`, also for what it raises."""
    if place == "none" or is_remote(place):
        return Source(place)
    tree = bundle_working_tree(Path(place), base_ref=base_ref, allow_secrets=allow_secrets)
    return Source(
        str(tree.top),
        tree.bundle,
        tree.base_sha,
        tree.config,
        tree.manifests,
        key=tree.root or str(tree.top),
        warnings=warnings_of(tree.notes),
    )


def warnings_of(notes: Sequence[str]) -> list[EventDraft]:
    """What its user should know of a source, as lines of the task's log."""
    return [EventDraft(kind="status", level=Level.WARNING, message=note) for note in notes]
