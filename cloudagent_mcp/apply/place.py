"""A result becomes a branch, or a worktree of its own on one: the user's working tree, index and HEAD stay as they are.

A worktree is made whole in a hidden folder beside its place and then renamed there. Whoever dies before the rename has
made nothing: all of it is taken away again. Whoever dies after it has made it: what is left to do is done. It is taken
back in the same way, the other way round. git does the checkout without hooks, filters and other programs of anybody's.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cloudagent_mcp.apply.commits import Commits, bring
from cloudagent_mcp.apply.journal import keep
from cloudagent_mcp.apply.outcome import AppliedFile, Destination
from cloudagent_mcp.apply.policy import is_sensitive, listed
from cloudagent_mcp.apply.target import Target, cannot_write
from cloudagent_queue import git
from cloudagent_queue.repository import LocalRepository, Quarantine, check_ref
from cloudagent_storage.errors import AlreadyApplied, ApplyConflict, InvalidRef, TargetExists, TargetNotAllowed
from cloudagent_storage.records import short_id

# Else a worktree would name its repository by how to get there from the hidden folder.
_ABSOLUTE = (("worktree.useRelativePaths", "false"),)
_LATER = "Look at what was added; `git branch -D` and `git worktree remove` delete it for good."


class Made:
    """The record of one branch, and of the worktree on it, on the disk before the first of it is made."""

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        self._folder = folder
        self.entry = entry

    @classmethod
    def all(cls, target: Target, task_id: str = "") -> list[Made]:
        """Those of a task, or of every task, the newest last."""
        found: list[Made] = []
        for folder in target.state.glob(f"{task_id or 'task_*'}.*"):
            try:
                found.append(cls(folder, json.loads((folder / "place.json").read_bytes())))
            except FileNotFoundError:  # nothing was made yet
                shutil.rmtree(folder, ignore_errors=True)
        return sorted(found, key=lambda made: made.entry["at"])

    @classmethod
    def begin(cls, target: Target, entry: dict[str, Any]) -> Made:
        place = hashlib.sha256(f"{entry['branch']}\0{entry['path']}".encode("utf-8", "surrogateescape")).hexdigest()
        folder = target.state / f"{target.task_id}.{place[:16]}"
        folder.mkdir(mode=0o700, exist_ok=True)
        made = cls(folder, entry)
        made.save()
        return made

    @property
    def branch(self) -> str:
        return self.entry["branch"]

    @property
    def path(self) -> Path | None:
        return None if self.entry["path"] is None else Path(self.entry["path"])

    @property
    def files(self) -> tuple[AppliedFile, ...]:
        return tuple(AppliedFile(**file) for file in self.entry["files"])

    @property
    def onto(self) -> str:
        return "branch" if self.path is None else "worktree"

    @property
    def staging(self) -> Path | None:
        """The hidden folder; what is in it has the worktree's own name, by which git calls it."""
        return None if self.path is None else self.path.parent / self.entry["staging"]

    def save(self, **changed: Any) -> None:
        self.entry |= changed
        keep(self._folder / "place.json", self.entry)

    def forget(self) -> None:
        (self._folder / "place.json").unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)


def name_of(destination: Destination, branch: str) -> str:
    """The branch's name. Raises `InvalidRef`."""
    name = destination.branch or branch
    try:
        check_ref(name)
        if name.startswith("refs/") or name == "HEAD":
            raise InvalidRef()
    except InvalidRef as refusal:
        refusal.field = "branch"
        raise
    return name


def path_of(target: Target, destination: Destination) -> Path | None:
    """Where the worktree goes. Raises `TargetNotAllowed` for a place that means something to other programs."""
    if destination.onto != "worktree":
        return None
    path = destination.path or target.top.parent / f"{target.top.name}-task-{short_id(target.task_id)}"
    path = target.top / path
    try:
        path = path.parent.resolve(strict=True) / path.name
    except (OSError, RuntimeError):
        raise TargetNotAllowed("The worktree's folder would lie in one that does not exist.", field="path") from None
    shared = Path(os.path.commonpath([path, target.top.parent]))
    new = path.relative_to(shared)
    # Its files have harmless names; below ~/.ssh or .git/hooks they would have others.
    if any(part.startswith(".") for part in new.parts) or is_sensitive(new.as_posix()) or path == shared:
        raise TargetNotAllowed(
            "A worktree is not put where names begin with a dot or mean something to other programs.",
            remedy="Name a folder beside the repository.",
            field="path",
        )
    return path


