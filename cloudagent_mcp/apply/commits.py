"""The commits that a branch of the user's gets: the agent's own, or one for all; without what was not the task's.

A task that started from uncommitted work has it as a commit of ours below the agent's. A branch would drag it along as
somebody's commit; so the same commits are made anew on the commit that the user was on, with the task's changes alone.
Where these touch what was not committed, that cannot be: then it stays below them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloudagent_mcp.apply.policy import check_changes, is_sensitive
from cloudagent_mcp.untrusted import clean
from cloudagent_queue import git
from cloudagent_queue.repository import ChangedFile, LocalRepository, Quarantine, origin_of
from cloudagent_queue.repository.working_tree import quoted
from cloudagent_storage.errors import UnsafeChange

TASK = "Cloudagent-Task"
"""The trailer of a commit that is a whole task: the task's id."""
COMMITS_LIMIT = 300
"""Each is looked at before it is kept."""
_REGULAR = frozenset({"100644", "100755"})
_NONE = ("000000", "")
_Entry = tuple[str, str]
"""A mode and the id of an object; `_NONE` for no file."""


@dataclass(frozen=True)
class Commits:
    """What a branch is to hold."""

    tip: str
    start: str
    """The commit that it grows out of: one of the user's, but for a task that had no repository."""
    count: int
    holds_uncommitted: bool
    """Is what the user had not committed in it, as a commit of its own below the task's?"""
    left_out_uncommitted: bool
    """Was there such work, and is it not in it?"""
    about: tuple[str, ...]
    """What it is made of, the same for the same outcome; without the time of a commit that is made now."""


class _Earlier(Quarantine):
    """A result as it was some commits before its end. Its objects were checked with it."""

    def check_objects(self) -> None:
        """They were."""


def check_history(quarantine: Quarantine) -> list[str]:
    """Look at every commit before the last as at a result of its own: with the branch, all can be checked out.

    The sensitive files that only those have. Raises `UnsafeChange`.
    """
    now = {file.path for file in quarantine.changed_files(renames=False)}
    commits = quarantine.run("rev-list", quarantine.head, "--not", quarantine.base).text.split()
    if len(commits) > COMMITS_LIMIT:
        raise UnsafeChange(
            f"The result has {len(commits)} commits; at most {COMMITS_LIMIT} are kept. Nothing was written.",
            remedy="Take it as one commit: squash=true (`--squash`).",
        )
    found: set[str] = set()
    for commit in commits:
        if commit == quarantine.head:
            continue
        earlier = _Earlier(quarantine.folder, quarantine.base, commit, b"")
        files: Sequence[ChangedFile] = earlier.changed_files(renames=False)
        try:
            check_changes(earlier, files)
        except UnsafeChange as refusal:
            raise UnsafeChange(
                f"In an earlier commit of the result: {refusal.message}",
                remedy="Take the result as one commit: squash=true (`--squash`).",
                files=refusal.files,
            ) from None
        found |= {file.path for file in files if is_sensitive(file.path)}
    return sorted(found - now)


def make_commits(
    quarantine: Quarantine, repository: LocalRepository | None, *, task_id: str, title: str = "", squash: bool = False
) -> Commits:
    """The commits, in the quarantine; `bring` brings them. `repository` holds the base, or what that was made on."""
    origin = origin_of(quarantine.run("show", "--no-patch", "--format=%B", quarantine.base).text)
    listing = ["rev-list", "--topo-order", "--reverse", quarantine.head, "--not", quarantine.base]
    theirs = quarantine.run(*listing).text.split()
    if repository is None:
        return Commits(quarantine.head, quarantine.base, len(theirs), False, False, (quarantine.head,))
    run = _both(quarantine, repository)
    start, tip, uncommitted = quarantine.base, quarantine.head, False
    had_uncommitted = False
    if origin is not None and repository.commit(origin) is not None:
        start = origin
        had_uncommitted = bool(run("diff-tree", "-r", "--name-only", origin, quarantine.base).out)
        moved = _moved(run, theirs, quarantine.base, origin)
        if moved is None:
            uncommitted = True
            # Of a shallow clone that commit has no parent, and the branch would have a history of its own.
            base = _rewritten(run, quarantine.base, parents={}, also=[origin])
            moved = quarantine.head if base == quarantine.base else _moved(run, theirs, quarantine.base, base)
        tip = moved or quarantine.head
    count = len(theirs)
    about = (start, tip)
    if squash:
        below = start
        if uncommitted:
            below = run("rev-list", "--topo-order", "--reverse", tip, "--not", start).text.split()[0]
        message, authors = _squashed_message(run, theirs, task_id=task_id, title=title)
        tree = run("rev-parse", f"{tip}^{{tree}}").text
        committer = b"%s %d +0000" % (_committer(repository), time.time())
        head = b"tree %s\nparent %s\nauthor %s\ncommitter %s\n\n" % (
            *(part.encode() for part in (tree, below)),
            authors,
            committer,
        )
        tip = run("hash-object", "-t", "commit", "-w", "--stdin", stdin=head + message).text
        count, about = 1, (below, tree, message.decode("utf-8", "replace"))
    return Commits(
        tip=tip,
        start=start,
        count=count,
        holds_uncommitted=uncommitted and had_uncommitted,
        left_out_uncommitted=had_uncommitted and not uncommitted,
        about=about,
    )


