"""Tasks that touch the same files, told to whoever looks at one of them in `next_action`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cloudagent_mcp.untrusted import named
from cloudagent_storage.records import Overlap, Task, TaskStatus

if TYPE_CHECKING:
    from cloudagent_storage.store import Store

TASKS_NAMED = 2
FILES_NAMED = 3


def warned(store: Store, account_id: str, tasks: Sequence[Task]) -> list[Task]:
    """The tasks, each of which says in `next_action` what others of the account are about to change as well.

    Looked up, with one query for all of them, only where there may be something to say: what has not begun touches
    nothing, and what has changed nothing is in nobody's way.
    """
    at_work = [task.task_id for task in tasks if _is_concerned(task)]
    if not at_work:
        return list(tasks)
    found = store.overlaps.of(account_id, at_work)
    return [_warned(task, found[task.task_id]) if task.task_id in found else task for task in tasks]


def _is_concerned(task: Task) -> bool:
    if task.status in (TaskStatus.RUNNING, TaskStatus.WAITING):
        return True
    artifacts = None if task.result is None else task.result.artifacts
    return task.status.terminal and task.expired_at is None and artifacts is not None and artifacts.files_changed > 0


def _warned(task: Task, overlaps: Sequence[Overlap]) -> Task:
    said = [
        f"{overlap.task_id} also changes {named(overlap.files, most=FILES_NAMED)}" for overlap in overlaps[:TASKS_NAMED]
    ]
    if (more := len(overlaps) - TASKS_NAMED) > 0:
        said.append(f"so {'does 1 other task' if more == 1 else f'do {more} other tasks'}")
    others = " ".join(overlap.task_id for overlap in overlaps[:TASKS_NAMED])
    what = (
        f"{'; '.join(said)}: when all have ended, apply them in order with apply_tasks "
        f"(`ca task apply {task.task_id} {others}`), or cancel one."
    )
    return task.model_copy(
        update={"overlaps": tuple(overlaps), "next_action": f"{task.next_action or ''} {what}".strip()}
    )
