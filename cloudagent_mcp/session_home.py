"""A task's session comes home, and one of this machine's goes along with a task.

It comes to where Claude Code on this machine finds it: `claude --resume ID` goes on with it.

What was said comes along and nothing else (see claude_session.py). Below Claude Code's own folder no symlink is
followed. A session that is here already is never written over: it stays as it is, or what is new is added to its end.
"""

from __future__ import annotations

import base64
import errno
import os
import re
import shlex
import stat
import unicodedata
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from cloudagent_queue.agents.claude_session import (
    LARGEST,
    Conversation,
    as_session,
    count_turns_of_session,
    read_conversation,
)
from cloudagent_storage.errors import (
    NoSession,
    SessionDiverged,
    SessionMalformed,
    SessionPlaceUnsafe,
    SessionTooLarge,
    TargetNotAllowed,
)
from cloudagent_storage.records import Record

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
PACKED_MAX = 3_000_000
"""Characters of a packed session: a request to REST may have 4 MB."""
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_HERE_MAX = 4 * LARGEST
"""Bytes of a session that is here already and is still compared."""


class SessionHome(Record):
    """A session that Claude Code on this machine finds."""

    task_id: str
    session_id: str
    turns: int
    """How many messages came along: all of them."""
    sha256: str
    """Of the transcript as it came along."""
    outcome: Literal["placed", "extended", "already_here"]
    directory: str
    command: str
    """The line to type to go on with it."""


def bring_home(session: bytes, *, task_id: str, directory: Path, environment: Mapping[str, str]) -> SessionHome:
    """Put a session where `claude --resume` in `directory` finds it.

    `environment` says where Claude Code has its folder. Raises errors under `SessionRefused`, and `TargetNotAllowed`
    when there is no such directory; nothing is written then.
    """
    try:
        folder = unicodedata.normalize("NFC", str(directory.resolve(strict=True)))
        if not directory.is_dir():
            raise NotADirectoryError
    except (OSError, RuntimeError):
        raise TargetNotAllowed("There is no such directory.") from None
    found = read_conversation(session, folder=folder)
    if count_turns_of_session(session) != found.turns:
        raise SessionMalformed("Some turns of the session would have been lost.")
    outcome = _place(found, _claude_folder(environment), folder)
    return SessionHome(
        task_id=task_id,
        session_id=found.session_id,
        turns=found.turns,
        sha256=found.digest,
        outcome=outcome,
        directory=folder,
        command=f"cd {shlex.quote(folder)} && claude --resume {found.session_id}",
    )


def take_along(name: str, *, directory: Path, environment: Mapping[str, str]) -> str:
    """A session of this machine, packed for a task to go on with: what was said in it, and nothing else.

    `name` is its id, or `current`: the one that this process was started from, or the newest of the directory.
    Raises `NoSession`, `SessionMalformed` and `SessionTooLarge`.
    """
    from claude_agent_sdk import project_key_for_directory

    projects = _claude_folder(environment) / "projects"
    project = projects / project_key_for_directory(str(directory.resolve()))
    if name == "current":
        within = environment.get("CLAUDE_CODE_SESSION_ID") or ""
        found = list(projects.glob(f"*/{within}.jsonl")) if _ID.fullmatch(within) else list(project.glob("*.jsonl"))
    else:
        found = list(projects.glob(f"*/{name}.jsonl")) if _ID.fullmatch(name) else []
    if not found:
        raise NoSession(
            "There is no such session on this machine.",
            remedy="Name one that `claude --resume` lists.",
            field="session",
        )
    newest = max(found, key=lambda file: (file.parent == project, file.stat().st_mtime))
    with newest.open("rb") as file:
        text = file.read(LARGEST + 1)
    # A line that is being written now is left out.
    transcript = text[: text.rfind(b"\n") + 1].decode("utf-8", "replace")
    said = read_conversation(as_session(newest.stem, transcript), folder="/")
    packed = base64.b64encode(zlib.compress(as_session(said.session_id, said.data.decode()), 9)).decode()
    if len(packed) > PACKED_MAX:
        raise SessionTooLarge(
            "The session is larger than can be taken along.", remedy="Say what matters in the prompt."
        )
    return packed


def unpack(packed: str) -> bytes:
    """What `take_along` has packed, or somebody else. Raises `SessionMalformed` and `SessionTooLarge`."""
    try:
        expand = zlib.decompressobj()
        session = expand.decompress(base64.b64decode(packed, validate=True), LARGEST)
    except (ValueError, zlib.error):
        raise SessionMalformed() from None
    if expand.unconsumed_tail:
        raise SessionTooLarge()
    return session


def _claude_folder(environment: Mapping[str, str]) -> Path:
    if configured := environment.get("CLAUDE_CONFIG_DIR"):
        return Path(unicodedata.normalize("NFC", configured)).absolute()
    if not (home := environment.get("HOME")):
        raise SessionPlaceUnsafe("Nobody says where Claude Code keeps its sessions.", remedy="Set CLAUDE_CONFIG_DIR.")
    return Path(home).absolute() / ".claude"


def _place(found: Conversation, claude: Path, folder: str) -> Literal["placed", "extended", "already_here"]:
    from claude_agent_sdk import project_key_for_directory

    try:
        claude.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _opened(claude, "projects", project_key_for_directory(folder)) as project:
            name = f"{found.session_id}.jsonl"
            try:
                file = os.open(name, _FILE, dir_fd=project)
            except FileNotFoundError:
                with suppress(FileExistsError):  # somebody else was first
                    _make(project, name, found.data)
                    return "placed"
                file = os.open(name, _FILE, dir_fd=project)
            with os.fdopen(file, "r+b", buffering=0) as here:
                return _extend(here.fileno(), found.data)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.EISDIR, errno.EEXIST):
            raise SessionPlaceUnsafe() from None
        raise SessionPlaceUnsafe(
            "Claude Code's folder cannot be written to.", remedy="Check its permissions."
        ) from error


@contextmanager
def _opened(top: Path, *names: str) -> Generator[int]:
    """A descriptor of the folder of these names, one in the other, below `top`; made where it is missing.

    `top` is what the user says it is, and may be a symlink of theirs. Nothing below may.
    """
    folder = os.open(top, _FOLDER & ~os.O_NOFOLLOW)
    try:
        for name in names:
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=folder)
            inner = os.open(name, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
        yield folder
    finally:
        os.close(folder)


def _make(folder: int, name: str, data: bytes) -> None:
    """A whole file under a name that nothing has; who comes second gets `FileExistsError`."""
    fresh = f".{name}.{os.urandom(8).hex()}"
    try:
        with os.fdopen(os.open(fresh, _NEW, 0o600, dir_fd=folder), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(fresh, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(fresh, dir_fd=folder)
    os.fsync(folder)


def _extend(file: int, data: bytes) -> Literal["extended", "already_here"]:
    """Add what is new to a session that is here already. It has turns of its own where it is longer."""
    about = os.fstat(file)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1:
        raise SessionPlaceUnsafe()
    here = os.pread(file, min(about.st_size, _HERE_MAX), 0)
    if here.startswith(data):
        return "already_here"
    if not data.startswith(here):
        raise SessionDiverged()
    # To the file's end, so that nothing is overwritten; a crash in the middle leaves a beginning, as before.
    rest = data[len(here) :]
    while rest:
        rest = rest[os.write(file, rest) :]
    os.fsync(file)
    return "extended"