def bring(quarantine: Quarantine, repository: LocalRepository, commits: Commits) -> None:
    """Give the repository the objects of the commits; no ref is moved, and what it has is not sent."""
    there = [name for name in (commits.start, quarantine.base) if repository.commit(name) is not None]
    wanted = "\n".join([commits.tip, "--not", *there, ""])
    pack = _both(quarantine, repository)("pack-objects", "--quiet", "--revs", "--stdout", stdin=wanted.encode())
    repository.run("index-pack", "--stdin", stdin=pack.out, timeout_s=600)


def _both(quarantine: Quarantine, repository: LocalRepository) -> Callable[..., git.Done]:
    """git that reads the user's objects as well as the quarantine's, and writes to these."""
    places = [repository.path("objects"), quarantine.folder / "objects"]
    env = {
        "GIT_OBJECT_DIRECTORY": str(places[1]),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": quoted(places[0].resolve()),
    }

    def run(*arguments: str, **options: Any) -> git.Done:
        return repository.run(*arguments, **{**options, "env": {**env, **options.get("env", {})}})

    return run


def _moved(run: Callable[..., git.Done], commits: Sequence[str], base: str, onto: str) -> str | None:
    """The newest of these commits, on `onto` instead of on `base`; None where they change what the two differ in."""
    differing = {path: (new, old) for path, (old, new) in _changed(run, onto, base).items()}
    made = {base: onto}
    try:
        for commit in commits:
            tree = None
            if differing:
                tree = _tree_without(run, commit, base, differing)
                if tree is None:
                    return None
            made[commit] = _rewritten(run, commit, parents=made, tree=tree)
    except git.GitFailed:  # a file where the other side has a folder
        return None
    return made[commits[-1]] if commits else None


def _tree_without(
    run: Callable[..., git.Done], commit: str, base: str, differing: Mapping[str, tuple[_Entry, _Entry]]
) -> str | None:
    """A commit's tree in which `differing` files, pairs of how base and the new start have them, are as in the latter,
    with the commit's own changes. None where it cannot be."""
    own = _changed(run, base, commit)
    wanted: dict[str, _Entry] = {}
    for path, (in_base, in_start) in differing.items():
        entry = own[path][1] if path in own else in_base
        if entry == in_start:
            continue
        if entry != in_base:
            merged = _merged(run, in_start, in_base, entry)
            if merged is None:
                return None
            in_start = merged
        wanted[path] = in_start
    with tempfile.TemporaryDirectory(prefix="cloudagent-index-") as temporary:
        env = {"GIT_INDEX_FILE": str(Path(temporary) / "index")}
        run("read-tree", commit, env=env)
        nothing = "0" * len(commit)
        lines = [f"{mode} {name or nothing}\t{path}\0" for path, (mode, name) in wanted.items()]
        lines.sort(key=lambda line: not line.startswith("000000"))  # first what makes room
        stdin = "".join(line.replace("000000", "0", 1) if line.startswith("000000") else line for line in lines)
        run("update-index", "-z", "--index-info", stdin=stdin.encode("utf-8", "surrogateescape"), env=env)
        return run("write-tree", env=env).text


