"""Schedules in a store, for tests that start with one."""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime, timedelta

from cloudagent_queue.cron import Cron
from cloudagent_storage.records import LOCAL_ACCOUNT, TaskSpec, new_id
from cloudagent_storage.schedule import Schedule
from cloudagent_storage.secrets import Keyring
from cloudagent_storage.store import Store

KEYRING = Keyring([secrets.token_bytes(32)])
ENVIRONMENT = {"ANTHROPIC_API_KEY": "sk-ant-test-0123456789abcdef"}
SPEC = TaskSpec(prompt="Run the tests.", title="Run the tests", provider="local")


def scheduled(
    store: Store,
    *,
    account_id: str = LOCAL_ACCOUNT,
    cron: str = "0 * * * *",
    spec: TaskSpec = SPEC,
    ago: timedelta | None = None,
    keyring: Keyring = KEYRING,
) -> Schedule:
    """A new schedule, due at its next time, or at the first that was `ago` or later."""
    schedule_id = new_id("sch")
    now = store.now()
    return store.schedules.add(
        account_id,
        schedule_id=schedule_id,
        name="hourly",
        cron=cron,
        timezone="UTC",
        spec=spec,
        credentials=keyring.seal(json.dumps({"agent": ENVIRONMENT, "git": {}}).encode(), bound_to=schedule_id),
        next_due_at=next(Cron(cron).after(now if ago is None else now - ago)),
    )


def due_now(store: Store, schedule_id: str, *, account_id: str = LOCAL_ACCOUNT, ago_s: float = 0) -> datetime:
    """Make a schedule due at this moment, or earlier; the due time."""
    while True:
        held = store.schedules.hold(account_id, schedule_id)
        moment = held.seen_at.replace(microsecond=0) - timedelta(seconds=ago_s)
        if store.schedules.change(held, next_due_at=moment) is not None:
            return moment.astimezone(UTC)
