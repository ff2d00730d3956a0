"""Hostile results by the names in them and by where their symlinks lead: rows of the table in hostile_results.py."""

from __future__ import annotations

from tests.support.forge import FILE, FOLDER, LINK
from tests.support.hostile_rows import (
    ALIKE,
    BUNDLE,
    ELSEWHERE,
    EVIL,
    GIT,
    INVISIBLE,
    LONG,
    OBJECTS,
    OUT,
    THROUGH,
    UNSAFE,
    UP,
    Row,
    has,
    linked,
    named,
    tree,
)

# -- names ------------------------------------------------------------------------------------------------------------

NAMES = [
    *named(
        UP,
        {
            "a name that goes up": b"../evil",
            "a name that goes down and further up": b"a/../../evil",
            "a name that goes up from deep below": b"Sub/deep/../../../evil",
            "a name that begins in the folder itself": b"./evil",
            "a name that ends in the folder itself": b"evil/.",
        },
    ),
    # `%2f` is a slash within one name of a tree.
    *named(
        UP,
        {
            "one name that holds a way up": b"..%2fevil",
            "one name that goes down and up": b"x%2f..%2f..%2fevil",
            "one name that holds two slashes": b"a%2f%2fb",
        },
    ),
    *named("is no path in the tree", {"an absolute name": b"%2ftmp%2fevil"}),
    *named(
        BUNDLE,
        {
            "an empty name": b"Sub//evil",
            "an empty last name": b"Sub/evil/",
            "an empty first name, which would be absolute,": b"/etc/evil",
        },
    ),
    Row("one name that holds a harmless slash is refused", tree((FILE, b"a%2fb", EVIL)), UNSAFE, OBJECTS),
    *named(
        GIT,
        {
            "a hook": b".git/hooks/post-checkout",
            "git's folder in capitals": b".GIT/config",
            "git's folder in mixed case": b".Git/config",
            "git's folder below": b"Sub/.git/config",
            "a file of that name, which would make a worktree": b".git",
            "git's short name on NTFS": b"git~1/config",
            "git's second short name": b"GIT~2/config",
            "the short name of .gitmodules": b"gitmod~1",
            "its hashed short name": b"gi7eba~1",
            "git's folder with a space after it": b".git /config",
            "git's folder with a dot after it": b".git./config",
            "git's folder with dots and spaces after it": b".git . ./config",
            "git's folder as an NTFS stream": b".git::$INDEX_ALLOCATION/config",
        },
    ),
    *named(
        ELSEWHERE,
        {
            "a stream of a file": b"a.txt:stream",
            "a drive": b"c:evil",
            "a backslash": b"Sub\\evil",
            "a way up with backslashes": b"..\\..\\evil",
            "a name that ends with a dot": b"a.txt.",
            "a folder that ends with a dot": b"Sub./evil",
            "a name that ends with a space": b"a.txt ",
            "a name of three dots": b".../evil",
            "CON": b"CON",
            "con with an ending": b"con.txt",
            "AUX below": b"Sub/AUX",
            "NUL with two endings": b"nul.tar.gz",
            "a printer": b"Lpt1.log",
            "a port with a superscript": "COM\u00b9".encode(),
            "a console": b"CONIN$",
            "a reserved name as a folder": b"prn/evil",
        },
    ),
    *named(
        INVISIBLE,
        {
            "git's folder with a zero-width non-joiner": ".g\u200cit/config".encode(),
            "git's folder with a word joiner": ".gi\u2060t/config".encode(),
            "git's folder after a byte order mark": "\ufeff.git/config".encode(),
            "a zero-width joiner": "a\u200d.txt".encode(),
            "a soft hyphen": "a\u00ad.txt".encode(),
            "a right-to-left override": "photo\u202egpj.sh".encode(),
            "an isolate": "\u2066a.txt\u2069".encode(),
            "a tag character": "a\U000e0041.txt".encode(),
            "a line break": b"new\nline",
            "a carriage return": b"a.txt\r",
            "a tab": b"tab\there",
            "an escape sequence": b"esc\x1b]0;evil\x07",
            "a C1 control": "csi\u009b31m".encode(),
            "a delete": b"del\x7f",
            "a line separator": "a\u2028b".encode(),
            "a paragraph separator": "a\u2029b".encode(),
            "Latin-1": b"caf\xe9",
            "an overlong slash": b"..\xc0\xafevil",
            "a lone surrogate": b"\xed\xa0\x80",
        },
    ),
    Row(
        "the name that is refused is told without what a terminal would do with it",
        tree((FILE, b"esc\x1b]0;x\x07", EVIL)),
        UNSAFE,
        "esc\\x1b]0;x\\x07 has",
    ),
    *named(
        LONG,
        {
            "a name of 256 bytes": b"x" * 256,
            "a name of 86 characters of three bytes": "漢".encode() * 86,
            "a folder of 256 bytes": b"x" * 256 + b"/evil",
        },
    ),
    *named("has a path that is too long", {"a path of 5,000 bytes": b"/".join([b"d" * 200] * 25)}),
    *named("has a path that is too long", {"a path of 600 folders": b"d/" * 600 + b"evil"}),
]

