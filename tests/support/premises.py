"""A user's machine in a folder: a repository with a life of its own, a home, neighbours, and traps for who executes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from cloudagent_mcp.apply import ApplyOutcome, apply, undo
from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.records import short_id
from tests.support.forge import Forge, Start
from tests.support.git_repos import Content, Result, Workshop, files_of, git, make_repository, put

TRAP = "touch ../outside/executed"
"""What anything that is executed in the repository does."""
HOOKS = ["post-checkout", "post-commit", "pre-commit", "post-index-change", "post-merge", "reference-transaction"]
COMMITTED: Mapping[str, Content] = {
    "a.txt": "a\n",
    "Sub/b.txt": "b\n",
    "Sub/deep/c.txt": "c\n",
    "in": "-> Sub",
    "out": "-> ../outside",
    ".gitignore": "build/\n*.log\n",
    "lines.txt": "".join(f"line {n}\n" for n in range(20)),
    "photo.bin": b"\0\1\2",
}

Look = dict[str, tuple[int, int, bytes]]
"""Everything below a folder: permissions, time of the last change and content."""


@dataclass(frozen=True)
class Premises:
    """A copy of it all."""

    folder: Path
    start: Start

    @classmethod
    def build(cls, folder: Path) -> Premises:
        """The one that others are copied from."""
        around = folder / "around"
        around.mkdir(parents=True)
        (folder / "state").mkdir()
        shop = make_repository(around / "shop", COMMITTED)
        outside = {"outside/precious.txt": "precious\n", "outside/b.txt": "b\n", "outside/deep/c.txt": "c\n"}
        home = {"home/.bashrc": "mine\n", "home/.ssh/authorized_keys": "mine\n", "home/.claude/settings.json": "{}\n"}
        put(around, {**outside, **home, "tmp/mine": "mine\n", "sibling.txt": "mine\n"})
        for name in HOOKS:
            put(shop, {f".git/hooks/{name}": f'#!/bin/sh\ncd "$(git rev-parse --show-toplevel)" && {TRAP}\n'})
            (shop / ".git/hooks" / name).chmod(0o755)
        for kind in ("clean", "smudge", "process"):
            git(shop, "config", f"filter.trap.{kind}", f"sh -c '{TRAP}; cat'")
        for name in ("core.fsmonitor", "diff.trap.command", "diff.trap.textconv", "merge.trap.driver", "gpg.program"):
            git(shop, "config", name, f"sh -c '{TRAP}'")
        git(shop, "branch", "mine")
        git(shop, "tag", "v1")
        put(shop, {"build/output.o": "ignored\n", "mine.txt": "untracked\n"})
        workshop = Workshop(folder / "workshop", bundle_working_tree(shop, base_ref="main").bundle)
        return cls(folder, Start.of(workshop))

    def copy(self, to: Path) -> Premises:
        for name in ("around", "state"):
            shutil.copytree(self.folder / name, to / name, symlinks=True)
        return Premises(to, self.start)

    @property
    def around(self) -> Path:
        return self.folder / "around"

    @property
    def shop(self) -> Path:
        return self.around / "shop"

    def live_in(self, patch: pytest.MonkeyPatch) -> None:
        """This process's home and temporary folder are these."""
        patch.setenv("HOME", str(self.around / "home"))
        patch.setattr(tempfile, "tempdir", str(self.around / "tmp"))

    def forge(self) -> Forge:
        return Forge(self.start)

    def apply(self, result: Result, *, allow: tuple[str, ...] = ()) -> ApplyOutcome:
        return apply(
            self.shop,
            **result.given,
            state_folder=self.folder / "state",
            allow_sensitive=allow,
        )

    def undo(self, result: Result) -> ApplyOutcome:
        return undo(self.shop, task_id=result.task_id, state_folder=self.folder / "state")

    def look(self) -> Look:
        """All there is."""
        found = _look(self.around)
        mode, _, content = found["tmp"]  # where things come and go
        return {**found, "tmp": (mode, 0, content)}

    def look_around(self, result: Result) -> Look:
        """All that no apply of this result changes, but for the files of the working tree."""
        backup = f"refs/cloudagent/backup/{short_id(result.task_id)}-"
        ours = f"refs/heads/{result.branch}", f"logs/refs/heads/{result.branch}", backup, "objects/"
        kept: Look = {}
        for name, (mode, at, content) in self.look().items():
            inner = name.removeprefix("shop/.git/")
            if inner == name:
                if not name.startswith("shop"):
                    kept[name] = (mode, at, content)
            elif not inner.startswith(ours):
                kept[name] = (mode, 0 if (self.around / name).is_dir() else at, content)
        above = "refs/heads/task", "logs/refs/heads/task", "refs/cloudagent", "refs/cloudagent/backup", "objects"
        for name in (*above, "refs/cloudagent/result"):
            kept.pop(f"shop/.git/{name}", None)
        return kept

    def tree(self) -> dict[str, tuple[int, bytes]]:
        """The working tree."""
        return files_of(self.shop)


def _look(folder: Path) -> Look:
    found: Look = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            about = entry.stat(follow_symlinks=False)
            content = b""
            if entry.is_symlink():
                content = os.fsencode(os.readlink(entry.path))
            elif entry.is_file():
                content = Path(entry.path).read_bytes()
            elif entry.is_dir():
                found |= {f"{entry.name}/{name}": value for name, value in _look(Path(entry.path)).items()}
            found[entry.name] = (about.st_mode, about.st_mtime_ns, content)
    return found
