"""All or nothing: originals are kept on the disk before the first write, so that any crash can be taken back.

STATE_FOLDER/<directory>/lock
STATE_FOLDER/<directory>/<task>/journal.json    what is to be done, and whether it is done
STATE_FOLDER/<directory>/<task>/originals       the content of every file before, one after the other
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloudagent_mcp.apply.tree import Changed, File, InTheWay, Tree


@dataclass(frozen=True)
class Step:
    """One file before and after; None is no file."""

    path: str
    before: File | None
    after: File | None
    merged: bool = False
    """Is `after` made of the result's and of what the user has committed?"""


class Journal:
    """The record of one apply to one directory."""

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        self._folder = folder
        self._entry = entry

    @classmethod
    def open(cls, folder: Path) -> Journal | None:
        """The journal in that folder. Where there is none yet, nothing was written, and what is there is removed."""
        try:
            return cls(folder, json.loads((folder / "journal.json").read_bytes()))
        except FileNotFoundError:
            shutil.rmtree(folder, ignore_errors=True)
            return None

    @classmethod
    def begin(cls, folder: Path, tree: Tree, steps: Sequence[Step], *, about: Mapping[str, Any]) -> Journal:
        """Keep the originals, and what is to be done, on the disk."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        with open(folder / "originals", "wb") as originals:
            kept: list[dict[str, Any]] = []
            for step in steps:
                before = None if step.before is None else _kept(step.before, at=originals.tell())
                after = recognised(step.after)
                kept.append({"path": step.path, "before": before, "after": after})
                originals.write(b"" if step.before is None else step.before.data)
            originals.flush()
            os.fsync(originals.fileno())
        above = {folder for step in steps for folder in _folders_above(step.path)}
        modes = {name: tree.folder_mode(name) for name in sorted(above)}
        entry = {
            "about": dict(about),
            "done": False,
            "temporary": f".cloudagent-{secrets.token_hex(8)}.tmp",
            "steps": kept,
            "new_folders": [name for name, mode in modes.items() if mode is None],
            "folder_modes": {name: mode for name, mode in modes.items() if mode is not None},
        }
        journal = cls(folder, entry)
        journal._save()
        return journal

    @property
    def done(self) -> bool:
        return self._entry["done"]

    @property
    def forgotten(self) -> bool:
        return not self._folder.exists()

    @property
    def about(self) -> dict[str, Any]:
        """What its maker wanted to remember."""
        return self._entry["about"]

    def changes(self) -> dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]]:
        """What every file was before and is after it, as `recognised` says it."""
        return {path: (recognised(before), after) for path, (before, after) in self.originals().items()}

    def originals(self) -> dict[str, tuple[File | None, dict[str, Any] | None]]:
        """Every file as it was before, and by what it is known after it."""
        originals = (self._folder / "originals").read_bytes()
        return {step["path"]: (_restored(step["before"], originals), step["after"]) for step in self._entry["steps"]}

    def write(self, tree: Tree, steps: Sequence[Step]) -> None:
        """Do it. Raises `Changed`, `InTheWay`, OSError: then `take_back` is due."""
        temporary = self._entry["temporary"]
        # Deletions first: where a folder becomes a file, or a file a folder, the name must be free.
        for step in steps:
            if step.after is None:
                tree.replace(step.path, None, expected=step.before, temporary=temporary)
                for folder in _folders_above(step.path):
                    if not tree.remove_folder(folder):
                        break
        for step in steps:
            if step.after is not None:
                for folder in reversed(_folders_above(step.path)):
                    tree.make_folder(folder)
                tree.replace(step.path, step.after, expected=step.before, temporary=temporary)
        self._sync(tree)
        self._entry["done"] = True
        self._save()

    def differing(self, tree: Tree) -> list[str]:
        """The files that are not as this apply left them."""
        written = {step["path"] for step in self._entry["steps"] if step["after"] is not None}

        def as_left(path: str, after: dict[str, Any] | None) -> bool:
            try:
                return _matches(tree.read(path), after)
            except InTheWay as obstacle:
                # A file that this apply deleted, and whose name it gave to a folder, or the other way round.
                return after is None and _is_made_of(tree, obstacle.path, written)

        return [step["path"] for step in self._entry["steps"] if not as_left(step["path"], step["after"])]

    def take_back(self, tree: Tree) -> list[str]:
        """Put every file back that is as this apply left it; a crash in between is no harm. Tells the files that
        somebody changed since: they stay as they are."""
        self._entry["done"] = False
        self._save()
        temporary, steps = self._entry["temporary"], self._entry["steps"]
        for folder in {"", *self._entry["new_folders"], *self._entry["folder_modes"]}:
            tree.remove_leftover(folder, temporary)
        originals = (self._folder / "originals").read_bytes()
        changed: list[str] = []
        originally = {step["path"] for step in steps if step["before"] is not None}

        def put_back(step: dict[str, Any]) -> None:
            path, before = step["path"], _restored(step["before"], originals)
            try:
                now = tree.read(path)
                if now == before:
                    return
                if not _matches(now, step["after"]):
                    raise Changed(path)
                if before is not None:
                    for folder in reversed(_folders_above(path)):
                        tree.make_folder(folder, self._entry["folder_modes"].get(folder))
                mode = None if before is None else before.mode
                tree.replace(path, before, expected=now, temporary=temporary, mode=mode)
            except Changed:
                changed.append(path)
            except InTheWay as obstacle:
                # What was there before an added file, as a folder or as a file above it, is still there.
                if before is not None or not _is_made_of(tree, obstacle.path, originally):
                    changed.append(path)

        # What was added goes first, with its folders: it may have the name of a file that was there.
        for step in (step for step in steps if step["before"] is None):
            put_back(step)
        for folder in sorted(self._entry["new_folders"], key=len, reverse=True):
            tree.remove_folder(folder)
        for step in (step for step in steps if step["before"] is not None):
            put_back(step)
        self._sync(tree)
        self.forget()
        return changed

    def forget(self) -> None:
        """Remove it."""
        (self._folder / "journal.json").unlink(missing_ok=True)
        _sync_folder(self._folder)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _save(self) -> None:
        keep(self._folder / "journal.json", self._entry)
        _sync_folder(self._folder.parent)

    def _sync(self, tree: Tree) -> None:
        for folder in {"", *self._entry["new_folders"], *self._entry["folder_modes"]}:
            tree.sync(folder)


def keep(path: Path, entry: Mapping[str, Any]) -> None:
    """Have it on the disk as JSON: all of it, or what was there before."""
    fresh = path.with_suffix(".new")
    with open(fresh, "wb") as file:
        file.write(json.dumps(entry).encode())
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)
    _sync_folder(path.parent)


def _folders_above(path: str) -> list[str]:
    """The folders that a path lies in, the innermost first."""
    folders: list[str] = []
    while "/" in path:
        path = path.rpartition("/")[0]
        folders.append(path)
    return folders


def _is_made_of(tree: Tree, path: str, paths: Container[str]) -> bool:
    """Is this one of these files, or a folder of nothing else?"""
    return path in paths or tree.holds_only(path, paths)


def _kept(file: File, *, at: int) -> dict[str, Any]:
    return {"at": at, "size": len(file.data), "mode": file.mode, "link": file.link}


def _restored(kept: dict[str, Any] | None, originals: bytes) -> File | None:
    if kept is None:
        return None
    return File(originals[kept["at"] : kept["at"] + kept["size"]], mode=kept["mode"], link=kept["link"])


def recognised(file: File | None) -> dict[str, Any] | None:
    """By what a file is known again; None is no file."""
    if file is None:
        return None
    return {"sha256": hashlib.sha256(file.data).hexdigest(), "executable": file.executable, "link": file.link}


def _matches(file: File | None, known: dict[str, Any] | None) -> bool:
    return recognised(file) == known


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