def check_free(target: Target, name: str, path: Path | None, commits: Commits, fingerprint: str) -> None:
    """Raises `TargetExists` when something of the user's is there, and `AlreadyApplied` when it is the result."""
    repository = _repository(target)
    there = repository.commit(f"refs/heads/{name}")
    mine = [made for made in Made.all(target, target.task_id) if made.branch == name and made.path == path]
    made = any(one.entry["tip"] == there and one.entry["fingerprint"] == fingerprint for one in mine)
    if path is None:
        if there is not None and (made or there == commits.tip):
            raise AlreadyApplied("The branch holds this task's result already.")
    elif os.path.lexists(path):
        if made and _worktree_of(repository, path) is not None:
            raise AlreadyApplied("The worktree was made of this task's result already.")
        raise TargetExists(
            "Where the worktree would go something is already.",
            remedy="Name another folder (path, `--worktree PATH`).",
            field="path",
        )
    if there is not None and there != commits.tip:
        raise TargetExists(
            "There is a branch of that name already, and it is left as it is.",
            remedy="Name another one (branch, `--branch NAME`).",
            field="branch",
        )
    if there is not None and (where := _checked_out_in(repository, name)):
        raise TargetExists(
            "The branch is checked out already.",
            remedy="Work there, or name another branch (branch, `--branch NAME`).",
            field="branch",
        ) from OSError(where)


def make(
    target: Target,
    quarantine: Quarantine,
    name: str,
    path: Path | None,
    commits: Commits,
    files: Sequence[AppliedFile],
    fingerprint: str,
) -> None:
    """Make the branch, and the worktree; when that fails, neither is left. `check_free` was called under this lock."""
    repository = _repository(target)
    entry = {
        "stage": "making",
        "branch": name,
        "tip": commits.tip,
        "branch_made": repository.commit(f"refs/heads/{name}") is None,
        "path": None if path is None else str(path),
        "staging": f".cloudagent-{secrets.token_hex(8)}.tmp",
        "inode": None,
        "files": [file.model_dump() for file in files],
        "fingerprint": fingerprint,
        "at": time.time(),
    }
    with target.half_done():
        made = Made.begin(target, entry)
        try:
            _make(made, repository, quarantine, commits)
        except (OSError, git.GitFailed) as error:
            finish(made, repository)
            target.settled()
            if isinstance(error, git.GitFailed):
                raise TargetNotAllowed(
                    "git cannot make the branch or the worktree here; nothing was made.",
                    remedy="Name another branch (one that is a folder of branches cannot be one), or run `git fsck`.",
                ) from error
            raise cannot_write(error) from error
        except BaseException:
            finish(made, repository)
            target.settled()
            raise


def _make(made: Made, repository: LocalRepository, quarantine: Quarantine, commits: Commits) -> None:
    bring(quarantine, repository, commits)
    ref = f"refs/heads/{made.branch}"
    if made.entry["branch_made"]:
        said = f"cloudagent: {made.entry['fingerprint'][:12]}"
        repository.run("update-ref", "--create-reflog", "-m", said, ref, commits.tip, "", env=git.AUTHOR)
    if made.path is not None and made.staging is not None:
        made.staging.mkdir(mode=0o700)
        place = made.staging / made.path.name
        options = ["--quiet", "--no-checkout", "--no-guess-remote"]
        _run(repository, "worktree", "add", *options, "--", str(place), made.branch)
        _inside(repository, place, "reset", "--quiet", "--hard", made.entry["tip"])
        made.save(inode=place.lstat().st_ino)
        os.rename(place, made.path)
        _settle(made, repository)
    made.save(stage="made")


def _settle(made: Made, repository: LocalRepository) -> None:
    """After the rename: git learns where the worktree is."""
    assert made.path is not None and made.staging is not None
    _run(repository, "worktree", "repair", str(made.path))
    with suppress(FileNotFoundError):
        made.staging.rmdir()


def take_back(target: Target, made: Made) -> None:
    """Remove the branch and the worktree, if they are as they were left.

    Raises `ApplyConflict`, naming what was added or changed; then nothing is removed.
    """
    repository = _repository(target)
    path = made.path
    _check_branch(made, repository, allowed=path)
    place = None if path is None or made.staging is None else made.staging / path.name
    if path is None or place is None or made.staging is None or not os.path.lexists(path):
        with target.half_done():
            made.save(stage="removing")
            finish(made, repository)
        return
    _check_as_left(made, repository, path)
    with target.half_done():
        try:
            made.save(stage="removing")
            made.staging.mkdir(mode=0o700)
            os.rename(path, place)
            try:
                _check_as_left(made, repository, place)  # whoever wrote in that very moment
            except BaseException:
                os.rename(place, path)
                raise
            finish(made, repository)
        except OSError as error:
            finish(made, repository)
            target.settled()
            raise cannot_write(error) from error
        except BaseException:
            finish(made, repository)
            target.settled()
            raise


def finish_interrupted(target: Target) -> int:
    """Do, or take back, what a process that died began here; how many branches and worktrees that were."""
    begun = [made for made in Made.all(target) if made.entry["stage"] != "made"]
    for made in begun:
        if target.repository is not None:
            try:
                finish(made, target.repository)
            except (OSError, git.GitFailed) as error:
                raise cannot_write(error) from error
    return len(begun)