ODD_BUT_HARMLESS = [
    Row(f"{name} is a file like any other", tree((FILE, path, EVIL)), writes={path.decode(): EVIL})
    for name, path in {
        "a name that looks like an option": b"--force",
        "a name that looks like a pattern": b"*[a-z]?",
        "a name that looks like shell": b"$(touch evil);`x`&",
        "a name that looks like a home": b"~/evil",
        "a name that looks like a variable": b"$HOME/evil",
        "a name in full-width letters": "\uff0e\uff47\uff49\uff54/config".encode(),
        "a name of 255 bytes": b"x" * 255,
        "a name that begins with git's": b".gitty/x",
        "a name with two dots in it": b"a..b",
        "a name that begins like a reserved one": b"console.txt",
        "a name that is git's without a dot": b"git/config",
        "a name that is a.txt in another script": "\u0430.txt".encode(),
    }.items()
]

# -- symlinks ---------------------------------------------------------------------------------------------------------

LINKS = [
    *linked(
        OUT,
        {
            "to an absolute place": (b"l", b"/etc/passwd"),
            "to the root": (b"l", b"/"),
            "to its own tree by an absolute name": (b"l", b"//proc/self/cwd/a.txt"),
            "up": (b"l", b"../outside"),
            "up from a folder": (b"x/l", b"../../outside"),
            "up and back into the tree": (b"l", b"../shop/a.txt"),
            "down and further up": (b"l", b"Sub/../../outside/precious.txt"),
            "down and up again, which leads elsewhere once a folder on its way is a symlink": (b"l", b"Sub/../a.txt"),
            "into git's folder": (b"l", b".git/config"),
            "into git's folder from below": (b"Sub/l", b"../.git"),
            "into git's folder by its short name": (b"l", b"GIT~1"),
            "into git's folder by an invisible character": (b"l", ".g\u200cit/config".encode()),
            "into git's folder in capitals": (b"l", b".GIT/hooks"),
            "to nowhere": (b"l", b""),
            "with a NUL": (b"l", b"a.txt\0/etc"),
            "of 6,000 bytes": (b"l", b"a/" * 3000),
            "with backslashes": (b"l", b"..\\outside"),
            "to a drive": (b"l", b"c:/windows"),
        },
    ),
    *linked(
        THROUGH,
        {
            "to one of the base": (b"l", b"out"),
            "through one of the base": (b"l", b"out/precious.txt"),
            "through one of the base that stays inside": (b"l", b"in/b.txt"),
            "to itself": (b"l", b"l"),
            "below itself": (b"l", b"l/x"),
        },
    ),
    Row(
        "two symlinks that lead to each other are refused",
        tree((LINK, b"k", b"l"), (LINK, b"l", b"k")),
        UNSAFE,
        THROUGH,
    ),
    Row(
        "a chain of symlinks that each stay inside is refused",
        tree((LINK, b"d/e/f/top", b"../../../Sub"), (LINK, b"l", b"d/e/f/top/b.txt")),
        UNSAFE,
        THROUGH,
    ),
    Row(
        "a symlink whose way up begins behind another one, higher than it looks, is refused",
        tree((LINK, b"d/e/f/top", b"../../../Sub"), (LINK, b"l", b"d/e/f/top/../../outside/precious.txt")),
        UNSAFE,
        OUT,
    ),
    Row(
        "a folder that becomes a symlink to outside is refused",
        tree((LINK, b"Sub", b"../outside")),
        UNSAFE,
        OUT,
    ),
    Row(
        "a symlink and a file below it are refused",
        lambda forge: forge.with_lines(
            (LINK, b"d", forge.blob(b"../outside")),
            (FOLDER, b"d", forge.tree([(FILE, b"precious.txt", forge.blob(EVIL))])),
        ),
        UNSAFE,
    ),
    Row(
        "a symlink to a place inside and a file below it are refused",
        lambda forge: forge.with_lines(
            (LINK, b"d", forge.blob(b"Sub")), (FOLDER, b"d", forge.tree([(FILE, b"b.txt", forge.blob(EVIL))]))
        ),
        UNSAFE,
    ),
    Row(
        "a file below a symlink of the base takes its place, and nothing of where it led to",
        tree((FILE, b"out/precious.txt", EVIL)),
        writes={"out/precious.txt": EVIL},
    ),
    Row(
        "a symlink of the base that becomes a file is not written through",
        tree((FILE, b"out", EVIL)),
        writes={"out": EVIL},
    ),
    Row("a symlink that leads out and is unchanged may stay", tree((FILE, b"new", EVIL)), writes={"new": EVIL}),
    Row("a symlink inside is written", tree((LINK, b"l", b"Sub/b.txt")), writes={"l": b"Sub/b.txt"}),
    Row("a symlink up to a file inside is written", tree((LINK, b"x/l", b"../a.txt")), writes={"x/l": b"../a.txt"}),
    Row("a symlink to what is not there is written", tree((LINK, b"l", b"nothing")), writes={"l": b"nothing"}),
    Row("a symlink to its own folder is written", tree((LINK, b"l", b".")), writes={"l": b"."}),
]

