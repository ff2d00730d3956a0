"""Prompts from Markdown files: what is built in, and what users keep in the data folder or in a repository.

A repository's files are as hostile as it is: they are opened through no symlink, bounded in size and number, and only
ever text that a user chooses to send to their own model.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cloudagent_mcp.untrusted import clean, cut

FILE_LIMIT = 64 * 1024
HEAD_LIMIT = 8 * 1024
"""Bytes of front matter: a parser of YAML is slow."""
FILES_LIMIT = 100
ENTRIES_LIMIT = 1_000
"""Of a folder, that are looked at."""
ARGUMENTS_LIMIT = 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
ALL_WORDS = "arguments"
"""What `$ARGUMENTS` stands for."""

_WORD = r"[A-Za-z][A-Za-z0-9_-]{0,63}"
# Not `${{ … }}`, which belongs to workflows that a prompt may be about.
_PLACEHOLDER = re.compile(
    rf"(?<![$\\])\{{\{{\s*(?P<name>{_WORD})\s*(?:\|(?P<otherwise>[^{{}}]*))?\}}\}}"
    r"|(?<![\\$\w])\$(?:(?P<all>ARGUMENTS)\b|(?P<position>[1-9])(?!\d))"
)
_PLAIN_LINE = re.compile(r"(?m)^(title|description|argument-hint):[ \t]+(.+?)[ \t]*$")


class Broken(Exception):
    """A prompt's file cannot be used. The text says why, and repeats nothing of the file."""


def _joined(value: object) -> object:
    """`argument-hint: [issue]` is a list to YAML, and a text to everybody who writes it."""
    return " ".join(f"[{item}]" for item in value) if isinstance(value, list) else value  # pyright: ignore[reportUnknownVariableType]


class Argument(BaseModel):
    """Something that a user fills in."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Annotated[str, Field(pattern=f"^{_WORD}$")]
    description: str | None = None
    required: bool = False


class _Head(BaseModel):
    """The front matter, as far as it is ours: files written for Claude Code hold more."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    title: str | None = None
    description: str | None = None
    argument_hint: Annotated[str | None, BeforeValidator(_joined)] = Field(default=None, alias="argument-hint")
    arguments: Annotated[list[Argument | str], Field(max_length=ARGUMENTS_LIMIT)] = []


@dataclass(frozen=True)
class Prompt:
    """A text with places to fill in, which becomes a slash command."""

    name: str
    title: str
    description: str
    arguments: Sequence[Argument]
    body: str = field(repr=False)
    positional: bool = False
    """Are its arguments told apart by their place alone?"""

    def fill(self, given: Mapping[str, str]) -> str:
        """The text with the arguments in place. What is not given is what the placeholder says instead, or nothing."""
        positions = [argument.name for argument in self.arguments]

        def put(match: re.Match[str]) -> str:
            if match["name"]:
                return given.get(match["name"], "").strip() or (match["otherwise"] or "").strip()
            if match["all"] and ALL_WORDS in positions:
                return given.get(ALL_WORDS, "")
            if match["all"]:
                return " ".join(given[name] for name in positions if given.get(name))
            place = int(match["position"]) - 1
            if positions == [ALL_WORDS]:
                words = given.get(ALL_WORDS, "").split()
                return words[place] if place < len(words) else ""
            return given.get(positions[place], "") if place < len(positions) else ""

        # In one go, so that nothing in an argument is taken for a placeholder.
        return _PLACEHOLDER.sub(put, self.body).strip()


def parse(name: str, data: bytes) -> Prompt:
    """A prompt from its file. Raises `Broken`."""
    if len(data) > FILE_LIMIT:
        raise Broken(f"is larger than {FILE_LIMIT // 1024} KB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Broken("is not UTF-8") from None
    text = clean(text.replace("\r\n", "\n"))
    head, body = _Head(), text
    if text.startswith("---\n"):
        front, ended, body = text[4:].partition("\n---\n") if not text[4:].startswith("---\n") else ("", "-", text[8:])
        if not ended:
            front, ended, body = (text[4:-4], "-", "") if text.endswith("\n---") else ("", "", "")
        if not ended:
            raise Broken("has front matter that does not end with a line ---")
        head = _head(front)
    if not body.strip():
        raise Broken("has no text")
    arguments, positional = _arguments(head, body)
    return Prompt(
        name=name,
        title=_line(head.title, 100) or name.replace("-", " ").replace("_", " ").capitalize(),
        description=_line(head.description, 500) or _line(_first_line(body), 200),
        arguments=arguments,
        body=body,
        positional=positional,
    )


def read_folder(path: Path, *, trusted: bool) -> Iterator[tuple[str, Prompt | Broken]]:
    """The prompts in a folder, by name and in its order; what is broken comes as such.

    Of a folder that is not `trusted`, `path` leads from a folder that is: `.cloudagent/prompts` below `path` is read,
    and no symlink on the way or there is followed.
    """
    try:
        folder = _open_folder(path, () if trusted else (".cloudagent", "prompts"))
    except OSError:
        return
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry, _ in zip(entries, range(ENTRIES_LIMIT), strict=False))
        files = [name for name in names if name.endswith(".md") and not name.startswith(".")]
        for position, file in enumerate(files):
            name = file.removesuffix(".md")
            shown = cut("".join(c if c.isprintable() else "?" for c in name), 64) or ""
            if position >= FILES_LIMIT:
                yield shown, Broken(f"is one of more than {FILES_LIMIT} in its folder")
                return
            try:
                if not NAME.fullmatch(name):
                    raise Broken("has a name with other characters than A-Z, a-z, 0-9, - and _, or too long a one")
                yield name, parse(name, _read(folder, file, follow=trusted))
            except Broken as error:
                yield shown, error
    finally:
        os.close(folder)


