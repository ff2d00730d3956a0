"""Where agents run. A provider is one file here and one line in `PROVIDERS`.

Paths are relative to the sandbox's root and may not leave it; `Sandbox.root` is that root as the processes inside see
it. Everything in a sandbox belongs to a hostile agent: nothing read from it is trusted, and no path in it is followed
through a symlink.
"""

from __future__ import annotations

import contextlib
import importlib
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from cloudagent_storage.errors import SandboxUnavailable, UnknownProvider


@dataclass(frozen=True)
class CommandResult:
    """How a command in a sandbox ended."""

    exit_code: int | None
    """None when it was killed because its time was up."""
    output: str
    """Standard output and standard error together; the middle is left out when it is long."""


@dataclass(frozen=True)
class SandboxSpec:
    """What a new sandbox is to be."""

    template: str | None = None
    """The provider's name of what it starts from: an image, or a snapshot; None for the provider's own choice."""
    egress: Sequence[str] | None = None
    """The hosts that its processes may reach: `host`, `host:port`, `*.domain`; None for any."""


PLAIN = SandboxSpec()


@dataclass(frozen=True)
class Resources:
    """What a sandbox occupies, as its provider bills it."""

    cpus: float
    memory_mb: float


@dataclass(frozen=True)
class SandboxInfo:
    """A sandbox as its provider lists it."""

    id: str
    metadata: Mapping[str, str]


class Watched(NamedTuple):
    """A look at a file that the started command writes."""

    data: bytes
    alive: bool
    """Did the command run when the look began? If not, there is nothing more to come after `data`."""


class Sandbox(Protocol):
    """One isolated place with a file system and processes.

    Every method raises `SandboxGone` when the sandbox is confirmed dead, and `SandboxUnreachable` when it does not
    answer and may still live. The two must never be mixed up: a sandbox that may live holds the work.
    """

    id: str
    root: str
    """The sandbox's folder as processes inside see it, for example `/sandbox`."""
    python: str
    """An interpreter inside that can import claude_agent_sdk."""
    resources: Resources | None
    """What it occupies, where that costs something."""
    remark: str | None
    """What its user should know of how it was made, if anything."""

    def start(self, command: Sequence[str], *, env: Mapping[str, str], number: int = 1) -> None:
        """Start a command, detached: it outlives this process. It becomes the started command of this sandbox.

        Its working directory is the root; `env` is its whole environment beside PATH, HOME, LANG and TMPDIR, which it
        may override. However many try, each `number` is started once, none after a higher one, and none while an
        earlier command runs: `SandboxError` is raised then.
        """
        ...

    def alive(self) -> bool:
        """Is the started command still running, which is the last that was started?"""
        ...

    def stop(self) -> None:
        """Ask the started command to end (SIGTERM). Returns at once; `kill` is the last word."""
        ...

    def end_processes(self) -> None:
        """End every process in the sandbox and keep its files. Returns when they are gone."""
        ...

    def run(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        home: str | None = None,
    ) -> CommandResult:
        """Run a command to its end beside whatever else runs here; what it leaves running ends with it.

        `cwd` and `home` (its HOME) are folders under the root; `SandboxError` is raised for any other. A command that
        does not exist ends with 127, one that a signal ended with 128 and the signal's number.
        """
        ...

    def read(self, path: str, *, offset: int = 0, max_bytes: int) -> bytes:
        """At most `max_bytes` of a file from `offset`; b"" past its end, and for whatever is no plain readable file."""
        ...

    def watch(self, path: str, *, offset: int, max_bytes: int, wait_s: float) -> Watched:
        """What `read` answers, as soon as there is something, the started command has ended, or `wait_s` are over."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Put a whole file in place at once, with the folders above it."""
        ...

    def output(self, *, max_bytes: int = 40_000) -> bytes:
        """The end of what the started command printed: why it died, when it died early. Untrusted."""
        ...

    def extend(self, seconds: float) -> None:
        """Ask the provider to keep the sandbox for that long from now."""
        ...

    def blocked(self) -> Sequence[str]:
        """The hosts that its processes wanted to reach and may not, each once; empty where nobody can tell."""
        ...

    def limits_met(self) -> Sequence[str]:
        """What its processes wanted more of than they may have, a sentence each; empty where nobody can tell.

        A command that failed meanwhile has the sentences in its output, too.
        """
        ...

    def snapshot(self) -> str | None:
        """Keep the sandbox's files as they are, as a template for later ones; None where the provider cannot."""
        ...

    def kill(self) -> None:
        """End every process and delete the sandbox. Returns when it is gone; one that was gone before is no error."""
        ...


