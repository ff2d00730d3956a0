"""git on the host, run so that neither a repository nor its content can make it execute anything.

Hooks, fsmonitor, prompts, odd protocols and the configuration of system and user are off; what a call needs of them it
asks for. Settings travel in the environment and not on the command line, since process lists are public.
"""

from __future__ import annotations

import functools
import os
import re
import resource
import selectors
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cloudagent_storage.errors import GitMissing, Internal

MB = 1024 * 1024
OLDEST = (2, 32)
STDERR_LIMIT = 64 * 1024
GIVE_UP_WITHIN_S = 0.2
PATH = "/usr/local/bin:/usr/bin:/bin"

SETTINGS: Mapping[str, str] = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.splitIndex": "false",
    "core.protectHFS": "true",
    "core.protectNTFS": "true",
    "core.bigFileThreshold": "16m",
    "core.attributesFile": "/dev/null",
    "core.excludesFile": "/dev/null",
    "submodule.recurse": "false",
    "fetch.recurseSubmodules": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "commit.gpgSign": "false",
    "advice.addEmbeddedRepo": "false",
    "advice.detachedHead": "false",
    "protocol.allow": "never",
}

AUTHOR: Mapping[str, str] = {
    f"GIT_{role}_{part}": value
    for role in ("AUTHOR", "COMMITTER")
    for part, value in (("NAME", "cloudagent"), ("EMAIL", "cloudagent@localhost"))
}
"""The author and committer of commits that the product makes."""


class GitFailed(Internal):
    """git could not do what it was asked to."""

    def __init__(self, *, exit_code: int | None, stderr: str) -> None:
        super().__init__()
        self.exit_code = exit_code
        """None when it did not end in time."""
        self.stderr = stderr
        """Untrusted, and may name paths and addresses: to be looked at, never to be shown."""


class TooMuchOutput(Internal):
    """git printed more than the limit."""


@dataclass(frozen=True)
class Done:
    """How git ended."""

    exit_code: int
    out: bytes

    @property
    def text(self) -> str:
        """What it printed, without the last line's end. Bytes that are no UTF-8 survive as surrogates."""
        return self.out.decode("utf-8", "surrogateescape").rstrip("\n")


def run(
    *arguments: str,
    folder: Path,
    stdin: bytes = b"",
    settings: Sequence[tuple[str, str]] = (),
    env: Mapping[str, str] | None = None,
    configured_by: Mapping[str, str] | None = None,
    protocols: Sequence[str] = (),
    ok: Sequence[int] = (0,),
    timeout_s: float = 120.0,
    max_bytes: int = 256 * MB,
    cut: bool = False,
    max_memory: int | None = None,
    give_up: threading.Event | None = None,
) -> Done:
    """Run git in `folder` to its end.

    `settings` are added to ours, and win. `configured_by` is the environment of the one whose own git configuration,
    credential helpers and ssh keys may be used; without it nobody's are. With `cut`, only the first `max_bytes` of its
    output are wanted: a longer one is no error.

    Raises `GitMissing` (also for one that is too old), `TooMuchOutput`, and `GitFailed` for an exit code that is not
    in `ok`, when time is up, or when `give_up` was set meanwhile.
    """
    environment = _environment(
        [*SETTINGS.items(), *((f"protocol.{protocol}.allow", "always") for protocol in protocols), *settings],
        env or {},
        configured_by,
    )
    within = _within(max_memory)
    with tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)
        process = subprocess.Popen(
            [*within, _program(), *arguments],
            cwd=folder,
            env=environment,
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # no terminal to ask on, and a process group to end as a whole
        )
    with process:
        try:
            if max_memory is not None and not within and hasattr(resource, "prlimit"):
                with suppress(ProcessLookupError, PermissionError):  # the latter in a process that has changed its user
                    resource.prlimit(process.pid, resource.RLIMIT_AS, (max_memory, max_memory))
            out, err, ended = _read(
                process, max_bytes=max_bytes, deadline=time.monotonic() + timeout_s, give_up=give_up
            )
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            exit_code = process.wait()
    if len(out) > max_bytes:
        if not cut:
            raise TooMuchOutput()
        return Done(0, out[:max_bytes])
    if not ended or exit_code not in ok:
        raise GitFailed(exit_code=exit_code if ended else None, stderr=err.decode("utf-8", "replace"))
    return Done(exit_code, out)


def _read(
    process: subprocess.Popen[bytes], *, max_bytes: int, deadline: float, give_up: threading.Event | None
) -> tuple[bytes, bytes, bool]:
    """What it prints, at most one byte more than `max_bytes`, and whether it ended by itself."""
    assert process.stdout is not None and process.stderr is not None
    out, err = bytearray(), bytearray()
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ, (out, max_bytes + 1))
        waiting.register(process.stderr, selectors.EVENT_READ, (err, STDERR_LIMIT))
        while waiting.get_map():
            left = deadline - time.monotonic()
            if left <= 0 or len(out) > max_bytes or (give_up is not None and give_up.is_set()):
                return bytes(out), bytes(err), False
            for key, _ in waiting.select(left if give_up is None else min(left, GIVE_UP_WITHIN_S)):
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    waiting.unregister(key.fileobj)
                kept, limit = key.data
                kept += chunk[: limit - len(kept)]
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return bytes(out), bytes(err), False
    return bytes(out), bytes(err), True


def _environment(
    settings: Sequence[tuple[str, str]], env: Mapping[str, str], configured_by: Mapping[str, str] | None
) -> dict[str, str]:
    if configured_by is None:
        base = {
            "PATH": f"{Path(_program()).parent}:{PATH}",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_ATTR_NOSYSTEM": "1",
        }
    else:
        # What names a repository would make git work on another one than it is told to.
        named = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_NAMESPACE", "GIT_OBJECT_DIRECTORY", "GIT_CONFIG")
        base = {name: value for name, value in configured_by.items() if not name.startswith(named)}
    base |= {
        "LC_ALL": "C",
        "GIT_TERMINAL_PROMPT": "0",
        "SSH_ASKPASS_REQUIRE": "never",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_CONFIG_COUNT": str(len(settings)),
    }
    for number, (key, value) in enumerate(settings):
        base |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return {**base, **env}


def _program() -> str:
    program = shutil.which("git")
    if program is None:
        raise GitMissing()
    return _recent(program)


def _within(max_memory: int | None) -> list[str]:
    """What is put before a command so that it never has more address space: a limit that is set once it runs may come
    too late. Empty where there is no such program (it is part of util-linux)."""
    program = None if max_memory is None else shutil.which("prlimit", path=PATH)
    return [] if program is None else [program, f"--as={max_memory}"]


@functools.cache
def _recent(program: str) -> str:
    # An older git would not read our settings from the environment, and run hooks after all.
    said = subprocess.run([program, "version"], capture_output=True, text=True, env={"LC_ALL": "C"}).stdout
    version = re.search(r"(\d+)\.(\d+)", said)
    if version is None or (int(version[1]), int(version[2])) < OLDEST:
        raise GitMissing(f"git is too old; {OLDEST[0]}.{OLDEST[1]} or newer is needed.", remedy="Install a newer git.")
    return program
