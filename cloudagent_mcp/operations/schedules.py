"""What can be done with schedules."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, create_model

from cloudagent_mcp.operations import Caller, Operation, check_arguments, operation
from cloudagent_mcp.operations.candidates import check_losers
from cloudagent_mcp.operations.credentials import Credentials
from cloudagent_mcp.operations.submission import Allowed, check_task, find_source, title_of
from cloudagent_queue.agents import open_agent
from cloudagent_queue.cron import Cron
from cloudagent_queue.schedules import overdue, run_now
from cloudagent_storage.errors import CredentialMissing, InvalidInput, NeverFires
from cloudagent_storage.records import TaskSpec, new_id
from cloudagent_storage.schedule import MAX_SCHEDULES, HeldSchedule, Schedule, ScheduleList, ScheduleRun

if TYPE_CHECKING:
    from cloudagent_storage.secrets import Keyring
    from cloudagent_storage.store import ScheduleChanges, Store

SHOWN_DUE = 3
ONLY_NOW = ("idempotency_key", "continue_task_id", "session", "allow_secrets")
"""What only somebody who is there can want. A schedule's task leaves at home what looks like a secret."""

ScheduleId = Annotated[str, Field(max_length=200)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")]
CronLine = Annotated[str, Field(description="Five fields, such as 0 3 * * 1-5; at least 5 minutes apart.")]
Timezone = Annotated[str, Field(description="Such as Europe/Berlin.")]


class ScheduleRan(Schedule):
    """A schedule that was run at once."""

    run: ScheduleRun


class Schedules:
    """Cron lines that submit tasks."""

    def __init__(
        self,
        store: Callable[[], Store],
        keyring: Callable[[], Keyring],
        *,
        submit_task: Operation,
        allowed: Allowed,
        credentials: Credentials,
        ring: Callable[[str], None],
        ensure_worker: Callable[[], None],
    ) -> None:
        """`store` and `keyring` are opened when they are first needed; `ring` and `ensure_worker` raise nothing."""
        self._open_store = store
        self._keyring = keyring
        self._task_arguments = _without(submit_task.arguments, *ONLY_NOW)
        self._allowed = allowed
        self._credentials = credentials
        self._ring = ring
        self._ensure_worker = ensure_worker

    @property
    def _store(self) -> Store:
        return self._open_store()

    @operation("POST", "/schedules", title="Create a schedule", open_world=True, status=201)
    def create_schedule(
        self,
        caller: Caller,
        *,
        name: Name,
        cron: CronLine,
        task: Annotated[
            dict[str, Any], Field(description="What submit_task takes: prompt, repository, verify and so on.")
        ],
        timezone: Timezone = "UTC",
    ) -> Schedule:
        """Submit a task again and again, at the times of a cron line. A local folder is read anew at each of them.

        Raises what submit_task raises, InvalidCron, NeverFires, TooFrequent, UnknownTimezone and LimitReached.
        """
        times = Cron(cron, timezone)
        spec = self._spec(caller, task)
        schedule_id = new_id("sch")
        schedule = self._store.schedules.add(
            caller.account_id,
            schedule_id=schedule_id,
            name=name,
            cron=times.line,
            timezone=timezone,
            spec=spec,
            credentials=self._sealed(caller, task, schedule_id),
            next_due_at=_first(times, self._store.now()),
        )
        self._ensure_worker()
        return _with_due_times(schedule)

    @operation("GET", "/schedules", title="List schedules", read_only=True, idempotent=True)
    def list_schedules(
        self,
        caller: Caller,
        *,
        limit: Annotated[int, Field(ge=1, le=MAX_SCHEDULES)] = MAX_SCHEDULES,
        offset: Annotated[int, Field(ge=0, le=1_000_000)] = 0,
    ) -> ScheduleList:
        """Your schedules, oldest first, with their next due times and what became of the last ones."""
        found = self._store.schedules.list(caller.account_id, limit=limit, offset=offset)
        self._ensure_worker_for(found.schedules)
        return found.model_copy(update={"schedules": tuple(map(_with_due_times, found.schedules))})

    @operation("GET", "/schedules/{schedule_id}", title="Look at a schedule", read_only=True, idempotent=True)
    def get_schedule(self, caller: Caller, *, schedule_id: ScheduleId) -> Schedule:
        """One schedule: its task, its next due times, and what became of the last ones."""
        schedule = self._store.schedules.get(caller.account_id, schedule_id)
        self._ensure_worker_for([schedule])
        return _with_due_times(schedule)

    @operation("PATCH", "/schedules/{schedule_id}", title="Change a schedule", idempotent=True, open_world=True)
    def update_schedule(
        self,
        caller: Caller,
        *,
        schedule_id: ScheduleId,
        name: Name | None = None,
        cron: CronLine | None = None,
        timezone: Timezone | None = None,
        task: Annotated[
            dict[str, Any] | None, Field(description="Only what changes; null takes the default again.")
        ] = None,
        enabled: Annotated[bool | None, Field(description="false pauses it.")] = None,
    ) -> Schedule:
        """Change, pause or resume a schedule; what is left out stays. With `task`, also your credential is taken anew.

        Raises what create_schedule raises, and ScheduleNotFound.
        """
        while True:
            held = self._store.schedules.hold(caller.account_id, schedule_id)
            changes = self._changes(caller, held, name=name, cron=cron, timezone=timezone, task=task, enabled=enabled)
            passed = overdue(self._store, held) if "next_due_at" in changes else []
            if passed is None:
                continue
            if (changed := self._store.schedules.change(held, overdue=passed, **changes)) is not None:
                self._ensure_worker_for([changed])
                return _with_due_times(changed)

    @operation("DELETE", "/schedules/{schedule_id}", title="Delete a schedule", destructive=True, idempotent=True)
    def delete_schedule(self, caller: Caller, *, schedule_id: ScheduleId) -> Schedule:
        """Remove a schedule. The tasks that it submitted stay, and go on."""
        return self._store.schedules.delete(caller.account_id, schedule_id).model_copy(update={"next_due_at": ()})

    @operation("POST", "/schedules/{schedule_id}/run", title="Run a schedule now", open_world=True, status=202)
    def run_schedule(self, caller: Caller, *, schedule_id: ScheduleId) -> ScheduleRan:
        """Submit a schedule's task at once, also of a paused one. `run.task_id` is the task; wait with get_task."""
        run = run_now(self._store, self._keyring(), self._ring, caller.account_id, schedule_id)
        schedule = _with_due_times(self._store.schedules.get(caller.account_id, schedule_id))
        return ScheduleRan.model_validate({**dict(schedule), "run": run})

    # -- shared ---------------------------------------------------------------------------------------------------

    def _spec(self, caller: Caller, task: Mapping[str, Any]) -> TaskSpec:
        """The task checked as a submit would, its folder made absolute and read once, to see that it can be."""
        try:
            asked = check_arguments(self._task_arguments, task)
            spec = check_task(asked, self._allowed, own_user=caller.local)
            source = find_source(caller, asked["repository"], asked["base_ref"])
            check_losers(spec, source)
        except InvalidInput as error:
            error.field = "task" if error.field is None else f"task.{error.field}"
            raise
        return spec.model_copy(update={"repository": source.repository})

    def _sealed(self, caller: Caller, task: Mapping[str, Any], schedule_id: str) -> bytes:
        """What its tasks will get, of a `task` that was checked. Raises `CredentialMissing`."""
        kept = {
            "agent": self._credentials.for_agent(caller, open_agent("claude"), task.get("anthropic_api_key")),
            "git": self._credentials.for_git(caller, task.get("github_token")),
        }
        return self._keyring().seal(json.dumps(kept).encode(), bound_to=schedule_id)

    def _changes(
        self,
        caller: Caller,
        held: HeldSchedule,
        *,
        name: str | None,
        cron: str | None,
        timezone: str | None,
        task: Mapping[str, Any] | None,
        enabled: bool | None,
    ) -> ScheduleChanges:
        before = held.schedule
        changes: ScheduleChanges = {}
        if name is not None:
            changes["name"] = name
        if task is not None:
            changes |= self._task_changes(caller, held, task)
        times = Cron(
            before.cron if cron is None else cron,
            before.timezone if timezone is None else timezone,
        )
        runs = before.enabled if enabled is None else enabled
        if (times.line, times.timezone, runs) != (before.cron, before.timezone, before.enabled):
            changes |= {"cron": times.line, "timezone": times.timezone, "enabled": runs}
            changes["next_due_at"] = _first(times, held.seen_at) if runs else None
        return changes

    def _task_changes(self, caller: Caller, held: HeldSchedule, task: Mapping[str, Any]) -> ScheduleChanges:
        stored = held.schedule.task
        given = {
            name: value
            for name, value in stored.model_dump(mode="json").items()
            if name in self._task_arguments.model_fields
        }
        if stored.title == title_of(stored.prompt):
            del given["title"]  # it follows the prompt
        merged = {name: value for name, value in {**given, **task}.items() if value is not None}
        changes: ScheduleChanges = {"spec": self._spec(caller, merged)}
        with contextlib.suppress(CredentialMissing):  # the one that it has goes on
            changes["credentials"] = self._sealed(caller, task, held.schedule.schedule_id)
        return changes

    def _ensure_worker_for(self, schedules: Sequence[Schedule]) -> None:
        """After a restart of the machine, say, nobody has started one yet."""
        if any(schedule.next_due_at for schedule in schedules):
            self._ensure_worker()


def _without(model: type[BaseModel], *names: str) -> type[BaseModel]:
    """The same arguments but for these."""
    fields: dict[str, Any] = {
        key: (field.annotation, field) for key, field in model.model_fields.items() if key not in names
    }
    return create_model(model.__name__, __config__=model.model_config, **fields)


def _first(times: Cron, now: datetime) -> datetime:
    found = next(times.after(now), None)
    if found is None:
        raise NeverFires()
    return found


def _with_due_times(schedule: Schedule) -> Schedule:
    """With the due times after the first, which the store knows."""
    if not schedule.next_due_at:
        return schedule
    following = Cron(schedule.cron, schedule.timezone).after(schedule.next_due_at[0])
    due = (*schedule.next_due_at, *islice(following, SHOWN_DUE - 1))
    return schedule.model_copy(update={"next_due_at": due})
