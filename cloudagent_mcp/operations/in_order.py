"""Several results on top of each other, each verified again where it then stands."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cloudagent_mcp.operations import Caller, Operation, in_thread, operation
from cloudagent_mcp.operations.results import Applied
from cloudagent_mcp.operations.tasks import WAIT_MAX_S
from cloudagent_mcp.operations.waiting import ATTENDED_MAX_S, wait_for_end
from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.errors import (
    AlreadyApplied,
    CloudAgentError,
    NothingToVerifyBy,
    RepositoryNotFound,
    TargetNotAllowed,
)
from cloudagent_storage.records import Record, Task, TaskStatus, Verdict, short_id


class Step(Record):
    """What became of one task."""

    task_id: str
    outcome: Literal["applied", "verifying", "undone", "waiting", "instructions"]
    """`undone`: it was applied and taken back, as it did not pass on top of those before it."""
    verdict: Verdict | None = None
    """Of its verify command, run on what was there with it and all before it; that of the first is the task's own."""
    verified_by: str | None = None
    """The task that ran it."""
    message: str


class AppliedInOrder(Record):
    """What became of several tasks, in their order."""

    steps: tuple[Step, ...]
    finished: bool
    """False while one is being verified: the same call once more goes on from there."""
    next_action: str

    @property
    def succeeded(self) -> bool:
        """Has nothing gone wrong yet?"""
        return all(step.outcome != "undone" for step in self.steps)


class InOrder:
    """Applies tasks one after the other."""

    def __init__(self, apply_task: Operation, verify_task: Operation, get_task: Operation) -> None:
        self._apply_task = apply_task
        self._verify_task = verify_task
        self._get_task = get_task

    @operation("POST", "", title="Apply several in order", destructive=True)
    async def apply_tasks(
        self,
        caller: Caller,
        *,
        task_ids: Annotated[list[str], Field(min_length=1, max_length=20)],
        directory: Annotated[str | None, Field(max_length=4096)] = None,
        allow_sensitive: Annotated[list[str], Field(max_length=2000)] = [],  # noqa: B006
    ) -> AppliedInOrder:
        """apply_task for each in turn; each is verified again on top of those before it, and taken back if it fails.

        It stops there; those before stay applied. For a caller that is not told of progress it returns before a minute
        is over. Raises what apply_task raises, naming the task; those before it stay applied.
        """
        if not caller.local:
            for task_id in task_ids:
                await self._get_task.call(caller, {"task_id": task_id, "log_lines": 0})
            return _to_be_typed(task_ids)
        if caller.folder is None:
            raise TargetNotAllowed()
        folder = caller.folder / (directory or ".")
        until = time.monotonic() + (WAIT_MAX_S if caller.progress is None else ATTENDED_MAX_S)
        where = {} if directory is None else {"directory": directory}
        steps: list[Step] = []
        for task_id in task_ids:
            try:
                applied: Applied = await self._apply_task.call(
                    caller, {"task_id": task_id, "allow_sensitive": allow_sensitive, **where}
                )
                message = applied.message
            except AlreadyApplied as found:
                message = found.message
            except CloudAgentError as error:
                before = ", ".join(short_id(step.task_id) for step in steps)
                kept = f" Applied before it, and still so: {before}." if before else ""
                error.message = f"{short_id(task_id)}: {error.message}{kept}"
                raise
            step = Step(task_id=task_id, outcome="applied", message=message)
            if steps:
                step = await self._verified(caller, step, folder, where, until=until)
            else:
                task: Task = await self._get_task.call(caller, {"task_id": task_id, "log_lines": 0})
                step = step.model_copy(update={"verdict": task.verdict})
            steps.append(step)
            if step.outcome != "applied":
                break
        return _answer(task_ids, steps)

    async def _verified(self, caller: Caller, step: Step, folder: Path, where: dict[str, str], *, until: float) -> Step:
        """What was just applied, verified as it stands there; taken back when that fails."""
        try:
            found = await self._check(caller, step.task_id, folder)
        except (NothingToVerifyBy, RepositoryNotFound) as reason:
            return step.model_copy(
                update={"verdict": Verdict.UNVERIFIED, "message": f"{step.message} {reason.message}"}
            )
        found = await wait_for_end(self._get_task, caller, found, until=until)
        step = step.model_copy(update={"verified_by": found.task_id})
        if not found.status.terminal:
            return step.model_copy(update={"outcome": "verifying"})
        if found.status is TaskStatus.COMPLETED and found.verdict is Verdict.PASSED:
            return step.model_copy(update={"verdict": found.verdict})
        await self._apply_task.call(caller, {"task_id": step.task_id, "undo": True, "onto": "files", **where})
        failed = found.status is TaskStatus.COMPLETED and found.verdict is Verdict.FAILED
        why = "its verify command fails there" if failed else "it could not be verified there"
        return step.model_copy(
            update={
                "outcome": "undone",
                "verdict": Verdict.FAILED if failed else Verdict.UNVERIFIED,
                "message": f"Taken back: on top of those before it, {why}. See {short_id(found.task_id)}.",
            }
        )

    async def _check(self, caller: Caller, task_id: str, folder: Path) -> Task:
        """The task that verifies another one in a folder as it is: the same for the same state, unless it broke off."""
        tree = await in_thread(lambda: bundle_working_tree(folder, base_ref=None))
        key = hashlib.sha256(f"{task_id} {tree.base_sha}".encode()).hexdigest()
        asked = {"task_id": task_id, "repository": str(folder)}
        found = await self._verify_task.call(caller, {**asked, "idempotency_key": key})
        while found.replayed and found.status in (TaskStatus.FAILED, TaskStatus.CANCELLED):
            key = hashlib.sha256(f"{key} {found.task_id}".encode()).hexdigest()
            found = await self._verify_task.call(caller, {**asked, "idempotency_key": key})
        return found


def _to_be_typed(task_ids: Sequence[str]) -> AppliedInOrder:
    message = "Nothing was written: this server cannot reach your working tree."
    steps = [Step(task_id=task_id, outcome="instructions", message=message) for task_id in task_ids]
    return AppliedInOrder(
        steps=tuple(steps), finished=True, next_action=f"Type there: ca task apply {' '.join(task_ids)}"
    )


def _answer(task_ids: Sequence[str], steps: Sequence[Step]) -> AppliedInOrder:
    left = [Step(task_id=task_id, outcome="waiting", message="Not applied yet.") for task_id in task_ids[len(steps) :]]
    last = steps[-1]
    if last.outcome == "verifying":
        step = f"Its verify command still runs, as {last.verified_by}. Call apply_tasks again with the same arguments."
    elif last.outcome == "undone":
        step = f"Look at get_task_logs(task_id={last.verified_by!r}); a task that goes on from it can mend it."
        if left:
            step += " Those after it were not applied."
    else:
        unproved = [short_id(each.task_id) for each in steps if each.verdict is not Verdict.PASSED]
        step = "All are applied." + (f" Nothing has verified: {', '.join(unproved)}." if unproved else "")
    return AppliedInOrder(steps=(*steps, *left), finished=last.outcome != "verifying", next_action=step)