class Provider(Protocol):
    """Makes and finds sandboxes."""

    name: str
    session_cap_s: float | None
    """The longest life of one sandbox, or None."""
    template: str | None
    """What a sandbox starts from where nothing else is asked for, if that has a name."""

    @property
    def place(self) -> str | None:
        """Where its sandboxes are, if only the workers there reach them; None when any worker does."""
        ...

    def create(self, spec: SandboxSpec = PLAIN, *, metadata: Mapping[str, str]) -> Sandbox:
        """A new empty sandbox.

        Raises `SandboxUnavailable` with the remedy, and `ProviderBusy` where it may work later or elsewhere.
        """
        ...

    def connect(self, sandbox_id: str) -> Sandbox:
        """A sandbox that exists. Raises `SandboxGone` or `SandboxUnreachable`."""
        ...

    def list(self, metadata: Mapping[str, str]) -> Sequence[SandboxInfo]:
        """The living sandboxes whose metadata holds all of these.

        Raises `SandboxUnreachable` when nobody can tell, and `SandboxUnavailable` with the remedy.
        """
        ...

    def forget(self, template: str) -> None:
        """Delete what `Sandbox.snapshot` has kept. One that is gone is no error.

        Raises `SandboxError` when the provider refuses, `SandboxUnreachable` when nobody can tell, and
        `SandboxUnavailable` with the remedy.
        """
        ...

    def self_check(self) -> str:
        """One line that says how sandboxes are made here. Raises `SandboxUnavailable` with the remedy."""
        ...


@dataclass(frozen=True)
class Entry:
    """A line of `PROVIDERS`: where a provider is, and which of its operator's variables it uses, keys among them."""

    module: str
    attribute: str
    environment: Sequence[str] = ()
    on_this_machine: bool = False
    """Does it keep sandboxes in the data folder?"""


_LIFE = ("SANDBOX_TEMPLATE", "SANDBOX_SESSION_MINUTES")
PROVIDERS: Mapping[str, Entry] = {
    "local": Entry(
        "cloudagent_queue.sandboxes.local",
        "LocalProvider",
        ("SANDBOX_MEMORY_MB", "SANDBOX_PIDS", "SANDBOX_DISK_MB"),
        on_this_machine=True,
    ),
    "novita": Entry(
        "cloudagent_queue.sandboxes.e2b",
        "NovitaProvider",
        ("NOVITA_API_KEY", "NOVITA_DOMAIN", "NOVITA_API_URL", "NOVITA_SANDBOX_URL", *_LIFE),
    ),
    "e2b": Entry(
        "cloudagent_queue.sandboxes.e2b",
        "E2BProvider",
        ("E2B_API_KEY", "E2B_DOMAIN", "E2B_API_URL", "E2B_SANDBOX_URL", *_LIFE),
    ),
    "unsafe-process": Entry("cloudagent_queue.sandboxes.local", "UnsafeProcessProvider", on_this_machine=True),
}


def place_of(data_folder: Path) -> str:
    """The name of a place: of a data folder on a machine. It is kept there; one is made where there is none.

    Raises `SandboxUnavailable`.
    """
    path = data_folder / "place"
    draft = data_folder / f".place_{secrets.token_hex(8)}"
    try:
        data_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            draft.write_text(f"{socket.gethostname()}-{secrets.token_hex(4)}")
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(draft)
            draft.unlink()
        return path.read_text()
    except OSError as error:
        raise SandboxUnavailable(
            "The data folder cannot be written to.",
            remedy="Check CLOUDAGENT_HOME: its owner, its permissions and the free space on its disk.",
        ) from error


def open_provider(name: str, *, data_folder: Path, env: Mapping[str, str] | None = None) -> Provider:
    """The provider of that name; its module is only imported now.

    `env` is looked at for the variables that its line in `PROVIDERS` names, and for no other.
    Raises `UnknownProvider`, naming the choices.
    """
    entry = entry_of(name)
    factory = getattr(importlib.import_module(entry.module), entry.attribute)
    own = {name: value for name in entry.environment if (value := (env or {}).get(name))}
    return cast(Provider, factory(data_folder / "sandboxes", own) if entry.on_this_machine else factory(own))


def entry_of(name: str) -> Entry:
    """The line of a provider. Raises `UnknownProvider`, naming the choices."""
    try:
        return PROVIDERS[name]
    except KeyError:
        choices = ", ".join(PROVIDERS)
        raise UnknownProvider(remedy=f"Set SANDBOX_PROVIDER to one of: {choices}.") from None
