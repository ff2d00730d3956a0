"""Waiting for tasks: told of changes, on no thread and with no connection held meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import anyio
import anyio.to_thread

from cloudagent_mcp.operations import Caller, Operation
from cloudagent_mcp.untrusted import clean
from cloudagent_storage.records import Event, Task, TaskStatus
from cloudagent_storage.store import Store

TOGETHER_S = 0.05
"""Changes that come at once are looked at together: a busy log is no reason to look a hundred times a second."""
POLL_S = 0.3
"""How often it looks by itself while changes are not told of."""
SURE_S = 5.0
"""How often it looks by itself while they are."""
PROGRESS_EVERY_S = 2.0
LOOK_EVERY_S = 10.0
"""get_task waits for a change since its own first look: what came between two of its calls is seen after this time."""
ATTENDED_MAX_S = 24 * 3600.0
"""A client that is told of progress waits this long: such a call costs no thread and no connection."""


async def wait_for(
    store: Callable[[], Store],
    caller: Caller,
    task_ids: Sequence[str],
    enough: Callable[[list[Task]], bool],
    timeout_s: float,
) -> list[Task]:
    """The caller's tasks as soon as they are `enough`, or as they are after `timeout_s`. Raises `TaskNotFound`."""
    opened = await anyio.to_thread.run_sync(store)
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def look() -> list[Task]:
        return [opened.tasks.get(caller.account_id, task_id) for task_id in task_ids]

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed in this moment
            loop.call_soon_threadsafe(changed.set)

    started = told = time.monotonic()
    with opened.changes.watch(task_ids, tell):
        while True:
            changed.clear()
            tasks = await anyio.to_thread.run_sync(look)
            now = time.monotonic()
            left = timeout_s - (now - started)
            if enough(tasks) or left <= 0:
                return tasks
            if caller.progress is not None and now - told >= PROGRESS_EVERY_S:
                told = now
                said = await anyio.to_thread.run_sync(_progress, opened, caller, tasks[:5])
                await caller.progress(now - started, timeout_s, said)
            pause = POLL_S if not opened.changes.prompt else SURE_S if caller.progress is None else PROGRESS_EVERY_S
            with anyio.move_on_after(min(pause, left)):
                await changed.wait()
                await anyio.sleep(TOGETHER_S)


async def wait_for_end(get_task: Operation, caller: Caller, task: Task, *, until: float) -> Task:
    """The task when it has ended, asks something, or the monotonic time `until` has come; by way of `get_task`."""
    wait_s = 0.0
    while not task.status.terminal and task.status is not TaskStatus.WAITING and wait_s >= 0:
        looked = {"task_id": task.task_id, "wait_seconds": wait_s, "log_lines": 0}
        task = await get_task.call(caller, looked)
        wait_s = min(LOOK_EVERY_S, until - time.monotonic())
    return task


def brief_line(line: Event) -> str:
    """A line of the log on one line, and not a long one."""
    return f"{line.kind}: {' '.join(line.message.split())[:300]}"


def _progress(store: Store, caller: Caller, tasks: Sequence[Task]) -> str:
    return "; ".join(_progress_of(store, caller, task) for task in tasks)


def _progress_of(store: Store, caller: Caller, task: Task) -> str:
    """How far it is, the share of its budget that it has used, and the last line of its log."""
    said = f"{task.title[:60]}: {task.status}" + (f", {task.phase}" if task.phase else "")
    budget = store.tasks.spec(caller.account_id, task.task_id).max_budget_usd
    if budget is not None:
        said += f", {task.usage.cost_usd / budget:.0%} of ${budget:g}"
    lines = store.events.tail(caller.account_id, task.task_id, 1).lines
    return clean(f"{said}; {brief_line(lines[0])[:160]}" if lines else said)
