"""Which files an agent touches, as far as can be told while it works: from its tool calls, and from its checkpoints."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from typing import Any

PATHS_MAX = 500
PATH_MAX = 300
TOTAL_MAX = 32_000
"""Characters of all paths together: they are read back whenever somebody looks at a task."""
WRITES = {"Edit": "file_path", "Write": "file_path", "MultiEdit": "file_path", "NotebookEdit": "notebook_path"}
"""Claude Code's tools that change a file, and the argument that names it."""


class Touches:
    """Paths relative to the repository. What names them is hostile: there are never many, nor long ones."""

    def __init__(self, known: Iterable[str] = (), *, folder: str = "") -> None:
        """`known` are those of earlier attempts."""
        self.folder = folder
        """Where the agent sees its repository; empty while it has none."""
        self._paths: dict[str, None] = {}
        self._room = TOTAL_MAX
        for path in known:
            self.add(path)
        self._told = len(self._paths)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(sorted(self._paths))

    def see(self, tool_use: Mapping[str, Any]) -> None:
        """Take a tool call into account, as the log has it. It may yet fail."""
        argument, given = WRITES.get(str(tool_use.get("name"))), tool_use.get("input")
        if argument is None or not isinstance(given, Mapping):
            return
        path = given.get(argument)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if isinstance(path, str) and len(path) <= PATH_MAX + len(self.folder) + 1:
            self.add(path)

    def add(self, path: str) -> None:
        """A path of the repository; what lies elsewhere, or is git's own, is nobody else's concern."""
        inside = posixpath.normpath(path)
        if inside.startswith("/"):
            if not self.folder or not inside.startswith(f"{self.folder}/"):
                return
            inside = inside[len(self.folder) + 1 :]
        if inside in ("", ".") or inside.split("/", 1)[0] in ("..", ".git") or len(inside) > PATH_MAX:
            return
        if inside not in self._paths and len(self._paths) < PATHS_MAX and len(inside) <= self._room:
            self._paths[inside] = None
            self._room -= len(inside)

    def news(self) -> tuple[str, ...] | None:
        """All of them, if there are more than when this was asked last."""
        if len(self._paths) == self._told:
            return None
        self._told = len(self._paths)
        return self.paths