def finish(made: Made, repository: LocalRepository) -> None:
    """Bring a half done one to the side of its rename on which it is."""
    path, staging = made.path, made.staging
    if path is not None and staging is not None:
        place = staging / path.name
        if made.entry["stage"] == "making" and not os.path.lexists(place) and _is(path, made.entry["inode"]):
            _settle(made, repository)
            made.save(stage="made")
            return
        if made.entry["stage"] == "removing" and not os.path.lexists(place) and os.path.lexists(path):
            with suppress(OSError):
                staging.rmdir()
            made.save(stage="made")
            return
        shutil.rmtree(staging, ignore_errors=True)
        for folder in (place, path):
            if (administration := _administration_of(repository, folder)) and not os.path.lexists(folder):
                shutil.rmtree(administration, ignore_errors=True)
    ref = f"refs/heads/{made.branch}"
    if made.entry["branch_made"] and repository.commit(ref) == made.entry["tip"]:
        if not _checked_out_in(repository, made.branch):
            repository.run("update-ref", "-d", ref, made.entry["tip"], ok=(0, 1, 128))
    made.forget()


def _check_branch(made: Made, repository: LocalRepository, *, allowed: Path | None) -> None:
    now = repository.commit(f"refs/heads/{made.branch}")
    if now is not None and now != made.entry["tip"]:
        raise ApplyConflict(
            "The branch has other commits than the result. Nothing was removed.", remedy=_LATER, field="branch"
        )
    where = _checked_out_in(repository, made.branch)
    if where and where != str(allowed) and made.entry["branch_made"]:
        raise ApplyConflict(
            "The branch is checked out in a working tree. Nothing was removed.",
            remedy="Switch to another branch there first.",
            field="branch",
        )


def _check_as_left(made: Made, repository: LocalRepository, place: Path) -> None:
    """Is the worktree what was made, down to the last ignored file? git's own idea of what has changed is not asked:
    it can be told to look away."""
    administration = _worktree_of(repository, place, moved=place != made.path)
    changed: list[str] = []
    if administration is None:
        raise ApplyConflict("What is in the worktree's place is something else. Nothing was removed.", field="path")
    head = _inside(repository, place, "symbolic-ref", "--quiet", "HEAD", ok=(0, 1)).text
    if (administration / "locked").exists() or head != f"refs/heads/{made.branch}":
        raise ApplyConflict(
            "The worktree is locked, or another branch is checked out in it. Nothing was removed.",
            remedy=_LATER,
            field="path",
        )
    with tempfile.TemporaryDirectory(prefix="cloudagent-index-") as temporary:
        fresh = {"GIT_INDEX_FILE": str(Path(temporary) / "index")}
        _inside(repository, place, "read-tree", made.entry["tip"], env=fresh)
        _inside(repository, place, "update-index", "-q", "--refresh", env=fresh, ok=(0, 1))
        options = ["-z", "--name-only", "--no-ext-diff", "--ignore-submodules=none"]
        for asked, env in (
            (["diff-files", *options], fresh),
            (["ls-files", "--others", "-z"], fresh),
            (["diff-index", "--cached", *options, made.entry["tip"]], {}),
        ):
            out = _inside(repository, place, *asked, env=env).out.decode("utf-8", "surrogateescape")
            changed += out.split("\0")[:-1]
    if changed:
        names = sorted(set(changed))
        raise ApplyConflict(
            f"Changed or added in the worktree since: {listed(names)}. Nothing was removed.",
            remedy=_LATER,
            files=[(name, "changed or added since") for name in names],
        )


def _worktree_of(repository: LocalRepository, path: Path, *, moved: bool = False) -> Path | None:
    """git's folder about the worktree at a path, when both know of each other."""
    try:
        said = (path / ".git").read_text().removeprefix("gitdir: ").strip()
        administration = Path(said)
        known = Path((administration / "gitdir").read_text().strip())
    except (OSError, ValueError):
        return None
    if administration.parent.resolve() != repository.path("worktrees").resolve():
        return None
    return administration if moved or known == path / ".git" else None


def _administration_of(repository: LocalRepository, path: Path) -> Path | None:
    for about in repository.path("worktrees").glob("*/gitdir"):
        with suppress(OSError, ValueError):
            if about.read_text().strip() == str(path / ".git"):
                return about.parent
    return None


def _checked_out_in(repository: LocalRepository, branch: str) -> str:
    """The working tree that has the branch checked out, or nothing."""
    return repository.run("for-each-ref", "--format=%(worktreepath)", f"refs/heads/{branch}").text


def _is(path: Path, inode: int | None) -> bool:
    try:
        return inode is not None and path.lstat().st_ino == inode
    except OSError:
        return False


def _repository(target: Target) -> LocalRepository:
    if target.repository is None:
        raise TargetNotAllowed("The directory lies in no git repository, which a branch needs.")
    return target.repository


def _run(repository: LocalRepository, *arguments: str) -> git.Done:
    return git.run(
        *arguments, folder=repository.top, settings=[*repository.settings, *_ABSOLUTE], env=git.AUTHOR, timeout_s=600
    )


def _inside(repository: LocalRepository, place: Path, *arguments: str, **options: Any) -> git.Done:
    """git in the worktree, with the settings of the repository: filters are off."""
    options["env"] = {**git.AUTHOR, **options.get("env", {})}
    return git.run(*arguments, folder=place, settings=[*repository.settings, *_ABSOLUTE], timeout_s=600, **options)
