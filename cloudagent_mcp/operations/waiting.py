"""Waiting for tasks: told of changes, on no thread and with no connection held meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import anyio
import anyio.to_thread

from cloudagent_mcp.operations import Caller
from cloudagent_storage.records import Task
from cloudagent_storage.store import Store

TOGETHER_S = 0.05
"""Changes that come at once are looked at together: a busy log is no reason to look a hundred times a second."""
POLL_S = 0.3
"""How often it looks by itself while changes are not told of."""
SURE_S = 5.0
"""How often it looks by itself while they are."""
PROGRESS_EVERY_S = 2.0


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
                await caller.progress(now - started, timeout_s, "; ".join(_progress(task) for task in tasks[:5]))
            pause = POLL_S if not opened.changes.prompt else SURE_S if caller.progress is None else PROGRESS_EVERY_S
            with anyio.move_on_after(min(pause, left)):
                await changed.wait()
                await anyio.sleep(TOGETHER_S)


def _progress(task: Task) -> str:
    return f"{task.title[:60]}: {task.status}" + (f", {task.phase}" if task.phase else "")
