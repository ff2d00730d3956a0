"""What tasks have brought back: looked at, and written where their users work."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from cloudagent_mcp import apply
from cloudagent_mcp.operations import Caller, operation
from cloudagent_mcp.operations.diffs import Diff, parse_diff
from cloudagent_mcp.operations.sessions import Sessions
from cloudagent_mcp.operations.tasks import TaskId
from cloudagent_mcp.session_home import SessionHome
from cloudagent_storage.errors import CloudAgentError, NoChanges, NothingToUndo, NotReady, TargetNotAllowed, TaskExpired
from cloudagent_storage.records import MAX_CANDIDATES, Task

if TYPE_CHECKING:
    from cloudagent_storage.store import Store


Candidate = Annotated[int | None, Field(ge=1, le=MAX_CANDIDATES, description="Default: the best.")]


class Applied(apply.ApplyOutcome):
    """What `apply_task` did, or would do, or how to do it where the working tree is."""

    task_id: str
    base_sha: str | None = None
    command: str | None = None
    """The line to type where the working tree is."""
    resume: str | None = None
    """The line that goes on there with what the agent and its user said."""
    session_refused: str | None = None
    """The code of why that is not possible."""

    @classmethod
    def of(cls, task: Mapping[str, Any], outcome: apply.ApplyOutcome) -> Applied:
        """An outcome with what is to be known of its task, which is as `get_task` shows it."""
        said: list[str] = [outcome.message]
        if task["status"] != "completed" and outcome.outcome != "undone":
            code = task["error"]["code"] if task.get("error") else "internal"
            ended = "was cancelled" if task["status"] == "cancelled" else f"failed ({code})"
            said.append(f"This is partial work: the task {ended}.")
        elif task.get("verdict") == "failed" and outcome.outcome != "undone":
            said.append("The task's own check of it failed.")
        about = {**outcome.model_dump(), "message": " ".join(said)}
        return cls.model_validate({"task_id": task["task_id"], "base_sha": task["base_sha"], **about})

    def with_session(self, bring_home: Callable[[], SessionHome]) -> Applied:
        """The same with the task's session brought home. What was applied stays so, whatever becomes of that."""
        try:
            return self.model_copy(update={"resume": bring_home().command})
        except CloudAgentError as error:
            return self.model_copy(update={"session_refused": error.code})


def undo_one_of(
    task_ids: Sequence[str], folder: Path, *, state_folder: Path, destination: apply.Destination | None
) -> tuple[str, apply.ApplyOutcome]:
    """Take back the one of these tasks that is applied in a folder, and say which. Raises what `apply.undo` raises."""
    undo = functools.partial(apply.undo, folder, state_folder=state_folder, destination=destination)
    for task_id in task_ids[:-1]:
        with contextlib.suppress(NothingToUndo):
            return task_id, undo(task_id=task_id)
    return task_ids[-1], undo(task_id=task_ids[-1])


ANCESTORS = 20
"""How far back the tasks are looked for that one goes on from."""


