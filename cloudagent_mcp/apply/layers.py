"""Results that were applied to one folder, each on top of those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cloudagent_mcp.apply.journal import Journal, recognised
from cloudagent_mcp.apply.tree import File, InTheWay, Tree


class Layers:
    """What the applies to one folder have written, whatever happened to it since."""

    def __init__(self, journals: Sequence[Journal], under: Mapping[str, File | None]) -> None:
        self._changes = [journal.changes() for journal in journals]
        self.under = under
        """See `beneath`."""

    def left(self, path: str, file: File | None) -> bool:
        """Is this file as one of them left it? Then nobody's own work is in it that is not kept elsewhere."""
        now = recognised(file)
        return now is not None and any(path in changes and changes[path][1] == now for changes in self._changes)

    def covers(self, path: str, below: dict[str, Any] | None, now: dict[str, Any] | None) -> bool:
        """Was the file, as it was `below`, made into what it is `now` by these alone, one after the other?"""
        state, wanted, left = below, now, list(self._changes)
        while state != wanted:
            above = next((changes for changes in left if path in changes and changes[path][0] == state), None)
            if above is None:
                return False
            left.remove(above)
            state = above[path][1]
        return True


def beneath(tree: Tree, journals: Sequence[Journal]) -> dict[str, File | None]:
    """What the files that these applies have written, the last one first, were before, as far as they are still so.

    For a result that goes on from these: it has all that they brought, and takes their place.
    """
    under: dict[str, File | None] = {}
    for journal in journals:
        for path, (original, after) in journal.originals().items():
            try:
                now = under[path] if path in under else tree.read(path)
            except InTheWay:
                continue
            if recognised(now) == after:
                under[path] = original
    return under
