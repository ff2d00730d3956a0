"""A task's diff, cut into files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from cloudagent_storage.errors import NotFound
from cloudagent_storage.records import Record, Task


class DiffFile(Record):
    """One changed file."""

    path: str
    change: Literal["added", "modified", "deleted", "renamed"]
    insertions: int
    deletions: int
    binary: bool = False


class Diff(Record):
    """What a task changed."""

    task_id: str
    branch: str
    base_sha: str | None
    files: tuple[DiffFile, ...]
    diff: str
    truncated: bool = False
    """Is something of it missing, because it was too long? The bundle has it all."""


def parse_diff(task: Task, text: str, *, path: str | None, stat_only: bool) -> Diff:
    """The files of a stored diff, or only those at or under `path`. Raises `NotFound` when there are none there."""
    sections = list(_sections(text))
    chosen = [
        (file, section)
        for file, section in sections
        if path is None or file.path == path or file.path.startswith(path.rstrip("/") + "/")
    ]
    if path is not None and not chosen:
        raise NotFound("The task changed no file of that name.", remedy="stat_only lists the files.", field="path")
    return Diff(
        task_id=task.task_id,
        branch=task.branch,
        base_sha=task.base_sha,
        files=tuple(file for file, _ in chosen),
        diff="" if stat_only else "".join(section for _, section in chosen),
        truncated=_is_cut([file for file, _ in sections], task),
    )


def _is_cut(files: list[DiffFile], task: Task) -> bool:
    """A very long diff is kept only in part; the numbers beside it were counted on the whole."""
    whole = task.result.artifacts if task.result else None
    if whole is None:
        return False
    counted = (len(files), sum(file.insertions for file in files), sum(file.deletions for file in files))
    return counted != (whole.files_changed, whole.insertions, whole.deletions)


def _sections(text: str) -> Iterator[tuple[DiffFile, str]]:
    # Lines inside a hunk begin with a blank, +, - or \, so only a new file can begin like this.
    for section in re.split(r"(?m)^(?=diff --git )", text):
        if section.startswith("diff --git "):
            yield _file(section), section


def _file(section: str) -> DiffFile:
    head = re.split(r"\n(?=@@ |GIT binary patch|Binary files )", section, maxsplit=1)[0]
    body = section[len(head) :]
    names = dict(re.findall(r"(?m)^(rename to|\+\+\+|---) (.*)$", head))
    name = names.get("rename to") or _stripped(names.get("+++")) or _stripped(names.get("---"))
    if name is None:
        # Binary and mode-only changes name the file only in their first line, twice and equally.
        first = head.partition("\n")[0].removeprefix("diff --git ")
        name = _stripped(first[len(first) // 2 + 1 :]) or first
    change: Literal["added", "modified", "deleted", "renamed"] = "modified"
    for mark, meaning in (("new file", "added"), ("deleted file", "deleted"), ("rename to", "renamed")):
        if f"\n{mark} " in head:
            change = meaning  # pyright: ignore[reportAssignmentType]
    binary = body.startswith(("\nGIT", "\nBinary"))
    return DiffFile(
        path=name,
        change=change,
        insertions=0 if binary else len(re.findall(r"(?m)^\+", body)),
        deletions=0 if binary else len(re.findall(r"(?m)^-", body)),
        binary=binary,
    )


def _stripped(name: str | None) -> str | None:
    """Without git's a/ or b/ and its trailing tab; None for /dev/null."""
    if name is None:
        return None
    name = name.rstrip("\t").strip('"')
    return None if name == "/dev/null" else name[2:] if name[:2] in ("a/", "b/") else name
