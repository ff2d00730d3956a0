"""To hand a task over and be there when it ends: two operations as one call."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from cloudagent_mcp.operations import Caller, Operation, operation
from cloudagent_mcp.operations.tasks import WAIT_MAX_S, Submitted
from cloudagent_mcp.operations.waiting import ATTENDED_MAX_S, wait_for_end
from cloudagent_storage.records import TaskStatus


class Delegated(Submitted):
    """A task that was handed over and waited for."""

    @property
    def succeeded(self) -> bool:
        """Has it not ended badly? It may not have ended at all."""
        return self.status not in (TaskStatus.FAILED, TaskStatus.CANCELLED)


class Delegation:
    """Submits, and waits."""

    def __init__(self, submit_task: Operation, get_task: Operation) -> None:
        self._submit_task = submit_task
        self._get_task = get_task

    @operation("POST", "", title="Delegate a task and wait", open_world=True)
    async def delegate(
        self,
        caller: Caller,
        *,
        prompt: str,
        repository: str | None = None,
        base_ref: str | None = None,
        verify: Annotated[str | None, Field(max_length=10_000)] = None,
        timeout_minutes: Annotated[float, Field(gt=0, le=1440)] = 60.0,
        idempotency_key: Annotated[str | None, Field(min_length=1, max_length=255)] = None,
    ) -> Delegated:
        """submit_task, and wait for the end in the same call. The task outlives the call: if it has not ended yet, do
        what next_action says.

        It returns early when the agent asks a question, and after less than a minute for a client that asks for no
        progress: most give up on a silent call then. Raises what submit_task raises.
        """
        given = {
            "prompt": prompt,
            "repository": repository,
            "base_ref": base_ref,
            "verify": verify,
            "timeout_minutes": timeout_minutes,
            "idempotency_key": idempotency_key,
        }
        started = time.monotonic()
        limit = WAIT_MAX_S if caller.progress is None else ATTENDED_MAX_S
        if (told := caller.progress) is not None:

            async def tell(_: float, __: float, message: str) -> None:
                # In the time of the whole call, as what a client is told may only grow.
                await told(time.monotonic() - started, limit, message)

            caller = replace(caller, progress=tell)
        submitted: Submitted = await self._submit_task.call(caller, given)
        if caller.progress is not None:
            await caller.progress(0, limit, f"{submitted.task_id} was submitted.")
        task = await wait_for_end(self._get_task, caller, submitted, until=started + limit)
        fields = {name: value for name, value in dict(task).items() if name in Delegated.model_fields}
        return Delegated.model_validate({**fields, "replayed": submitted.replayed})
