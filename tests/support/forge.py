"""Results written object by object, pack and bundle included: git itself would refuse to make most of them."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cloudagent_storage.records import branch_name, new_id
from tests.support.git_repos import Result, Workshop, git

FILE, EXECUTABLE, LINK, SUBMODULE, FOLDER = "100644", "100755", "120000", "160000", "40000"

Node: TypeAlias = "dict[bytes, Node] | tuple[str, bytes | str]"
"""A folder, or a file's mode with its content or the id of an object."""
Entry = tuple[str, bytes, str]
"""A line of a tree: mode, name and id."""

_KINDS = {"commit": 1, "tree": 2, "blob": 3, "tag": 4}
_REF_DELTA = 7


@dataclass(frozen=True)
class Start:
    """What a task began with."""

    base_sha: str
    input_bundle: bytes | None
    entries: Sequence[Entry]
    """Of the base's root folder."""
    files: Sequence[Entry]
    """All of the base's files, by their paths."""

    @classmethod
    def of(cls, workshop: Workshop) -> Start:
        def listed(*how: str) -> list[Entry]:
            listing = git(workshop.folder, "ls-tree", "-z", *how, workshop.base_sha).split("\0")
            lines = [line.split("\t") for line in listing if line]
            return [(about.split(" ")[0].lstrip("0"), name.encode(), about.split(" ")[2]) for about, name in lines]

        return cls(workshop.base_sha, workshop.input_bundle, listed(), listed("-r"))


class Forge:
    """Makes one result on top of a start. Nothing in it is checked."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.task_id = new_id("task")
        self.branch = branch_name(self.task_id)
        self._packed: dict[str, bytes] = {}

    # -- objects -----------------------------------------------------------------------------------------------------

    def object(self, kind: str, data: bytes) -> str:
        """Put an object into the pack; its id."""
        name = hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()
        self._packed[name] = _header(_KINDS[kind], len(data)) + zlib.compress(data, 1)
        return name

    def blob(self, data: bytes) -> str:
        return self.object("blob", data)

    def delta(self, base: str, instructions: bytes) -> None:
        """Put a delta into the pack, of whatever it makes of that object."""
        packed = _header(_REF_DELTA, len(instructions)) + bytes.fromhex(base) + zlib.compress(instructions)
        self._packed[hashlib.sha1(packed).hexdigest()] = packed

    def tree(self, entries: Iterable[Entry], *, in_order: bool = True) -> str:
        """A folder of these lines, in git's order or as they are."""
        lines = list(entries)
        if in_order:
            lines.sort(key=lambda entry: entry[1] + b"/" if entry[0] == FOLDER else entry[1])
        data = b"".join(mode.encode() + b" " + name + b"\0" + bytes.fromhex(sha) for mode, name, sha in lines)
        return self.object("tree", data)

    def commit(self, tree: str, *, parents: Sequence[str] | None = None, head: bytes = b"", rest: bytes = b"") -> str:
        """A commit on top of the base; `head` stands for author and committer, `rest` for all that follows."""
        above = [self.start.base_sha] if parents is None else parents
        said = b"".join(f"parent {parent}\n".encode() for parent in above)
        who = b"Ada <ada@example.com> 1700000000 +0000"
        head = head or b"author " + who + b"\ncommitter " + who + b"\n"
        return self.object("commit", f"tree {tree}\n".encode() + said + head + (rest or b"\nWork\n"))

    # -- results -----------------------------------------------------------------------------------------------------

    def hostile(self, *entries: tuple[str, bytes, bytes], keep: bool = True) -> Result:
        """The base's tree and these (mode, path, content): components are folders, `%2f` is a slash in a name."""
        return self.of(self.commit(self.folder(*entries, keep=keep)))

    def folder(self, *entries: tuple[str, bytes, bytes], keep: bool = True) -> str:
        """The tree of that. What is written takes the place of what the base has there, be it another kind."""
        tree: dict[bytes, Node] = {}
        of_base = [(mode, path, sha) for mode, path, sha in self.start.files if keep]
        for mode, path, content in (*of_base, *entries):
            *above, name = (part.replace(b"%2f", b"/") for part in path.split(b"/"))
            place = tree
            for part in above:
                inner = place.get(part)
                if not isinstance(inner, dict):
                    inner = place[part] = {}
                place = inner
            place[name] = (mode, content)
        return self._write(tree)

    def with_lines(self, *lines: Entry, in_order: bool = True) -> Result:
        """The base's tree with these lines, which may be any."""
        return self.of(self.commit(self.tree([*self.start.entries, *lines], in_order=in_order)))

    def pack(self) -> bytes:
        """All objects made so far."""
        data = b"PACK" + struct.pack(">II", 2, len(self._packed)) + b"".join(self._packed.values())
        return data + hashlib.sha1(data).digest()

    def of(
        self,
        tip: str,
        *,
        refs: Sequence[tuple[str, str]] | None = None,
        needs: Sequence[str] | None = None,
        signature: str = "# v2 git bundle",
        pack: bytes | None = None,
    ) -> Result:
        """The result whose newest commit is that, or any other bundle."""
        named = [(tip, f"refs/heads/{self.branch}")] if refs is None else refs
        needed = [self.start.base_sha] if needs is None else needs
        head = [signature, *(f"-{sha} Base" for sha in needed), *(f"{sha} {ref}" for sha, ref in named), "", ""]
        return self.bundle("\n".join(head).encode() + (self.pack() if pack is None else pack))

    def bundle(self, data: bytes) -> Result:
        return Result(self.task_id, self.branch, self.start.base_sha, self.start.input_bundle, data)

    def _write(self, tree: dict[bytes, Node]) -> str:
        lines: list[Entry] = []
        for name, value in tree.items():
            if isinstance(value, dict):
                lines.append((FOLDER, name, self._write(value)))
                continue
            mode, content = value
            if isinstance(content, str):
                sha = content
            elif mode == SUBMODULE:
                sha = hashlib.sha1(content).hexdigest()
            else:
                sha = self.blob(content)
            lines.append((mode, name, sha))
        return self.tree(lines)


def hostile(workshop: Workshop, *entries: tuple[str, bytes, bytes]) -> Result:
    """The same of a workshop, in whose repository it is, too."""
    forge = Forge(Start.of(workshop))
    result = forge.hostile(*entries)
    git(workshop.folder, "unpack-objects", "-q", stdin=forge.pack())
    return result


def copying(size: int, *, of: int) -> bytes:
    """A delta's instructions: 64 KB of an object of `of` bytes, again and again, until there are `size`."""
    return _varint(of) + _varint(size) + b"\x80" * (size >> 16)


def _header(kind: int, size: int) -> bytes:
    first, size = (kind << 4) | (size & 15), size >> 4
    return bytes([first | 0x80]) + _varint(size) if size else bytes([first])


def _varint(number: int) -> bytes:
    data = bytearray()
    while number > 0x7F:
        data.append(0x80 | (number & 0x7F))
        number >>= 7
    return bytes([*data, number])
