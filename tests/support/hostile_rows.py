"""A row of the table of hostile results, and what the rows are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.forge import FILE, LINK, Forge
from tests.support.git_repos import Content, Result, put

UNSAFE, CONFLICT, CONFIRM, UNCHANGED = "unsafe_change", "conflict", "confirmation_needed", "no_changes"
MB = 1024 * 1024
EVIL = b"evil\n"

UP = "leads out of the tree"
GIT = "lies in git's own folder"
ELSEWHERE = "has a name that other systems read as something else"
INVISIBLE = "has invisible characters in its name, or is no Unicode"
LONG = "has a name that is too long"
ODD = "is no ordinary file"
ALIKE = "differs from another name only in case or invisibly"
OUT = "is a symlink that leads out of the tree"
THROUGH = "is a symlink that leads through another one"
OBJECTS = "holds objects that git does not accept"
BUNDLE = "is no well-formed git bundle on top of the task's base"

Make = Callable[[Forge], Result]
Here = Callable[[Path], None]


@dataclass(frozen=True)
class Row:
    name: str
    make: Make
    code: str | None = None
    saying: str = ""
    """Part of the refusal's message."""
    writes: Mapping[str, bytes | None] = field(default_factory=dict[str, bytes | None])
    """The files that differ afterwards, and what is in them; None for one that is gone."""
    here: Here | None = None
    """What the user has done since the task was submitted."""
    allow: tuple[str, ...] = ()


def tree(*entries: tuple[str, bytes, bytes]) -> Make:
    """The base's tree, and these."""
    return lambda forge: forge.hostile(*entries)


def has(files: Mapping[str, Content]) -> Here:
    return lambda shop: put(shop, files)


def named(reason: str, names: Mapping[str, bytes]) -> list[Row]:
    """Files whose name alone is why they are refused."""
    return [Row(f"{name} is refused", tree((FILE, path, EVIL)), UNSAFE, reason) for name, path in names.items()]


def linked(reason: str, links: Mapping[str, tuple[bytes, bytes]]) -> list[Row]:
    return [
        Row(f"a symlink {name} is refused", tree((LINK, path, goal)), UNSAFE, reason)
        for name, (path, goal) in links.items()
    ]
