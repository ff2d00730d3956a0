"""A result becomes files of a working tree: no commit, no index. What was there is a backup, the result a branch."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cloudagent_mcp.apply.commits import Commits, bring
from cloudagent_mcp.apply.journal import Journal, Step
from cloudagent_mcp.apply.outcome import AppliedFile
from cloudagent_mcp.apply.policy import listed
from cloudagent_mcp.apply.target import Target, cannot_write
from cloudagent_mcp.apply.tree import Changed, InTheWay, Tree
from cloudagent_queue import git
from cloudagent_queue.repository import LocalRepository, Quarantine
from cloudagent_storage.errors import ApplyConflict, TargetNotAllowed
from cloudagent_storage.records import short_id

_NOW = "changed in this very moment"


def write(
    target: Target,
    quarantine: Quarantine,
    branch: str,
    steps: Sequence[Step],
    files: tuple[AppliedFile, ...],
    fingerprint: str,
    commits: Commits | None,
) -> tuple[str | None, str | None]:
    """Make the backup, then write, and take everything back when that fails. The backup's ref, and the branch that
    the result's commits are kept as; None where a branch of that name is the user's own by now."""
    try:
        _prepare(target, steps)
        backup_ref = _backup(target)
        kept = branch if commits is not None and _keep_branch(target, quarantine, branch, commits) else None
    except (OSError, git.GitFailed) as error:
        raise cannot_write(error) from error
    assert target.tree is not None
    about = {
        "files": [file.model_dump() for file in files],
        "backup_ref": backup_ref,
        "branch": kept,
        "fingerprint": fingerprint,
        "at": time.time(),
    }
    left: list[str] = []
    try:
        with target.half_done():
            journal = Journal.begin(target.state / target.task_id, target.tree, steps, about=about)
            try:
                journal.write(target.tree, steps)
            except BaseException:
                left = journal.take_back(target.tree)
                if journal.forgotten:
                    target.settled()
                raise
    except (Changed, InTheWay) as error:
        changed = sorted({error.path, *left})
        raise ApplyConflict(
            f"Changed in this very moment, and left alone: {listed(changed)}. All else is as it was.",
            remedy=f"Look at these files; {backup_ref} has them as they were before." if backup_ref else None,
            files=[(path, _NOW) for path in changed],
        ) from None
    except OSError as error:
        raise cannot_write(error) from error
    return backup_ref, kept


def take_back(target: Target, journal: Journal) -> None:
    """Every file is again what it was. Raises `ApplyConflict` when some were changed since; then nothing is written."""
    assert target.tree is not None
    if changed := journal.differing(target.tree):
        raise ApplyConflict(
            f"Changed since the result was applied: {listed(changed)}. Nothing was written.",
            remedy="Undo those changes first, or take what you need from the backup ref.",
            files=[(path, "changed since the result was applied") for path in changed],
        )
    try:
        with target.half_done():
            changed = journal.take_back(target.tree)
    except OSError as error:
        raise cannot_write(error) from error
    if changed:
        raise ApplyConflict(
            f"Changed in this very moment, and left alone: {listed(changed)}.", files=[(path, _NOW) for path in changed]
        )


def finish_interrupted(target: Target) -> int:
    """Take back what a process that died began with the files here; how many applies that were."""
    begun = [journal for journal in target.journals() if not journal.done]
    for journal in begun:
        if target.tree is not None:
            try:
                journal.take_back(target.tree)
            except OSError as error:
                raise cannot_write(error) from error
    return len(begun)


def _prepare(target: Target, steps: Sequence[Step]) -> None:
    """Make the folder if it is new, and a repository if it is empty."""
    if target.tree is None:
        target.top.mkdir()
        target.tree = Tree(target.top)
    for folder in {step.path.rpartition("/")[0] for step in steps}:
        if not target.tree.may_write(folder):
            raise TargetNotAllowed("The directory may not be written to.", remedy="Check its permissions.")
    if target.repository is None and not target.tree.names(""):
        git.run("init", "--quiet", "--initial-branch=main", folder=target.top)
        target.repository = LocalRepository.find(target.top)


def _backup(target: Target) -> str | None:
    """A commit of all that is in the working tree and not ignored, under a ref that no branch knows of."""
    repository = target.repository
    if repository is None:
        return None
    with tempfile.TemporaryDirectory(prefix="cloudagent-backup-") as temporary:
        nested = [path for path in repository.untracked() if path.endswith("/")]
        tree = repository.snapshot(Path(temporary), leave_out=nested)
    head = repository.commit("HEAD")
    parent = [] if head is None else ["-p", head]
    message = f"The working tree before {target.task_id} was applied\n"
    now = f"@{int(time.time())} +0000"
    env = {**git.AUTHOR, "GIT_AUTHOR_DATE": now, "GIT_COMMITTER_DATE": now}
    commit = repository.run("commit-tree", tree, *parent, stdin=message.encode(), env=env).text
    prefix = f"refs/cloudagent/backup/{short_id(target.task_id)}"
    taken = repository.run("for-each-ref", "--format=%(refname)", "refs/cloudagent/backup").text.splitlines()
    number = next(n for n in range(1, len(taken) + 2) if f"{prefix}-{n}" not in taken)
    repository.run("update-ref", f"{prefix}-{number}", commit, "")
    return f"{prefix}-{number}"


def _keep_branch(target: Target, quarantine: Quarantine, branch: str, commits: Commits) -> bool:
    """Have the result's commits as a local branch, too; whether they are one now."""
    if target.repository is None:
        return False
    bring(quarantine, target.repository, commits)
    target.repository.run("update-ref", f"refs/heads/{branch}", commits.tip, "", ok=(0, 1, 128))
    return target.repository.commit(f"refs/heads/{branch}") == commits.tip