# -- names that are one on some systems -------------------------------------------------------------------------------

COLLISIONS = [
    *[
        Row(f"{name} are refused", tree(*((FILE, path, EVIL) for path in paths)), UNSAFE, ALIKE)
        for name, paths in {
            "a file of the base in capitals": [b"A.TXT"],
            "a folder of the base in small letters": [b"sub/new.txt"],
            "two files that differ in case": [b"new", b"NEW"],
            "two folders that differ in case": [b"x/a", b"X/b"],
            "a file and a folder that differ in case": [b"x", b"X/b"],
            "an accent on a letter and one beside it": ["é".encode(), "e\u0301".encode()],
            "sharp s and two of it": ["straße".encode(), b"STRASSE"],
            "three sigmas": ["\u03c3".encode(), "\u03c2".encode(), "\u03a3".encode()],
            "the Kelvin sign and a k": ["\u212a".encode(), b"k"],
            "a name and one with a variation selector": [b"x", "x\ufe0f".encode()],
            "a name and one with a filler": [b"x", "x\u3164".encode()],
        }.items()
    ],
    Row(
        "a name that collides with the user's untracked file is refused",
        tree((FILE, b"notes/mine.TXT", EVIL)),
        UNSAFE,
        "differs from another name here",
        here=has({"notes/Mine.txt": "mine\n"}),
    ),
    Row(
        "a name that collides with the user's ignored file is refused",
        tree((FILE, b"Build/x", EVIL)),
        UNSAFE,
        "differs from another name here",
    ),
    Row(
        "a file whose name changes in case alone is renamed",
        lambda forge: forge.of(
            forge.commit(
                forge.tree(
                    [(mode, b"A.txt" if name == b"a.txt" else name, sha) for mode, name, sha in forge.start.entries]
                )
            )
        ),
        writes={"a.txt": None, "A.txt": b"a\n"},
    ),
]
