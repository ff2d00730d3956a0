"""Hostile results, written object by object: nothing of them is written, neither outside nor inside the tree."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path

import pytest

from cloudagent_mcp.apply import apply
from cloudagent_mcp.apply.policy import check_path, is_sensitive
from cloudagent_mcp.apply.tree import Changed, File, InTheWay, Tree
from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.errors import ApplyConflict, CloudAgentError, ConfirmationNeeded, UnsafeChange
from tests.support.git_repos import Result, Workshop, commit, files_of, fingerprint, make_repository, put

AT_FDCWD, RENAME_EXCHANGE = -100, 2
FILE, LINK, SUBMODULE = "100644", "120000", "160000"


class Victim:
    """A repository with other things around it."""

    def __init__(self, folder: Path) -> None:
        self.around = folder / "around"
        self.around.mkdir()
        self.state = folder / "state"
        self.shop = make_repository(
            self.around / "shop", {"a.txt": "a\n", "Sub/b.txt": "b\n", "in": "-> Sub", "out": "-> ../outside"}
        )
        put(self.around, {"outside/precious.txt": "precious\n"})
        self.workshop = Workshop(folder / "workshop", bundle_working_tree(self.shop, base_ref=None).bundle)

    def apply(self, result: Result, *, allow: tuple[str, ...] = ()) -> None:
        apply(
            self.shop,
            task_id=result.task_id,
            branch=result.branch,
            base_sha=result.base_sha,
            input_bundle=result.input_bundle,
            result_bundle=result.result_bundle,
            state_folder=self.state,
            allow_sensitive=allow,
        )

    def refuses(self, error: type[CloudAgentError], result: Result) -> CloudAgentError:
        before = fingerprint(self.around)
        with pytest.raises(error) as refused:
            self.apply(result)
        assert fingerprint(self.around) == before
        return refused.value


@pytest.fixture
def victim(tmp_path: Path) -> Victim:
    return Victim(tmp_path)


PATHS = [
    *[b"../evil", b"x/../../evil", b"./x", b"..%2fevil", b"x%2f..%2f..%2fevil", b"%2ftmp%2fevil", b"a%2fb"],
    *[b".git/hooks/post-checkout", b".GIT/config", b".Git/x", b"x/.git/config", b"git~1/config", b"GIT~1/x"],
    *[b".git /x", b".git./x", b".git::$INDEX_ALLOCATION/x", ".g\u200cit/config".encode(), ".gi\u2060t/x".encode()],
    *[b"x.", b"x ", b"dir./x", b"c:x", b"a\\b", b"..\\..\\evil", b"CON", b"con.txt", b"x/AUX", b"Lpt1.log", b"NUL"],
    *[b"new\nline", b"tab\t", b"esc\x1b[31m", b"del\x7f", b"latin\xe9", "rtl\u202etxt.exe".encode(), b"x" * 256],
    *[b"/".join([b"d" * 200] * 25), b"gi7eba~1"],
]


@pytest.mark.parametrize("path", PATHS, ids=[repr(path[:30]) for path in PATHS])
def test_a_path_that_leads_out_or_into_git_or_means_two_things_is_refused(victim: Victim, path: bytes) -> None:
    refused = victim.refuses(UnsafeChange, victim.workshop.hostile((FILE, path, b"evil")))
    assert refused.message.isprintable()


def test_the_refusal_names_the_path_escaped(victim: Victim) -> None:
    refused = victim.refuses(UnsafeChange, victim.workshop.hostile((FILE, b"esc\x1b]0;x\x07", b"evil")))
    assert "esc\\x1b]0;x\\x07" in refused.message


LINKS = {
    "absolute": [(LINK, b"l", b"/etc/passwd")],
    "up": [(LINK, b"l", b"../outside")],
    "up from a folder": [(LINK, b"x/l", b"../../outside")],
    "up and back": [(LINK, b"l", b"../shop/a.txt")],
    "through one of the base": [(LINK, b"l", b"out/precious.txt")],
    "to one of the base": [(LINK, b"l", b"out")],
    "through one of its own": [(LINK, b"d", b"Sub"), (LINK, b"l", b"d/b.txt")],
    "into git": [(LINK, b"l", b".git/config")],
    "into git by another name": [(LINK, b"l", b"GIT~1")],
    "into git by an invisible name": [(LINK, b"l", ".g\u200cit/config".encode())],
    "empty": [(LINK, b"l", b"")],
    "with a NUL": [(LINK, b"l", b"a.txt\0/etc")],
    "too long": [(LINK, b"l", b"a/" * 3000)],
    "backslash": [(LINK, b"l", b"..\\outside")],
}


@pytest.mark.parametrize("entries", LINKS.values(), ids=LINKS.keys())
def test_a_symlink_that_leads_out_or_through_another_is_refused(
    victim: Victim, entries: list[tuple[str, bytes, bytes]]
) -> None:
    victim.refuses(UnsafeChange, victim.workshop.hostile(*entries))


KINDS = {
    "submodule": (SUBMODULE, b"module", b"x"),
    "setuid": ("104755", b"tool", b"#!/bin/sh\n"),
    "setgid in a folder": ("102755", b"x/tool", b"#!/bin/sh\n"),
    "world-writable": ("100777", b"tool", b"#!/bin/sh\n"),
    "device": ("20644", b"device", b"x"),
    "fifo": ("10644", b"fifo", b"x"),
}


@pytest.mark.parametrize("entry", KINDS.values(), ids=KINDS.keys())
def test_only_files_and_symlinks_are_written(victim: Victim, entry: tuple[str, bytes, bytes]) -> None:
    victim.refuses(UnsafeChange, victim.workshop.hostile(entry))


def test_a_submodule_is_neither_moved_nor_removed(victim: Victim, tmp_path: Path) -> None:
    victim.shop = make_repository(victim.around / "other", {"a": "a\n"})
    make_repository(victim.shop / "module", {"m": "m\n"})
    commit(victim.shop, {})
    workshop = Workshop(tmp_path / "workshop2", bundle_working_tree(victim.shop, base_ref=None).bundle)
    victim.refuses(UnsafeChange, workshop.result({"module": None, "a": "b\n"}))
    victim.refuses(UnsafeChange, workshop.hostile((SUBMODULE, b"module", b"x")))
    victim.refuses(UnsafeChange, workshop.hostile((FILE, b"module", b"x")))


@pytest.mark.parametrize(
    "entries",
    [
        [(FILE, b"A.TXT", b"x")],
        [(FILE, b"sub/new.txt", b"x")],
        [(FILE, b"new", b"x"), (FILE, b"NEW", b"y")],
        [(FILE, "é".encode(), b"x"), (FILE, "e\u0301".encode(), b"y")],
        [(FILE, "straße".encode(), b"x"), (FILE, b"STRASSE", b"y")],
        [(FILE, b"x/a", b"x"), (FILE, b"X/b", b"y")],
    ],
    ids=["with a file", "with a folder", "of two files", "of compositions", "of sharp s", "of two folders"],
)
def test_names_that_only_some_file_systems_tell_apart_are_refused(
    victim: Victim, entries: list[tuple[str, bytes, bytes]]
) -> None:
    victim.refuses(UnsafeChange, victim.workshop.hostile(*entries))


def test_a_name_that_collides_with_an_untracked_one_is_refused(victim: Victim) -> None:
    put(victim.shop, {"notes/Mine.txt": "mine\n"})
    victim.refuses(UnsafeChange, victim.workshop.hostile((FILE, b"notes/mine.TXT", b"x")))


def test_a_symlink_of_the_users_in_a_folders_place_is_not_followed(victim: Victim) -> None:
    put(victim.shop, {"new": "-> ../outside"})
    victim.refuses(ApplyConflict, victim.workshop.result({"new/precious.txt": "evil\n"}))
    put(victim.shop, {"dest": "-> ../outside/precious.txt"})
    victim.refuses(ApplyConflict, victim.workshop.result({"dest": "evil\n"}))
    put(victim.shop, {"hop": "-> ../outside"})
    victim.refuses(UnsafeChange, victim.workshop.result({"l": "-> hop/precious.txt"}))


def test_more_or_larger_files_than_the_limits_are_refused_with_the_numbers(victim: Victim) -> None:
    many = victim.refuses(UnsafeChange, victim.workshop.result({f"{n}.txt": "x" for n in range(2001)}))
    assert "2001" in many.message and "2000" in many.message
    large = victim.refuses(UnsafeChange, victim.workshop.result({"large": b"\0" * (11 * 1024 * 1024)}))
    assert "11 MB" in large.message and "large" in large.message
    total = victim.refuses(
        UnsafeChange, victim.workshop.result({f"{n}": bytes([n]) * (9 * 1024 * 1024) for n in range(6)})
    )
    assert "54 MB" in total.message


SENSITIVE = [
    *[".claude/settings.json", "x/.claude/commands/a.md", "CLAUDE.md", "docs/claude.MD", "AGENTS.md", ".mcp.json"],
    *[".cursor/mcp.json", ".cursorrules", ".gemini/x", ".codex/x", ".vscode/tasks.json", ".idea/x.xml"],
    *[
        "my.code-workspace",
        ".devcontainer/devcontainer.json",
        ".github/workflows/x.yml",
        ".github/actions/a/action.yml",
    ],
    *[".gitlab-ci.yml", ".husky/pre-commit", ".pre-commit-config.yaml", "lefthook.yml", ".envrc", ".env", ".env.local"],
    *["mise.toml", ".gitattributes", "sub/.gitattributes", ".gitmodules", ".gitconfig", ".npmrc", ".yarnrc.yml"],
    *["pip.conf", "x.pth", "sitecustomize.py", ".VSCode/tasks.json", ".GitHub/Workflows/x.yml", "Jenkinsfile"],
    ".cloudagent.toml",
]


@pytest.mark.parametrize("path", SENSITIVE)
def test_files_that_make_machines_execute_things_are_sensitive_in_any_case(path: str) -> None:
    assert is_sensitive(path)
    assert is_sensitive(path.upper())


@pytest.mark.parametrize(
    "path",
    ["README.md", "src/app.py", ".gitignore", "env.py", "github/workflows/x", "claude/x.md", ".github/CODEOWNERS"],
)
def test_ordinary_files_are_not(path: str) -> None:
    assert not is_sensitive(path)
    check_path(path)


def test_a_sensitive_file_is_refused_whether_it_is_new_changed_or_deleted(victim: Victim, tmp_path: Path) -> None:
    shop = make_repository(victim.around / "other", {".envrc": "x\n", "CLAUDE.md": "x\n", "a": "a\n"})
    workshop = Workshop(tmp_path / "workshop2", bundle_working_tree(shop, base_ref=None).bundle)
    victim.shop = shop
    for files in ({".envrc": "y\n"}, {"CLAUDE.md": None}, {".mcp.json": "{}"}, {"b/.envrc": "-> ../a"}):
        refused = victim.refuses(ConfirmationNeeded, workshop.result(files))
        assert next(iter(files)) in refused.message


def test_a_symlink_that_is_swapped_in_during_an_apply_is_never_followed(victim: Victim, tmp_path: Path) -> None:
    names = [f"race/{n}.txt" for n in range(30)]
    shop = make_repository(victim.around / "racing", dict.fromkeys(names, "before\n"))
    put(victim.around, {f"outside/{n}.txt": "before\n" for n in range(30)})
    outside = fingerprint(victim.around / "outside")
    workshop = Workshop(tmp_path / "workshop2", bundle_working_tree(shop, base_ref=None).bundle)
    result = workshop.result({**dict.fromkeys(names, "evil\n"), "race/new.txt": "evil\n", "race/0.txt": None})
    victim.shop = shop
    (shop / "trap").symlink_to(victim.around / "outside")
    folder, trap = os.fsencode(shop / "race"), os.fsencode(shop / "trap")
    stop = threading.Event()
    swaps = 0

    def swap() -> None:
        nonlocal swaps
        libc = ctypes.CDLL(None, use_errno=True)
        while not stop.is_set():
            assert libc.renameat2(AT_FDCWD, folder, AT_FDCWD, trap, RENAME_EXCHANGE) == 0
            swaps += 1

    thread = threading.Thread(target=swap)
    thread.start()
    tries = 0
    deadline = time.monotonic() + 30
    try:
        while tries < 12 and time.monotonic() < deadline:
            try:
                victim.apply(result)
            except CloudAgentError:
                pass
            assert fingerprint(victim.around / "outside") == outside
            tries += 1
    finally:
        stop.set()
        thread.join()
    assert swaps > 1000 and tries == 12


def test_no_step_of_a_write_follows_a_symlink(victim: Victim) -> None:
    outside = fingerprint(victim.around / "outside")
    libc = ctypes.CDLL(None, use_errno=True)
    put(victim.shop, {"race/a.txt": "before\n", "trap": "-> ../outside"})
    put(victim.around, {"outside/a.txt": "before\n", "outside/new": None})
    outside = fingerprint(victim.around / "outside")
    folder, trap = os.fsencode(victim.shop / "race"), os.fsencode(victim.shop / "trap")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            assert libc.renameat2(AT_FDCWD, folder, AT_FDCWD, trap, RENAME_EXCHANGE) == 0

    thread = threading.Thread(target=swap)
    thread.start()
    tree = Tree(victim.shop)
    done = refused = 0
    deadline = time.monotonic() + 30
    try:
        while (done < 300 or refused < 300) and time.monotonic() < deadline:
            for path, file in (("race/new", File(b"evil")), ("race/a.txt", File(b"evil")), ("race/a.txt", None)):
                try:
                    tree.make_folder("race/folder")
                    tree.remove_folder("race/folder")
                    tree.replace(path, file, expected=tree.read(path), temporary="temporary")
                    done += 1
                except (InTheWay, Changed):
                    refused += 1
    finally:
        stop.set()
        thread.join()
        tree.close()
    assert fingerprint(victim.around / "outside") == outside
    assert done >= 300 and refused >= 300


def test_the_honest_part_of_the_corpus_is_applied(victim: Victim) -> None:
    """The workshop itself is no reason to refuse."""
    result = victim.workshop.hostile(
        (FILE, b"new/file", b"x"), ("100755", b"tool", b"x"), (LINK, b"l", b"Sub/b.txt"), (LINK, b"x/l", b"../a.txt")
    )
    victim.apply(result)
    assert {"new/file", "tool", "l", "x/l"} <= files_of(victim.shop).keys()
