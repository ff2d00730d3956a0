"""Results that nobody thought of: refused, and nothing has changed; or applied, and what is there is what was sent."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cloudagent_storage import errors
from cloudagent_storage.errors import CloudAgentError
from tests.support.forge import EXECUTABLE, FILE, FOLDER, LINK, SUBMODULE, Entry, Forge
from tests.support.premises import Premises

EXAMPLES, FULL = 60, 500

T = TypeVar("T")


def often(*choices: tuple[int, st.SearchStrategy[T]]) -> st.SearchStrategy[T]:
    """One of them, as often as its number says."""
    return st.sampled_from([choice for times, choice in choices for _ in range(times)]).flatmap(lambda chosen: chosen)


PLAIN = st.sampled_from(
    ["a.txt", "Sub", "deep", "b.txt", "c.txt", "in", "out", "new", "x", "y", "d", "mine.txt", "build"]
)
ODD = (
    st.sampled_from(["NEW", "sub", "X", "A.TXT", "e\u0301", "\u00e9", "x\ufe0f", ".git", ".GIT", "git~1", ".g\u200cit"])
    | st.sampled_from(["..", ".", "", "con", "a:b", "a\\b", "a/b", "../x", "x.", "\x1b", "-x", "*", ".envrc", "~", " "])
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=4)
)
NAMES = often((16, PLAIN.map(str.encode)), (1, ODD.map(str.encode)), (1, st.binary(min_size=1, max_size=4)))
TARGETS = st.lists(
    st.sampled_from(["..", ".", "Sub", "deep", "in", "out", "d", "x", "outside", "a.txt", "", ".git"]), max_size=5
).map(lambda parts: "/".join(parts).encode())
CONTENT = st.sampled_from([b"", b"evil\n", b"a\n", b"\0\1", b"a\r\nb\n"]) | st.binary(max_size=20)
MODES = st.sampled_from([FILE] * 25 + [EXECUTABLE] * 6 + ["100664", "104755", "100600"])

Line = tuple[str, bytes, "bytes | Sequence[Line]"]
"""Mode, name and content: of a folder, its lines."""

FILES: st.SearchStrategy[Line] = often(
    (12, st.tuples(MODES, NAMES, CONTENT)),
    (4, st.tuples(st.just(LINK), NAMES, TARGETS)),
    (1, st.tuples(st.just(SUBMODULE), NAMES, st.just(b""))),
)


def folders(inner: st.SearchStrategy[Line]) -> st.SearchStrategy[Line]:
    return st.tuples(st.just(FOLDER), NAMES, st.lists(inner, min_size=1, max_size=3))


LINES = st.lists(st.recursive(FILES, folders, max_leaves=4), min_size=1, max_size=3)


def tree_of(forge: Forge, lines: Sequence[Line], rest: Sequence[Entry] = ()) -> str:
    """A tree of these lines, and of those of the rest that have other names."""
    entries = [entry for entry in rest if entry[1] not in {name for _, name, _ in lines}]
    for mode, name, inner in lines:
        sha = (
            "1" * 40 if mode == SUBMODULE else forge.blob(inner) if isinstance(inner, bytes) else tree_of(forge, inner)
        )
        entries.append((mode, name, sha))
    return forge.tree(entries)


def files_in(lines: Sequence[Line], above: str = "") -> Iterator[tuple[str, str, bytes]]:
    """Path, mode and content of every file."""
    for mode, name, inner in lines:
        path = above + os.fsdecode(name)
        if isinstance(inner, bytes):
            yield path, mode, inner
        else:
            yield from files_in(inner, f"{path}/")


def seen(premises: Premises) -> dict[str, tuple[str, bytes]]:
    """The working tree as git sees it, and what git ignores."""
    found: dict[str, tuple[str, bytes]] = {}
    for path, (mode, content) in premises.tree().items():
        if stat.S_ISLNK(mode):
            found[path] = (LINK, content)
        elif stat.S_ISREG(mode):
            found[path] = (EXECUTABLE if mode & 0o100 else FILE, content)
    return found


CODES = {
    kind.code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CloudAgentError)
} - {"internal"}


def test_a_generated_result_is_refused_or_applied_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    built = Premises.build(tmp_path / "built")
    places = [built.copy(tmp_path / "0")]
    refused = applied = 0

    @settings(
        max_examples=FULL if request.config.getoption("--full") else EXAMPLES,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow],
        deadline=None,
        database=None,
    )
    @given(lines=LINES, name_all=st.booleans())
    def one(lines: Sequence[Line], name_all: bool) -> None:
        nonlocal refused, applied
        premises = places[-1]
        premises.live_in(monkeypatch)
        forge = premises.forge()
        result = forge.of(forge.commit(tree_of(forge, lines, forge.start.entries)))
        before, tree, around = premises.look(), premises.tree(), premises.look_around(result)
        had = seen(premises)
        try:
            premises.apply(result, allow=tuple(path for path, _, _ in files_in(lines)) if name_all else ())
        except CloudAgentError as error:
            assert error.code in CODES and error.message.isprintable() and str(tmp_path) not in error.message
            assert premises.look() == before
            refused += 1
            return
        applied += 1
        replaced = {os.fsdecode(name) for _, name, _ in lines}
        stays = {path: file for path, file in had.items() if path.partition("/")[0] not in replaced}
        sent = {path: (FILE if mode == "100664" else mode, content) for path, mode, content in files_in(lines)}
        ignored = {path: had[path] for path in ("mine.txt", "build/output.o")}
        assert seen(premises) == {**stays, **ignored, **sent}
        assert premises.look_around(result) == around
        premises.undo(result)
        assert premises.tree() == tree and premises.look_around(result) == around
        places.append(built.copy(tmp_path / str(len(places))))

    one()
    assert refused >= 3 and applied >= 3