class Results:
    """Read results, and bring them home."""

    def __init__(self, store: Callable[[], Store], sessions: Sessions, *, state_folder: Path) -> None:
        """`store` is opened when it is first needed. `state_folder` keeps what taking a result back needs."""
        self._open_store = store
        self._sessions = sessions
        self._state_folder = state_folder

    @property
    def _store(self) -> Store:
        return self._open_store()

    @operation("GET", "/tasks/{task_id}/diff", title="Read a task's diff", read_only=True, idempotent=True)
    def get_task_diff(
        self,
        caller: Caller,
        *,
        task_id: TaskId,
        path: Annotated[str | None, Field(max_length=4096, description="Only this file, or this folder.")] = None,
        stat_only: Annotated[bool, Field(description="Only the list of files.")] = False,
        candidate: Candidate = None,
    ) -> Diff:
        """What a task changed, as a unified diff with its list of files. Also of a failed or cancelled task."""
        task = self._store.candidates.choose(caller.account_id, task_id, candidate)
        text = self._store.blobs.get(caller.account_id, task.task_id, "diff")
        if text is None:
            if not task.status.terminal:
                raise NotReady()
            raise NoChanges()
        return parse_diff(task, text.decode("utf-8", "replace"), path=path, stat_only=stat_only)

    @operation("POST", "/tasks/{task_id}/apply", title="Apply a task's result", destructive=True, idempotent=True)
    def apply_task(
        self,
        caller: Caller,
        *,
        task_id: TaskId,
        directory: Annotated[
            str | None, Field(max_length=4096, description="The working tree. Default: where you are.")
        ] = None,
        dry_run: Annotated[bool, Field(description="Only say what would be written.")] = False,
        allow_sensitive: Annotated[
            list[str],
            Field(
                max_length=2000, description="Files that can make a machine execute things, each named by your user."
            ),
        ] = [],  # noqa: B006
        undo: Annotated[bool, Field(description="Take an applied result back.")] = False,
        preview: Annotated[
            str | None, Field(max_length=100, description="A dry_run's token: write what it showed, or nothing.")
        ] = None,
        onto: Annotated[apply.Onto | None, Field(description="Default: files.")] = None,
        branch: Annotated[str | None, Field(max_length=250)] = None,
        path: Annotated[str | None, Field(max_length=4096, description="The new worktree's.")] = None,
        squash: bool = False,
        candidate: Candidate = None,
    ) -> Applied:
        """Write a task's changes into a working tree: all or nothing, never over changes of your own, with a backup.

        Where files changed on both sides nothing is written and they are named. `onto` a branch, or a worktree that is
        made on one, your files stay as they are. Of a task with candidates the best is applied where none is named, and
        whichever is applied is taken back.
        """
        if undo and caller.local:
            given = {"onto": onto, "branch": branch, "path": path}
            return self._undone(caller, task_id, candidate, directory, given)
        task = self._store.candidates.choose(caller.account_id, task_id, candidate)
        task_id = task.task_id
        if task.expired_at is not None and not undo:
            raise TaskExpired()
        if not caller.local:
            return self._instructions(task, onto)
        result = self._result_of(caller, task)
        if caller.folder is None:
            raise TargetNotAllowed()
        folder = caller.folder / (directory or ".")
        wanted = destination_of(caller.folder, onto=onto, branch=branch, path=path, squash=squash, title=task.title)
        outcome = apply.apply(
            folder,
            task_id=task_id,
            branch=task.branch,
            base_sha=self._base_of(task),
            input_bundle=self._store.blobs.get(caller.account_id, task_id, "input"),
            result_bundle=result,
            state_folder=self._state_folder,
            dry_run=dry_run,
            allow_sensitive=allow_sensitive,
            destination=wanted,
            preview=preview,
            goes_on_from=self._goes_on_from(caller, task),
        )
        done = Applied.of(task.model_dump(mode="json"), outcome)
        if (home := session_folder(done, folder)) is None:
            return done
        return done.with_session(lambda: self._sessions.bring_home(caller, task_id, home))

    def bundle(
        self, caller: Caller, task_id: str, kind: Literal["input", "result"], candidate: int | None = None
    ) -> bytes | None:
        """A task's git bundle, for a client that applies it elsewhere. None where `input` has none."""
        task = self._store.candidates.choose(caller.account_id, task_id, candidate)
        if kind == "result":
            return self._result_of(caller, task)
        return self._store.blobs.get(caller.account_id, task.task_id, "input")

    def _undone(
        self, caller: Caller, task_id: str, candidate: int | None, directory: str | None, place: Mapping[str, Any]
    ) -> Applied:
        """Take back what of a task is applied, be it one of its candidates; `place` is where, as far as it was said."""
        task = self._store.candidates.choose(caller.account_id, task_id, candidate) if candidate else None
        task = task or self._store.tasks.get(caller.account_id, task_id)
        if caller.folder is None:
            raise TargetNotAllowed()
        tried = () if candidate else self._store.candidates.of(caller.account_id, task_id)
        name, outcome = undo_one_of(
            [task.task_id, *(found.task_id for found in tried)],
            caller.folder / (directory or "."),
            state_folder=self._state_folder,
            destination=destination_of(caller.folder, **place, squash=False, title="") if any(place.values()) else None,
        )
        return Applied.of({**task.model_dump(mode="json"), "task_id": name}, outcome)

    def _goes_on_from(self, caller: Caller, task: Task) -> list[str]:
        """The tasks whose results are within this one's, the last one first."""
        found: list[str] = []
        while (parent_id := task.parent_task_id) is not None and len(found) < ANCESTORS:
            parent = self._store.tasks.get(caller.account_id, parent_id)
            if task.candidate is None:
                found.append(parent_id if parent.best is None else parent.best.task_id)
            task = parent
        return found

    def _result_of(self, caller: Caller, task: Task) -> bytes:
        if not task.status.terminal:
            raise NotReady()  # also where a result is there already: what becomes of it is not known yet
        bundle = self._store.blobs.get(caller.account_id, task.task_id, "result")
        if bundle is None:
            raise NoChanges()
        return bundle

    def _base_of(self, task: Task) -> str:
        if task.base_sha is None:
            raise NoChanges() if task.status.terminal else NotReady()
        return task.base_sha

    def _instructions(self, task: Task, onto: apply.Onto | None) -> Applied:
        if not task.status.terminal:
            raise NotReady()
        return Applied(
            task_id=task.task_id,
            outcome="instructions",
            branch=task.branch,
            base_sha=task.base_sha,
            message="Nothing was written: this server cannot reach your working tree. Type the command there.",
            command=f"ca task apply {task.task_id}" + (f" --{onto}" if onto in ("branch", "worktree") else ""),
        )


def destination_of(
    folder: Path, *, onto: apply.Onto | None, branch: str | None, path: str | None, squash: bool, title: str
) -> apply.Destination:
    """Where the arguments of `apply_task` say that a result goes to, for somebody who works in `folder`."""
    return apply.Destination(
        onto=onto or "files",
        branch=branch or None,
        path=folder / path if path else None,
        squash=squash,
        title=title,
    )


def session_folder(done: Applied, folder: Path) -> Path | None:
    """Where whoever has applied a result goes on with its agent. None where there are no files of it to go on with."""
    if done.outcome != "applied":
        return None
    if done.worktree is not None:
        return Path(done.worktree)
    return folder if done.backup_ref is not None or done.branch is None else None
