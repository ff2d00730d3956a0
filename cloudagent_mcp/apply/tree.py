"""Files of a working tree, read and written one component at a time from a descriptor of the folder above.

No component is followed through a symlink, so nothing that another process does to the tree meanwhile leads out of it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Container, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Of file systems that know no hard links, or none to this kind of file.
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL})
_READ_LIMIT = 256 * 1024 * 1024


@dataclass(frozen=True)
class File:
    """A regular file or a symlink."""

    data: bytes
    """Its content, or where the symlink leads."""
    mode: int = 0o644
    """Permission bits; to git, only whether the owner may execute it counts."""
    link: bool = False

    @property
    def executable(self) -> bool:
        return not self.link and bool(self.mode & 0o100)


def same(one: File | None, other: File | None, *, modes_count: bool = True) -> bool:
    """Are they the same to git?"""
    if one is None or other is None:
        return one is other
    executable = one.executable == other.executable or not modes_count
    return one.data == other.data and one.link == other.link and executable


class InTheWay(Exception):
    """Where a file should be or go there is something else: a folder, a device, or a symlink instead of a folder."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class Changed(Exception):
    """A file is not any more what it was a moment ago."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class Tree:
    """A folder and what is below it. Paths are relative to it, with slashes."""

    def __init__(self, root: Path) -> None:
        self._root = os.open(root, _FOLDER)

    def close(self) -> None:
        os.close(self._root)

    def read(self, path: str) -> File | None:
        """The file there, or None when there is nothing. Raises `InTheWay`."""
        try:
            with self._folder_of(path) as (folder, name):
                return _read(folder, name, path)
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """What is in a folder; nothing when there is no such folder."""
        try:
            with self._folder_of(f"{folder}/x" if folder else "x") as (descriptor, _):
                return os.listdir(descriptor)
        except (FileNotFoundError, InTheWay):
            return []

    def folder_mode(self, folder: str) -> int | None:
        """The permission bits of a folder, or None when there is none."""
        try:
            with self._folder_of(f"{folder}/x") as (descriptor, _):
                return stat.S_IMODE(os.fstat(descriptor).st_mode)
        except (FileNotFoundError, InTheWay):
            return None

    def holds_only(self, folder: str, paths: Container[str]) -> bool:
        """Is this a folder, and every file below it one of these?"""
        if self.folder_mode(folder) is None:
            return False
        inner = (f"{folder}/{name}" for name in self.names(folder))
        return all(path in paths or self.holds_only(path, paths) for path in inner)

    def may_write(self, folder: str) -> bool:
        """May this process change a folder, or the nearest one above it that exists?"""
        while folder:
            with suppress(FileNotFoundError, InTheWay), self._folder_of(f"{folder}/x") as (descriptor, _):
                return os.access(f"/dev/fd/{descriptor}", os.W_OK | os.X_OK, effective_ids=True)
            folder = folder.rpartition("/")[0]
        return os.access(f"/dev/fd/{self._root}", os.W_OK | os.X_OK, effective_ids=True)

    def make_folder(self, folder: str, mode: int | None = None) -> None:
        """Make a folder whose parent exists, with just that mode; one that exists already is no error."""
        with self._folder_of(folder) as (parent, name):
            with suppress(FileExistsError):
                os.mkdir(name, dir_fd=parent)
        if mode is not None:
            with self._folder_of(f"{folder}/x") as (descriptor, _):
                os.fchmod(descriptor, mode)

    def remove_folder(self, folder: str) -> bool:
        """Remove a folder if it is empty. False when it is not, or not there."""
        try:
            with self._folder_of(folder) as (parent, name):
                os.rmdir(name, dir_fd=parent)
        except (OSError, InTheWay):
            return False
        return True

    def replace(
        self, path: str, file: File | None, *, expected: File | None, temporary: str, mode: int | None = None
    ) -> None:
        """Put a file in place at once, or delete it, if what is there is still `expected`. Its folder must exist.

        `temporary` is a free name in the same folder. Without `mode` the file keeps the permissions of what it
        replaces, but for the right to execute it. Raises `Changed`, `InTheWay`, OSError.
        """
        try:
            with self._folder_of(path) as (folder, name):
                if file is None:
                    _check_unchanged(folder, name, path, expected)
                    os.unlink(name, dir_fd=folder)
                    return
                if mode is None and expected is not None and not expected.link:
                    mode = _with_executable(expected.mode, file.executable)
                _make(folder, temporary, file, mode)
                try:
                    _check_unchanged(folder, name, path, expected)
                    if expected is None:
                        _put_new(folder, temporary, name, path)
                    else:
                        _keep_owner(folder, name, temporary)
                        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(temporary, dir_fd=folder)
                    raise
        except FileNotFoundError:
            raise Changed(path) from None

    def remove_leftover(self, folder: str, temporary: str) -> None:
        """Delete a temporary file that a crash left behind."""
        with suppress(FileNotFoundError, InTheWay):
            with self._folder_of(f"{folder}/{temporary}" if folder else temporary) as (descriptor, name):
                os.unlink(name, dir_fd=descriptor)

    def sync(self, folder: str) -> None:
        """Wait until what was done in a folder is on the disk."""
        with suppress(FileNotFoundError, InTheWay):
            with self._folder_of(f"{folder}/x" if folder else "x") as (descriptor, _):
                os.fsync(descriptor)

    @contextmanager
    def _folder_of(self, path: str) -> Generator[tuple[int, str]]:
        """A descriptor of the folder that a path lies in, and the path's last name."""
        *above, name = path.split("/")
        folder = os.dup(self._root)
        try:
            for count, part in enumerate(above):
                try:
                    inner = os.open(part, _FOLDER, dir_fd=folder)
                except OSError as error:
                    if error.errno in (errno.ELOOP, errno.ENOTDIR):
                        raise InTheWay("/".join(above[: count + 1])) from None
                    raise
                os.close(folder)
                folder = inner
            yield folder, name
        finally:
            os.close(folder)


