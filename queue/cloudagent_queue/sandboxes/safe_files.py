"""Files of a folder that a hostile agent owns, read, written and deleted from outside.

The agent may swap any file or folder for a symlink, a FIFO or an endless file at any moment. So every path is walked
one component at a time, from a descriptor of the folder above and with O_NOFOLLOW: there is nothing to race against.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from cloudagent_storage.errors import SandboxError, SandboxGone, SandboxUnreachable

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a FIFO, or a file on which the agent holds a lease, must not make the host wait.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_DEEPEST = 500
"""Folders in folders; also how many descriptors are held at once."""
_NOT_A_READABLE_FILE = frozenset(
    {
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.EACCES,
        errno.EPERM,
        errno.ENXIO,
        errno.ENODEV,
        errno.ENAMETOOLONG,
        errno.EAGAIN,
    }
)


def read(root: Path, path: str, *, offset: int, max_bytes: int) -> bytes:
    """At most `max_bytes` of a regular file; b"" when there is none or a symlink leads to it.

    Raises `SandboxGone` when `root` does not exist, `SandboxUnreachable` when the host cannot read at all.
    """
    parts = path_parts(path)
    if not parts:
        return b""
    try:
        with _open_folder(root, parts[:-1], create=False) as folder:
            file = os.open(parts[-1], _READ, dir_fd=folder)
            try:
                return _read_regular(file, offset, max_bytes)
            finally:
                os.close(file)
    except OSError as error:
        if error.errno in _NOT_A_READABLE_FILE:
            return b""
        raise SandboxUnreachable("A file of the sandbox could not be read.") from error


def write(root: Path, path: str, data: bytes) -> None:
    """Put a whole file in place at once, with the folders above it. What has its name now is replaced, not followed.

    Raises `SandboxError` when a folder on the way is a symlink or cannot be written, `SandboxGone` without `root`.
    """
    parts = path_parts(path)
    if not parts:
        raise SandboxError("A file in a sandbox needs a name.")
    fresh = f".{secrets.token_hex(8)}.new"
    try:
        with _open_folder(root, parts[:-1], create=True) as folder:
            file = os.open(
                fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder
            )
            try:
                with os.fdopen(file, "wb") as stream:
                    stream.write(data)
                os.rename(fresh, parts[-1], src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                with suppress(OSError):
                    os.unlink(fresh, dir_fd=folder)
                raise
    except OSError as error:
        raise SandboxError("A file could not be written into the sandbox.") from error


def check_folder(root: Path, path: str, *, create: bool = False) -> str:
    """The path of a folder below `root`, normalised; it is made when `create` says so.

    Raises `SandboxError` when it would lead out, a symlink is on the way, or there is no such folder.
    """
    parts = path_parts(path)
    try:
        with _open_folder(root, parts, create=create):
            return "/".join(parts)
    except OSError as error:
        raise SandboxError("The sandbox has no such folder.") from error


def remove_tree(folder: Path) -> None:
    """Delete a folder whatever is in it: folders without permissions, any depth, any name. Symlinks are not followed.

    Nothing may run in it any more. Gone already is no error.
    """
    # Nested folders are moved to the top and emptied there, so that neither recursion nor descriptors grow with the
    # depth, which the agent chooses.
    with suppress(FileNotFoundError):
        top = os.open(folder, _FOLDER)
        try:
            while entries := _entries(top):
                for name, is_folder in entries:
                    if is_folder:
                        _empty_into(top, name)
                        os.rmdir(name, dir_fd=top)
                    else:
                        os.unlink(name, dir_fd=top)
        finally:
            os.close(top)
        os.rmdir(folder)


def size_of(folder: Path) -> int | None:
    """The bytes on the disk of all that is in a folder; None where it is nested deeper than anyone in good faith would.

    The agent may be at work in it. What is under way may be counted or not; a hard link counts once.
    """
    size, linked = 0, set[tuple[int, int]]()
    stack: list[tuple[int, Iterator[str]]] = []
    try:
        with suppress(FileNotFoundError):
            top = os.open(folder, _FOLDER)
            stack.append((top, iter(os.listdir(top))))
        while stack:
            above, names = stack[-1]
            if (name := next(names, None)) is None:
                os.close(stack.pop()[0])
                continue
            try:
                seen = os.stat(name, dir_fd=above, follow_symlinks=False)
                if seen.st_nlink > 1 and not stat.S_ISDIR(seen.st_mode):
                    if (seen.st_dev, seen.st_ino) in linked:
                        continue
                    linked.add((seen.st_dev, seen.st_ino))
                size += seen.st_blocks * 512
                if not stat.S_ISDIR(seen.st_mode):
                    continue
                if len(stack) == _DEEPEST:
                    return None
                inside = _open_anyway(above, name)
                stack.append((inside, iter(os.listdir(inside))))
            except OSError:
                continue  # gone, or something else by now
        return size
    finally:
        for opened, _ in stack:
            os.close(opened)


def _open_anyway(above: int, name: str) -> int:
    """A folder, which is made readable for its owner if it is not: else anything could be hidden in it."""
    try:
        return os.open(name, _FOLDER, dir_fd=above)
    except PermissionError:
        _permit(above, name)
        return os.open(name, _FOLDER, dir_fd=above)


def _empty_into(top: int, name: str) -> None:
    _permit(top, name)
    inside = os.open(name, _FOLDER, dir_fd=top)
    try:
        for inner, is_folder in _entries(inside):
            if is_folder:
                _permit(inside, inner)  # a folder must be writable to change its parent
                os.rename(inner, secrets.token_hex(16), src_dir_fd=inside, dst_dir_fd=top)
            else:
                os.unlink(inner, dir_fd=inside)
    finally:
        os.close(inside)


def _permit(parent: int, name: str) -> None:
    """Give the owner of a folder every permission on it. An O_PATH descriptor needs none and follows no symlink."""
    folder = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{folder}", 0o700)
    finally:
        os.close(folder)


def _entries(folder: int) -> list[tuple[str, bool]]:
    with os.scandir(folder) as entries:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]


def _read_regular(file: int, offset: int, max_bytes: int) -> bytes:
    if not stat.S_ISREG(os.fstat(file).st_mode):
        return b""
    data = bytearray()
    while len(data) < max_bytes:
        chunk = os.pread(file, min(max_bytes - len(data), 1 << 20), offset + len(data))
        if not chunk:
            break
        data += chunk
    return bytes(data)


def path_parts(path: str) -> tuple[str, ...]:
    """The components of a path below a sandbox's root. Raises `SandboxError` for one that could lead out of it."""
    pure = PurePosixPath(path)
    try:
        encodable = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        encodable = False
    if not encodable or pure.is_absolute() or ".." in pure.parts:
        raise SandboxError("A path in a sandbox must stay below its root.")
    return pure.parts


@contextmanager
def _open_folder(root: Path, parts: tuple[str, ...], *, create: bool) -> Generator[int]:
    """A descriptor of a folder below `root`. Raises OSError, ELOOP and ENOTDIR among them where a symlink is met."""
    try:
        folder = os.open(root, _FOLDER)
    except FileNotFoundError:
        raise SandboxGone from None
    try:
        for part in parts:
            if create:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=folder)
            inner = os.open(part, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
        yield folder
    finally:
        os.close(folder)
