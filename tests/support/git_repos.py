"""Real repositories, and honest results that git made of them; hostile ones are made in forge.py."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloudagent_queue.repository.bundles import BASE_BRANCH, empty_repository, read_header
from cloudagent_storage.records import branch_name, new_id

ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.com",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.com",
}

Content = str | bytes | None
"""A file's content; None deletes it. A value that begins with `-> ` is where a symlink leads."""


def git(folder: Path, *arguments: str, stdin: bytes = b"") -> str:
    """Run git and tell what it printed."""
    done = subprocess.run(["git", *arguments], cwd=folder, input=stdin, env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def put(folder: Path, files: Mapping[str, Content]) -> None:
    """Write, link or delete files. A folder that is empty then goes, too, as with git."""
    for name, content in files.items():
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.is_symlink() or path.exists():
            path.unlink()
        if content is None:
            while path.parent != folder and not any(path.parent.iterdir()):
                path = path.parent
                path.rmdir()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str) and content.startswith("-> "):
            path.symlink_to(content.removeprefix("-> "))
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)


def make_repository(folder: Path, files: Mapping[str, Content]) -> Path:
    """A repository with one commit on `main`."""
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    return commit(folder, files)


def commit(folder: Path, files: Mapping[str, Content], *, message: str = "Change") -> Path:
    """Commit some files."""
    put(folder, files)
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", message)
    return folder


@dataclass(frozen=True)
class Result:
    """A task's result, as `apply` takes it."""

    task_id: str
    branch: str
    base_sha: str
    input_bundle: bytes | None
    result_bundle: bytes

    @property
    def given(self) -> dict[str, Any]:
        """What `apply` wants to know of it."""
        return dict(vars(self))


class Workshop:
    """A repository somewhere else, in which results are made."""

    def __init__(self, folder: Path, input_bundle: bytes | None) -> None:
        self.folder = folder
        self.input_bundle = input_bundle
        bundle = input_bundle or empty_repository()[0]
        folder.mkdir()
        git(folder, "init", "--quiet", "--initial-branch=main")
        (folder / ".git" / "input").write_bytes(bundle)
        git(folder, "bundle", "unbundle", ".git/input")
        ((self.base_sha, ref),) = read_header(bundle).refs
        assert ref == BASE_BRANCH
        git(folder, "reset", "--quiet", "--hard", self.base_sha)

    def result(self, files: Mapping[str, Content], *, executable: tuple[str, ...] = ()) -> Result:
        """An honest result: these files written, linked or deleted, and committed."""
        git(self.folder, "reset", "--quiet", "--hard", self.base_sha)
        put(self.folder, files)
        for name in executable:
            (self.folder / name).chmod(0o755)
        git(self.folder, "add", "--all", "--force")
        git(self.folder, "commit", "--quiet", "--allow-empty", "--message", "Work")
        return self.of(git(self.folder, "rev-parse", "HEAD"))

    def of(self, tip: str) -> Result:
        """The result whose newest commit is that."""
        task_id = new_id("task")
        branch = branch_name(task_id)
        git(self.folder, "update-ref", f"refs/heads/{branch}", tip)
        target = self.folder / ".git" / "result"
        git(self.folder, "bundle", "create", "--quiet", str(target), f"refs/heads/{branch}", f"^{self.base_sha}")
        return Result(task_id, branch, self.base_sha, self.input_bundle, target.read_bytes())


def fingerprint(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, tuple[int, bytes]]:
    """Everything below a folder: names, kinds, permissions and content. `but` names folders that do not count."""
    found: dict[str, tuple[int, bytes]] = {}
    for above, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in but]
        for name in [*folders, *files]:
            path = Path(above, name)
            mode = path.lstat().st_mode
            content = b""
            if stat.S_ISLNK(mode):
                content = os.fsencode(os.readlink(path))
            elif stat.S_ISREG(mode):
                content = path.read_bytes()
            found[str(path.relative_to(folder))] = (mode, content)
    return found


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The working tree, without git's own folder."""
    return fingerprint(folder, but=(".git",))