def _read(folder: int, name: str, path: str) -> File | None:
    try:
        about = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISLNK(about.st_mode):
            return File(os.fsencode(os.readlink(name, dir_fd=folder)), mode=0o777, link=True)
        if not stat.S_ISREG(about.st_mode):
            raise InTheWay(path)
        descriptor = os.open(name, _READ, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EINVAL, errno.ENXIO):  # swapped since the look at it
            raise InTheWay(path) from None
        raise
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):
        os.close(descriptor)
        raise InTheWay(path)
    with os.fdopen(descriptor, "rb") as stream:
        data = stream.read(_READ_LIMIT + 1)
    if len(data) > _READ_LIMIT:
        raise InTheWay(path)
    return File(data, mode=stat.S_IMODE(about.st_mode))


def _make(folder: int, name: str, file: File, mode: int | None) -> None:
    """All of it, or nothing. What has that name already is left alone: `FileExistsError`."""
    if file.link:
        os.symlink(os.fsdecode(file.data), name, dir_fd=folder)
        return
    # Without a mode the umask of the process decides.
    descriptor = os.open(name, _NEW, 0o777 if file.executable else 0o666, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(file.data)
            if mode is not None:
                os.fchmod(descriptor, mode)
            stream.flush()
            os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)
        raise


def _put_new(folder: int, temporary: str, name: str, path: str) -> None:
    """Rename a file to a name that nothing has, not even since a moment ago. Raises `Changed`."""
    try:
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        raise Changed(path) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    else:
        os.unlink(temporary, dir_fd=folder)


def _with_executable(mode: int, executable: bool) -> int:
    mode &= 0o777
    return mode | (mode & 0o444) >> 2 if executable else mode & ~0o111


def _keep_owner(folder: int, name: str, temporary: str) -> None:
    about = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if about.st_uid != os.geteuid():
        with suppress(PermissionError):
            os.chown(temporary, about.st_uid, about.st_gid, dir_fd=folder, follow_symlinks=False)


def _check_unchanged(folder: int, name: str, path: str, expected: File | None) -> None:
    if _read(folder, name, path) != expected:
        raise Changed(path)
