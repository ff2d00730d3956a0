"""What a hostile agent may hand over as its result, and what happens to it: a row says which, how it is made, and why.

The base is that of premises.py. `UNSAFE` and the like are the codes of errors; a row without one is applied, and
writes just the files that it names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tests.support.forge import EXECUTABLE, FILE, FOLDER, LINK, SUBMODULE, Forge, copying
from tests.support.git_repos import Result, put
from tests.support.hostile_names import COLLISIONS, LINKS, NAMES, ODD_BUT_HARMLESS
from tests.support.hostile_rows import (
    BUNDLE,
    CONFIRM,
    CONFLICT,
    EVIL,
    MB,
    OBJECTS,
    ODD,
    THROUGH,
    UNCHANGED,
    UNSAFE,
    Here,
    Make,
    Row,
    has,
    tree,
)
from tests.support.premises import COMMITTED

# -- kinds of files, and trees that git would not make ----------------------------------------------------------------

KINDS = [
    *[
        Row(f"{name} is refused", tree((mode, b"Sub/tool", b"#!/bin/sh\n")), UNSAFE, ODD)
        for name, mode in {
            "a setuid program": "104755",
            "a setgid program": "102755",
            "a sticky file": "101644",
            "a file that all may write": "100777",
            "a file that only its owner may read": "100600",
            "a device": "20644",
            "a fifo": "10644",
            "a socket": "140644",
            "a file without a kind": "644",
            "a mode with a zero before it": "0100644",
            "a mode of zero": "0",
            "a mode that is very large": "7777777777100644",
        }.items()
    ],
    Row("a mode that is no number is refused", tree(("rwx", b"tool", EVIL)), UNSAFE, BUNDLE),
    Row("the mode of git's first months is a file's", tree(("100664", b"new", EVIL)), writes={"new": EVIL}),
    Row("a program is written as one", tree((EXECUTABLE, b"tool", EVIL)), writes={"tool": EVIL}),
    Row("a submodule is refused", tree((SUBMODULE, b"module", b"x")), UNSAFE, "is a submodule"),
    Row("a submodule instead of a file is refused", tree((SUBMODULE, b"a.txt", b"x")), UNSAFE, "is a submodule"),
    Row("a submodule instead of a folder is refused", tree((SUBMODULE, b"Sub", b"x")), UNSAFE, "is a submodule"),
    Row(
        "a blob that says it is a folder is refused",
        lambda forge: forge.with_lines((FOLDER, b"d", forge.blob(b"x"))),
        UNSAFE,
        BUNDLE,
    ),
    Row(
        "a folder that says it is a file is refused",
        lambda forge: forge.with_lines((FILE, b"f", forge.tree([]))),
        UNSAFE,
        OBJECTS,
    ),
    Row(
        "a folder that says it is a symlink is refused",
        lambda forge: forge.with_lines((LINK, b"l", forge.tree([]))),
        UNSAFE,
        OBJECTS,
    ),
    Row(
        "a commit that says it is a file is refused",
        lambda forge: forge.with_lines((FILE, b"f", forge.start.base_sha)),
        UNSAFE,
        BUNDLE,
    ),
    Row(
        "two files of one name are refused",
        lambda forge: forge.with_lines((FILE, b"x", forge.blob(b"1")), (FILE, b"x", forge.blob(b"2"))),
        UNSAFE,
        OBJECTS,
    ),
    Row(
        "a file and a folder of one name are refused",
        lambda forge: forge.with_lines(
            (FILE, b"x", forge.blob(b"1")), (FOLDER, b"x", forge.tree([(FILE, b"y", forge.blob(b"2"))]))
        ),
        UNSAFE,
        OBJECTS,
    ),
    Row(
        "a file and a folder of one name with another between them are refused",
        lambda forge: forge.with_lines(
            (FILE, b"x", forge.blob(b"1")),
            (FILE, b"x-", forge.blob(b"1")),
            (FOLDER, b"x", forge.tree([(FILE, b"y", forge.blob(b"2"))])),
        ),
        UNSAFE,
        OBJECTS,
    ),
    Row(
        "a tree out of order is refused",
        lambda forge: forge.with_lines((FILE, b"z", forge.blob(b"1")), (FILE, b"b", forge.blob(b"2")), in_order=False),
        UNSAFE,
        OBJECTS,
    ),
    Row(
        "a tree that breaks off is refused",
        lambda forge: forge.of(forge.commit(forge.object("tree", b"100644 x\0short"))),
        UNSAFE,
    ),
    Row(
        "an id of zeros is refused",
        lambda forge: forge.with_lines((FILE, b"x", "0" * 40)),
        UNSAFE,
        BUNDLE,
    ),
    Row(
        "a tree that holds itself is none, since nobody knows its id",
        lambda forge: forge.with_lines((FOLDER, b"x", "1" * 40)),
        UNSAFE,
        BUNDLE,
    ),
]

# -- how much there is ------------------------------------------------------------------------------------------------


def of_one_blob(forge: Forge, count: int, size: int) -> Result:
    blob = forge.blob(b"x\n" * (size // 2))
    return forge.with_lines(*((FILE, b"%d" % number, blob) for number in range(count)))


def deltas(forge: Forge, size: int) -> Result:
    """A pack in which a few bytes stand for a blob of `size`, which is not even part of the tree."""
    start = forge.blob(bytes(0x10000))
    forge.delta(start, copying(size, of=0x10000))
    return forge.hostile((FILE, b"new", EVIL))


def bomb(forge: Forge, *, wide: int, deep: int) -> Result:
    """Few objects and wide**deep files."""
    mode, inner = FILE, forge.blob(EVIL)
    for _ in range(deep):
        inner, mode = forge.tree([(mode, b"%d" % number, inner) for number in range(wide)]), FOLDER
    return forge.with_lines((FOLDER, b"bomb", inner))


AMOUNTS = [
    Row("more than 2,000 files are refused", lambda forge: of_one_blob(forge, 2001, 2), UNSAFE, "2001 files"),
    Row("a file of 11 MB is refused", tree((FILE, b"large", b"\0" * (11 * MB))), UNSAFE, "large has 11 MB"),
    Row("files of more than 50 MB are refused", lambda forge: of_one_blob(forge, 6, 9 * MB), UNSAFE, "54 MB"),
    Row(
        "13 GB in one blob under 1,500 names are refused before their lines are counted",
        lambda forge: of_one_blob(forge, 1500, 9 * MB),
        UNSAFE,
        "13500 MB",
    ),
    Row("a file that is 64 MB when it is unpacked is refused", tree((FILE, b"x", bytes(64 * MB))), UNSAFE, "64 MB"),
    Row("a delta that makes 4 GB of nothing is refused", lambda forge: deltas(forge, 4096 * MB), UNSAFE, BUNDLE),
    Row(
        "a billion files in a few objects are refused",
        lambda forge: bomb(forge, wide=32, deep=6),
        UNSAFE,
        "more files than any working tree",
    ),
    Row("a folder in a folder, 20,000 deep, is refused", lambda forge: bomb(forge, wide=1, deep=20_000), UNSAFE),
    Row("a file of 9 MB is written", tree((FILE, b"large", b"\0" * (9 * MB))), writes={"large": b"\0" * (9 * MB)}),
]

# -- what is in the files ---------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 12\n" % (b"0" * 64)
RULES = b"* filter=trap diff=trap merge=trap\n"

CONTENT = [
    *[
        Row(f"{path.decode()} is written only when it is named", tree((FILE, path, EVIL)), CONFIRM, path.decode())
        for path in [
            *[b".claude/settings.json", b"Sub/.claude/commands/x.md", b"CLAUDE.md", b"docs/claude.MD", b"AGENTS.md"],
            *[b".mcp.json", b".cursor/rules", b".vscode/tasks.json", b".VSCode/Tasks.json", b".husky/pre-commit"],
            *[b".envrc", b"Sub/.env.local", b".github/workflows/x.yml", b".GitHub/Workflows/x.yml", b".npmrc"],
            *[b"x.pth", b".cloudagent.toml", b".cargo/config.toml", b".pdbrc", b".exrc", b".kiro/hooks/x"],
        ]
    ],
    Row(
        "a sensitive file that is named is written",
        tree((FILE, b".envrc", EVIL)),
        writes={".envrc": EVIL},
        allow=(".envrc",),
    ),
    Row(
        "one sensitive file that is named does not stand for another",
        tree((FILE, b".envrc", EVIL), (FILE, b"Sub/.envrc", EVIL)),
        CONFIRM,
        "Sub/.envrc",
        allow=(".envrc",),
    ),
    Row("a sensitive name as a symlink has to be named", tree((LINK, b"Sub/.envrc", b"../a.txt")), CONFIRM, ".envrc"),
    Row(
        "attributes that turn on the user's own filters have to be named",
        tree((FILE, b".gitattributes", RULES), (FILE, b"new", EVIL)),
        CONFIRM,
        ".gitattributes",
    ),
    Row(
        "attributes that are named are written, and no filter is run",
        tree((FILE, b".gitattributes", RULES), (FILE, b"new", EVIL)),
        writes={".gitattributes": RULES, "new": EVIL},
        allow=(".gitattributes",),
    ),
    Row(
        "no filter of the user's is run on what is written",
        tree((FILE, b"new", EVIL), (FILE, b"a.txt", EVIL)),
        writes={"new": EVIL, "a.txt": EVIL},
        here=lambda shop: put(shop, {".git/info/attributes": "* filter=trap merge=trap diff=trap\n"}),
    ),
    Row(
        "a .gitmodules that is a symlink is refused",
        tree((LINK, b".gitmodules", b"a.txt")),
        UNSAFE,
        OBJECTS,
    ),
    Row(
        "a .gitmodules that runs a command is refused",
        tree((FILE, b".gitmodules", b'[submodule "x"]\n\tpath = x\n\turl = x\n\tupdate = !touch evil\n')),
        UNSAFE,
        OBJECTS,
    ),
    Row(
        "a .gitmodules with an address that is an option is refused",
        tree((FILE, b".gitmodules", b'[submodule "x"]\n\tpath = x\n\turl = -u./evil\n')),
        UNSAFE,
        OBJECTS,
    ),
    Row("a pointer of LFS is written as what it is", tree((FILE, b"new", POINTER)), writes={"new": POINTER}),
    Row(
        "a pointer of LFS does not replace the file that the user has fetched",
        tree((FILE, b"photo.bin", POINTER)),
        CONFLICT,
        "photo.bin",
        here=has({"photo.bin": b"\0fetched"}),
    ),
    Row(
        "binary content is written",
        tree((FILE, b"photo.bin", bytes(range(256)))),
        writes={"photo.bin": bytes(range(256))},
    ),
    Row("nothing but NULs is written", tree((FILE, b"new", b"\0\0\0")), writes={"new": b"\0\0\0"}),
    Row("an empty file is written", tree((FILE, b"new", b"")), writes={"new": b""}),
    Row("both line ends stay what they are", tree((FILE, b"new", b"a\r\nb\nc\r")), writes={"new": b"a\r\nb\nc\r"}),
    Row(
        "line ends become the user's where they want it so",
        tree((FILE, b"new", b"a\nb\n"), (FILE, b"a.txt", b"b\n")),
        writes={"new": b"a\r\nb\r\n", "a.txt": b"b\r\n"},
        here=lambda shop: put(
            shop, {".git/config": f"{(shop / '.git/config').read_text()}[core]\nautocrlf = true\n", "a.txt": b"a\r\n"}
        ),
    ),
    Row("a text that ends within a character is written", tree((FILE, b"new", b"caf\xc3")), writes={"new": b"caf\xc3"}),
    Row("markers of a conflict are text", tree((FILE, b"new", b"<<<<<<< x\n")), writes={"new": b"<<<<<<< x\n"}),
]

# -- the bundle -------------------------------------------------------------------------------------------------------


def good(forge: Forge) -> str:
    return forge.commit(forge.folder((FILE, b"new", EVIL)))


def changed_at(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def bundle(name: str, make: Make, saying: str = BUNDLE) -> Row:
    return Row(f"{name} is refused", make, UNSAFE, saying)


def hidden(forge: Forge, data: bytes) -> Result:
    """A result with an object that no tree of it holds."""
    forge.blob(data)
    return forge.of(good(forge))


BUNDLES = [
    bundle("an empty bundle", lambda forge: forge.bundle(b"")),
    bundle("something else than a bundle", lambda forge: forge.bundle(b"<html>\n\nnot found")),
    bundle("a bundle of the next version", lambda forge: forge.of(good(forge), signature="# v4 git bundle")),
    bundle(
        "a bundle with a filter",
        lambda forge: forge.of(good(forge), signature="# v3 git bundle\n@filter=blob:none"),
    ),
    bundle(
        "a bundle of another object format",
        lambda forge: forge.of("0" * 64, needs=(), signature="# v3 git bundle\n@object-format=sha256", pack=b"PACK"),
    ),
    bundle(
        "a bundle that says so of ids that are too short",
        lambda forge: forge.of(good(forge), signature="# v3 git bundle\n@object-format=sha256"),
    ),
    bundle("a bundle whose header never ends", lambda forge: forge.bundle(b"# v2 git bundle\n" + b"-" * 100_000)),
    bundle("a header that is no ASCII", lambda forge: forge.bundle("# v2 git bundle\n-é\n\n".encode())),
    bundle("a bundle without a ref", lambda forge: forge.of(good(forge), refs=[])),
    bundle(
        "a bundle with the ref of another task",
        lambda forge: forge.of(good(forge), refs=[(good(forge), "refs/heads/main")]),
    ),
    bundle("a bundle that is named HEAD", lambda forge: forge.of(good(forge), refs=[(good(forge), "HEAD")])),
    bundle(
        "a bundle with a ref that goes up",
        lambda forge: forge.of(good(forge), refs=[(good(forge), f"refs/heads/../../{forge.branch}")]),
    ),
    bundle(
        "a bundle with two refs",
        lambda forge: forge.of(
            good(forge), refs=[(good(forge), f"refs/heads/{forge.branch}"), (good(forge), "refs/heads/main")]
        ),
    ),
    bundle(
        "a bundle with the same ref twice",
        lambda forge: forge.of(good(forge), refs=[(good(forge), f"refs/heads/{forge.branch}")] * 2),
    ),
    bundle("a bundle that needs what nobody has", lambda forge: forge.of(good(forge), needs=["1" * 40])),
    bundle(
        "a bundle that needs a folder",
        lambda forge: forge.of(
            good(forge), needs=[next(sha for mode, _, sha in forge.start.entries if mode == FOLDER)]
        ),
    ),
    bundle("a bundle whose ref names a commit that it does not hold", lambda forge: forge.of("1" * 40)),
    bundle("a pack that breaks off", lambda forge: forge.of(good(forge), pack=forge.pack()[:-30])),
    bundle("a pack without its hash", lambda forge: forge.of(good(forge), pack=forge.pack()[:-20])),
    bundle("a pack with a wrong hash", lambda forge: forge.of(good(forge), pack=changed_at(forge.pack(), -1))),
    bundle(
        "a pack with a wrong number of objects", lambda forge: forge.of(good(forge), pack=changed_at(forge.pack(), 11))
    ),
    bundle("a pack with a bit flipped", lambda forge: forge.of(good(forge), pack=changed_at(forge.pack(), 40))),
    bundle("no pack at all", lambda forge: forge.of(good(forge), pack=b"")),
    bundle(
        "a delta of something that is not there",
        lambda forge: (forge.delta("1" * 40, copying(0x10000, of=0x10000)), forge.of(good(forge)))[1],
    ),
    bundle("a tag instead of a commit", lambda forge: forge.of(tag(forge, good(forge)))),
    bundle("a folder instead of a commit", lambda forge: forge.of(forge.folder((FILE, b"new", EVIL)))),
    bundle("a blob instead of a commit", lambda forge: forge.of(forge.blob(EVIL))),
    bundle("a commit without its tree", lambda forge: forge.of(forge.commit("1" * 40))),
    bundle("a commit without its parent", lambda forge: forge.of(forge.commit(forge.folder(), parents=["1" * 40]))),
    bundle(
        "a commit whose parent is a folder",
        lambda forge: forge.of(forge.commit(forge.folder(), parents=[forge.folder()])),
    ),
    bundle(
        "a commit that is not there is told, and a parent of it",
        lambda forge: forge.of(forge.commit(forge.folder(), parents=[forge.start.base_sha, "1" * 40])),
    ),
    bundle(
        "a file of an earlier commit that is not there",
        lambda forge: forge.of(
            forge.commit(forge.folder(), parents=[forge.commit(forge.tree([(FILE, b"x", "1" * 40)]))])
        ),
    ),
    bundle(
        "an object that git does not accept, in a commit in between,",
        lambda forge: forge.of(
            forge.commit(
                forge.folder((FILE, b"new", EVIL)),
                parents=[forge.commit(forge.tree([(FILE, b".git", forge.blob(EVIL))]))],
            )
        ),
        OBJECTS,
    ),
    bundle(
        "an object that git does not accept, and that nothing names,",
        lambda forge: (forge.tree([(FILE, b"..", forge.blob(EVIL))]), forge.of(good(forge)))[1],
        OBJECTS,
    ),
    Row(
        "a harmless object that nothing names changes nothing", lambda forge: hidden(forge, b"x"), writes={"new": EVIL}
    ),
    Row(
        "a commit that does not grow out of the base is applied by its files",
        lambda forge: forge.of(forge.commit(forge.folder((FILE, b"new", EVIL)), parents=[])),
        writes={"new": EVIL},
    ),
    Row(
        "a merge of a foreign history is applied by its files",
        lambda forge: forge.of(
            forge.commit(
                forge.folder((FILE, b"new", EVIL)),
                parents=[forge.start.base_sha, forge.commit(forge.tree([]), parents=[])],
            )
        ),
        writes={"new": EVIL},
    ),
    Row("the base itself is no result", lambda forge: forge.of(forge.start.base_sha), UNCHANGED),
    Row("a commit without a change is no result", lambda forge: forge.hostile(), UNCHANGED),
    Row(
        "a result that deletes everything deletes it, and what the user has besides stays",
        lambda forge: forge.hostile(keep=False),
        writes=dict.fromkeys(COMMITTED),
    ),
]


def tag(forge: Forge, of: str) -> str:
    said = f"object {of}\ntype commit\ntag v1\ntagger Ada <ada@example.com> 1700000000 +0000\n\nx\n"
    return forge.object("tag", said.encode())


# -- who made it and what is said of it -------------------------------------------------------------------------------


def by(head: bytes, rest: bytes = b"") -> Make:
    return lambda forge: forge.of(forge.commit(forge.folder((FILE, b"new", EVIL)), head=head, rest=rest))


WHO = b"Ada <ada@example.com> 1700000000 +0000\n"

AUTHORS = [
    *[
        Row(f"{name} is refused", by(b"author " + who + b"committer " + WHO), UNSAFE, OBJECTS)
        for name, who in {
            "an author without an address": b"Ada 1700000000 +0000\n",
            "an author with a bracket in it": b"A<da <ada@example.com> 1700000000 +0000\n",
            "an author without a time": b"Ada <ada@example.com>\n",
            "an author of the year 10^19": b"Ada <ada@example.com> 99999999999999999999 +0000\n",
            "an author in two lines": b"Ada\nauthor Eve <eve@example.com> 1 +0000\n",
            "no author": b"",
        }.items()
    ],
    Row("a NUL in a message is refused", by(b"", b"\nWork\0evil\n"), UNSAFE, OBJECTS),
    *[
        Row(f"{name} is no harm", make, writes={"new": EVIL})
        for name, make in {
            "an author with escape sequences": by(b"author \x1b[2J\xe2\x80\xae <\x07> 1 +0000\ncommitter " + WHO),
            "an author of an unknown encoding": by(b"author \xff\xfe <x> 1 +0000\ncommitter " + WHO),
            "a message that looks like ours": by(b"", b"\nBased-on: " + b"1" * 40 + b"\n"),
            "a message with escape sequences": by(b"", b"\n\x1b]0;evil\x07\r\x1b[1A\n"),
            "a message of a million lines": by(b"", b"\n" + b"x\n" * 1_000_000),
            "a signature that is none": by(b"", b"gpgsig -----BEGIN PGP SIGNATURE-----\n evil\n\nWork\n"),
            "a header that nobody knows": by(b"", b"x-evil yes\n\nWork\n"),
            "no message": by(b"", b"\n"),
        }.items()
    ],
]

# -- what the user has here -------------------------------------------------------------------------------------------


def fifo(shop: Path) -> None:
    os.mkfifo(shop / "new")


def hard_link(shop: Path) -> None:
    (shop / "a.txt").unlink()
    (shop / "a.txt").hardlink_to(shop.parent / "outside/a.txt")


def with_a_neighbour(shop: Path) -> None:
    put(shop.parent, {"outside/a.txt": "a\n"})
    hard_link(shop)


def conflict(name: str, files: Mapping[bytes, bytes], here: Here, saying: str) -> Row:
    make = tree(*((FILE, path, content) for path, content in files.items()))
    return Row(f"{name} is a conflict", make, CONFLICT, saying, here=here)


USERS = [
    conflict("an untracked file of the name", {b"new": EVIL}, has({"new": "mine\n"}), "new"),
    conflict("an ignored file of the name", {b"build/output.o": EVIL}, has({}), "build/output.o"),
    conflict("a dirty file", {b"a.txt": EVIL}, has({"a.txt": "mine\n"}), "a.txt"),
    conflict("a file that the user deleted", {b"a.txt": EVIL}, has({"a.txt": None}), "a.txt"),
    conflict("a dirty file that would merge", {b"lines.txt": EVIL}, has({"lines.txt": "line 0\n"}), "lines.txt"),
    conflict("a folder of the user's", {b"new": EVIL}, has({"new/x": "mine\n"}), "new"),
    conflict("an empty folder of the user's", {b"new": EVIL}, lambda shop: (shop / "new").mkdir(), "new"),
    Row(
        "an empty folder of the user's below a folder that becomes a file is a conflict",
        lambda forge: forge.of(
            forge.commit(
                forge.tree([e for e in forge.start.entries if e[1] != b"Sub"] + [(FILE, b"Sub", forge.blob(EVIL))])
            )
        ),
        CONFLICT,
        "Sub",
        here=lambda shop: (shop / "Sub/deep/empty").mkdir(),
    ),
    conflict("a file where a folder is wanted", {b"new/x": EVIL}, has({"new": "mine\n"}), "new"),
    conflict("a fifo", {b"new": EVIL}, fifo, "new"),
    conflict("a fifo instead of a folder", {b"new/x": EVIL}, fifo, "new"),
    conflict("a symlink to outside", {b"new": EVIL}, has({"new": "-> ../outside/precious.txt"}), "new"),
    conflict("a symlink to nowhere", {b"new": EVIL}, has({"new": "-> ../outside/new"}), "new"),
    conflict("a symlink in a folder's place", {b"new/fresh": EVIL}, has({"new": "-> ../outside"}), ": new."),
    conflict("a symlink that took a folder's place", {b"Sub/b.txt": EVIL}, has({"Sub": "-> ../outside"}), "Sub"),
    conflict("a symlink far above", {b"x/y/z/new": EVIL}, has({"x": "-> ../outside"}), "x"),
    conflict("one dirty file among many", {b"%d" % n: EVIL for n in range(50)}, has({"49": "mine\n"}), "49"),
    Row(
        "a symlink through one of the user's is refused",
        tree((LINK, b"l", b"hop/precious.txt")),
        UNSAFE,
        THROUGH,
        here=has({"hop": "-> ../outside"}),
    ),
    Row(
        "a file in a repository inside of the user's is refused",
        tree((FILE, b"nested/deep/x", EVIL)),
        UNSAFE,
        "lies in another repository",
        here=has({"nested/.git/HEAD": "ref: refs/heads/main\n", "nested/deep/y": "mine\n"}),
    ),
    Row(
        "a file in a worktree inside of the user's is refused",
        tree((FILE, b"nested/x", EVIL)),
        UNSAFE,
        "lies in another repository",
        here=has({"nested/.git": "gitdir: ../.git\n"}),
    ),
    Row(
        "a hard link to outside is replaced, and not written through",
        tree((FILE, b"a.txt", EVIL)),
        writes={"a.txt": EVIL},
        here=with_a_neighbour,
    ),
    Row(
        "what the user has besides stays",
        tree((FILE, b"Sub/new", EVIL)),
        writes={"Sub/new": EVIL},
        here=has({"Sub/mine": "mine\n", "a.txt": "mine\n", "build/mine": "mine\n"}),
    ),
]

ROWS = [
    *NAMES, *ODD_BUT_HARMLESS, *LINKS, *KINDS, *COLLISIONS, *AMOUNTS, *CONTENT, *BUNDLES, *AUTHORS, *USERS,
]  # fmt: skip