def _merged(run: Callable[..., git.Done], here: _Entry, base: _Entry, there: _Entry) -> _Entry | None:
    """A file with the changes of both sides, or None."""
    if not {here[0], base[0], there[0]} <= _REGULAR:
        return None
    mode = there[0] if here[0] == base[0] else here[0]
    if base[1] in (here[1], there[1]):
        return mode, there[1] if here[1] == base[1] else here[1]
    with tempfile.TemporaryDirectory(prefix="cloudagent-merge-") as name:
        for part, entry in (("here", here), ("base", base), ("there", there)):
            (Path(name) / part).write_bytes(run("cat-file", "blob", entry[1]).out)
        done = git.run("merge-file", "-p", "-q", "here", "base", "there", folder=Path(name), ok=range(256))
    if done.exit_code != 0:
        return None
    return mode, run("hash-object", "-w", "--stdin", stdin=done.out).text


def _changed(run: Callable[..., git.Done], old: str, new: str) -> dict[str, tuple[_Entry, _Entry]]:
    out = run("diff-tree", "-r", "-z", "--raw", "--no-renames", "--full-index", old, new).out
    fields = iter(out.decode("utf-8", "surrogateescape").split("\0")[:-1])
    found: dict[str, tuple[_Entry, _Entry]] = {}
    for about, path in zip(fields, fields, strict=True):
        old_mode, new_mode, old_id, new_id, _ = about[1:].split(" ")
        before, after = ((m, i) if m != "000000" else _NONE for m, i in ((old_mode, old_id), (new_mode, new_id)))
        found[path] = (before, after)
    return found


def _rewritten(
    run: Callable[..., git.Done],
    commit: str,
    *,
    parents: Mapping[str, str],
    tree: str | None = None,
    also: Sequence[str] = (),
) -> str:
    """The same commit, its author and its message as they are, with other parents and another tree.

    `also` are the parents of one that has none. A signature would not be good any more, and goes.
    """
    head, separator, message = run("cat-file", "commit", commit).out.partition(b"\n\n")
    lines: list[bytes] = []
    dropping = False
    for line in head.split(b"\n"):
        name, _, value = line.partition(b" ")
        if name:
            dropping = name in (b"gpgsig", b"gpgsig-sha256", b"mergetag")
        if dropping:
            continue
        if name == b"tree" and tree is not None:
            line = b"tree " + tree.encode()
        if name == b"parent":
            line = b"parent " + parents.get(value.decode(), value.decode()).encode()
        lines.append(line)
    if not any(line.startswith(b"parent ") for line in lines):
        lines[1:1] = [b"parent " + parent.encode() for parent in also]
    same = b"\n".join(lines) + separator + message
    return run("hash-object", "-t", "commit", "-w", "--stdin", stdin=same).text


def _squashed_message(
    run: Callable[..., git.Done], commits: Sequence[str], *, task_id: str, title: str
) -> tuple[bytes, bytes]:
    """The message and the author line of one commit for all: the newest one's author, the others beside it."""
    lines = [_author_of(run("cat-file", "commit", commit).out) for commit in commits]
    author = lines[-1]
    names = list(dict.fromkeys(_name(line) for line in lines))
    names.remove(_name(author))
    title = " ".join(clean(title).split())[:200] or f"Task {task_id}"
    trailers = [f"{TASK}: {task_id}".encode(), *(b"Co-authored-by: " + name for name in names)]
    return title.encode() + b"\n\n" + b"\n".join(trailers) + b"\n", author


def _author_of(commit: bytes) -> bytes:
    head = commit.partition(b"\n\n")[0]
    return next(line[len(b"author ") :] for line in head.split(b"\n") if line.startswith(b"author "))


def _name(line: bytes) -> bytes:
    """Name and address, without the time."""
    return line.rpartition(b">")[0] + b">"


def _committer(repository: LocalRepository) -> bytes:
    """The user's own identity as git has it here, or ours where there is none."""
    who = {"HOME": str(Path.home()), "PATH": git.PATH}
    said = [
        git.run("config", "--get", f"user.{part}", folder=repository.top, configured_by=who, ok=(0, 1)).text
        for part in ("name", "email")
    ]
    name, address = (" ".join(clean(text).translate({ord("<"): None, ord(">"): None}).split()) for text in said)
    if not name or not address:
        name, address = git.AUTHOR["GIT_COMMITTER_NAME"], git.AUTHOR["GIT_COMMITTER_EMAIL"]
    return f"{name} <{address}>".encode()