def _open_folder(path: Path, below: Sequence[str]) -> int:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    for name in below:
        outer = folder
        try:
            folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=outer)
        finally:
            os.close(outer)
    return folder


def _read(folder: int, name: str, *, follow: bool) -> bytes:
    # Without waiting: a named pipe would keep us for ever.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        file = os.open(name, flags, dir_fd=folder)
    except OSError:
        raise Broken("cannot be read, or is a symbolic link where none is followed") from None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise Broken("is no regular file")
        data = b""
        while len(data) <= FILE_LIMIT and (part := os.read(file, FILE_LIMIT + 1 - len(data))):
            data += part
        return data
    except OSError:
        raise Broken("cannot be read") from None
    finally:
        os.close(file)


def _head(front: str) -> _Head:
    import yaml

    if len(front) > HEAD_LIMIT:
        raise Broken(f"has more than {HEAD_LIMIT // 1024} KB of front matter")
    # Second, with texts that only people take for texts put in quotes: `argument-hint: [issue] [priority]`, or a colon.
    for source in (front, _PLAIN_LINE.sub(lambda line: f"{line[1]}: {_quoted(line[2])}", front)):
        try:
            # All scalars are texts: a date or a `no` in a description is one, too.
            found: Any = yaml.load(source, Loader=yaml.BaseLoader)
        except (yaml.YAMLError, RecursionError, ValueError):
            continue
        try:
            return _Head.model_validate({} if found is None or found == "" else found)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors(include_url=False, include_input=False)[0]["loc"])
            raise Broken(f"has front matter with a wrong {cut(clean(where), 60) or 'form'}") from None
    raise Broken("has front matter that is no YAML")


def _quoted(value: str) -> str:
    return value if value[0] in "\"'|>" else "'" + value.replace("'", "''") + "'"


def _arguments(head: _Head, body: str) -> tuple[Sequence[Argument], bool]:
    """Those that are declared, and then those that only the text has; required is what it has nothing in place of.

    And whether they are the positions of `$1` and its like.
    """
    found: dict[str, Argument] = {}
    for given in head.arguments:
        if isinstance(given, str):
            if not re.fullmatch(_WORD, given):
                raise Broken("has front matter with a wrong arguments")
            given = Argument(name=given)
        found[given.name] = given.model_copy(update={"description": _line(given.description, 300) or None})
    hints = re.findall(r"[\[<]([^\[\]<>]+)[\]>]", head.argument_hint or "")
    highest, whole = 0, False
    for match in _PLACEHOLDER.finditer(body):
        if name := match["name"]:
            found.setdefault(name, Argument(name=name, required=match["otherwise"] is None))
        elif match["all"]:
            whole = True
        else:
            highest = max(highest, int(match["position"]))
    positional = not found and (highest > 0 or whole)
    if positional:
        hint = _line(head.argument_hint, 200) or None
        if whole and highest <= 1 and len(hints) <= 1:
            return [Argument(name=ALL_WORDS, description=hint)], True
        for position in range(max(highest, len(hints))):
            label = hints[position] if position < len(hints) else ""
            name = re.sub(r"[^A-Za-z0-9_-]+", "-", label).strip("-")[:64]
            name = name if re.fullmatch(_WORD, name) and name not in found else f"argument-{position + 1}"
            found[name] = Argument(name=name, description=_line(label, 100) or None)
    if len(found) > ARGUMENTS_LIMIT:
        raise Broken(f"has more than {ARGUMENTS_LIMIT} arguments")
    return list(found.values()), positional


def _first_line(body: str) -> str:
    return next(
        (line.strip().lstrip("#").strip() for line in body.splitlines() if line.strip().lstrip("#").strip()), ""
    )


def _line(text: str | None, limit: int) -> str:
    """One line of a bounded length."""
    return cut(" ".join((text or "").split()), limit) or ""
