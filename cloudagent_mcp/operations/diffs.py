"""A task's diff, cut into files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

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


_HUNK = re.compile(r"@@ -(\d{1,10})(?:,(\d{1,10}))? \+(\d{1,10})(?:,(\d{1,10}))? @@")
_ESCAPED = re.compile(rb"\\([0-7]{3}|.)")
_ESCAPES = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}


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


class DiffLine(NamedTuple):
    """A line that a diff shows."""

    mark: Literal[" ", "+", "-"]
    old: int | None
    """Its number in the old file; None where it was added."""
    new: int | None
    """Its number in the new file; None where it was deleted."""
    text: str

    @property
    def number(self) -> int:
        """What names it in a file's diff: the number in the new file, or minus that in the old one, once deleted."""
        return self.new if self.new is not None else -(self.old or 0)


def files_of(text: str) -> list[tuple[DiffFile, list[DiffLine]]]:
    """Each file of a diff with its lines; those of a binary one are none."""
    return [(file, [] if file.binary else lines_of(section)) for file, section in _sections(text)]


def lines_of(section: str) -> list[DiffLine]:
    """The lines of one file's diff, as git writes it; it may be cut off anywhere."""
    found: list[DiffLine] = []
    old = new = old_left = new_left = 0
    for line in section.split("\n"):
        if old_left <= 0 and new_left <= 0:
            # Outside of hunks --- and +++ are no lines of a file.
            if head := _HUNK.match(line):
                old, old_left, new, new_left = int(head[1]), int(head[2] or 1), int(head[3]), int(head[4] or 1)
        elif line[:1] == " ":
            found.append(DiffLine(" ", old, new, line[1:]))
            old, new, old_left, new_left = old + 1, new + 1, old_left - 1, new_left - 1
        elif line[:1] == "+":
            found.append(DiffLine("+", None, new, line[1:]))
            new, new_left = new + 1, new_left - 1
        elif line[:1] == "-":
            found.append(DiffLine("-", old, None, line[1:]))
            old, old_left = old + 1, old_left - 1
    return found


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
    name = _unquoted(names.get("rename to", "")) or _stripped(names.get("+++")) or _stripped(names.get("---"))
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
    name = _unquoted(name.removesuffix("\t"))
    return None if name == "/dev/null" else name[2:] if name[:2] in ("a/", "b/") else name


def _unquoted(name: str) -> str:
    """A name as it is: one with a quote, a backslash, a control character or more than ASCII is quoted as in C."""
    if len(name) < 2 or name[0] != '"' or name[-1] != '"':
        return name

    def plain(escape: re.Match[bytes]) -> bytes:
        said = escape[1]
        return bytes([int(said, 8) & 0xFF]) if len(said) == 3 else _ESCAPES.get(said, said)

    return _ESCAPED.sub(plain, name[1:-1].encode()).decode("utf-8", "replace")
