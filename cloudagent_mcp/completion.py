"""Completes what a person types: ids in addresses and prompts, and whatever else prompts take."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mcp.types import PromptReference, ResourceTemplateReference

from cloudagent_mcp.operations import Caller, Operation
from cloudagent_storage.records import TaskPage
from cloudagent_storage.schedule import ScheduleList

MAX = 100
"""The protocol allows no more values in one answer."""
PAGES = 5
"""How many pages of a hundred tasks are looked through."""

PromptCompletion = Callable[[Caller, str, str, str], Awaitable[list[str]]]
"""Caller, prompt, argument and what was typed so far: the values that fit."""


class Completion:
    """Completion, for the caller's own tasks and schedules."""

    def __init__(self, operations: Mapping[str, Operation], of_prompts: PromptCompletion | None = None) -> None:
        """`of_prompts` completes arguments that are not ids."""
        self._operations = operations
        self._of_prompts = of_prompts

    async def complete(
        self, caller: Caller, reference: ResourceTemplateReference | PromptReference, argument: str, value: str
    ) -> list[str]:
        """At most `MAX` values for an argument of which `value` is typed. Ids are found by their beginning, or by the
        beginnings of words of the title; the newest first.
        """
        if argument == "task_id":
            return await self._tasks(caller, value)
        if argument == "schedule_id":
            return await self._schedules(caller, value)
        if isinstance(reference, PromptReference) and self._of_prompts is not None:
            return (await self._of_prompts(caller, reference.name, argument, value))[:MAX]
        return []

    async def _tasks(self, caller: Caller, value: str) -> list[str]:
        found: list[str] = []
        cursor: str | None = None
        for _ in range(PAGES):
            asked: dict[str, Any] = {"limit": 100, "cursor": cursor}
            page: TaskPage = await self._operations["list_tasks"].call(caller, asked)
            found += [task.task_id for task in page.tasks if _fits(value, task.task_id, task.title)]
            if len(found) >= MAX or (cursor := page.next_cursor) is None:
                break
        return found[:MAX]

    async def _schedules(self, caller: Caller, value: str) -> list[str]:
        every: ScheduleList = await self._operations["list_schedules"].call(caller, {})
        found = [one.schedule_id for one in every.schedules if _fits(value, one.schedule_id, one.name)]
        return found[:MAX]


def _fits(value: str, own_id: str, title: str) -> bool:
    """Does the id begin so, with or without its prefix, or does each word that was typed begin one of the title's?"""
    if own_id.startswith(value) or own_id.partition("_")[2].startswith(value):
        return True
    words = title.casefold().split()
    return all(any(word.startswith(typed) for word in words) for typed in value.casefold().split())
