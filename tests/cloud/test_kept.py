"""Finished set-ups, which the cloud provider keeps as snapshots: those that nobody uses any more are deleted there."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from cloudagent_queue.lease import Timers
from cloudagent_queue.sandboxes import SandboxSpec
from cloudagent_queue.sandboxes.e2b import E2BProvider, E2BSandbox
from cloudagent_queue.sweep import FORGOTTEN_AT_ONCE, Kept, forget_unused, sweep_forever
from cloudagent_queue.task_queue import TaskQueue
from cloudagent_storage.errors import SandboxError, SandboxUnavailable, SandboxUnreachable, TemplateNotFound
from cloudagent_storage.records import LOCAL_ACCOUNT
from cloudagent_storage.secrets import Keyring
from cloudagent_storage.store import Store
from tests.support.e2b_server.client import E2bServer
from tests.support.worlds import until


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path / 'store.db'}")
    opened.migrate()
    opened.accounts.ensure(LOCAL_ACCOUNT)
    yield opened
    opened.close()


def keep(store: Store, sandbox: E2BSandbox, key: str, provider: str = "e2b") -> str:
    template = sandbox.snapshot()
    assert template is not None
    store.templates.keep(LOCAL_ACCOUNT, provider, key, template)
    before = store.now()
    until(lambda: store.now() > before, "the clock goes on")
    return template


def has(provider: E2BProvider, template: str) -> bool:
    try:
        provider.create(SandboxSpec(template=template), metadata={}).kill()
    except TemplateNotFound:
        return False
    return True


def test_a_snapshot_that_is_forgotten_is_gone_and_forgetting_it_twice_is_no_error(
    provider: E2BProvider, sandbox: E2BSandbox
) -> None:
    template, other = sandbox.snapshot(), sandbox.snapshot()
    assert template is not None and other is not None
    assert has(provider, template)
    provider.forget(template)
    assert not has(provider, template) and has(provider, other)
    provider.forget(template)


@pytest.mark.parametrize(
    "answer, expected",
    [
        ({"status": 500}, SandboxUnreachable),
        ({"status": 401}, SandboxUnreachable),
        ({"status": 400}, SandboxError),
        ({"status": 409}, SandboxError),
    ],
)
def test_a_snapshot_that_cannot_be_deleted_is_told_from_a_service_that_does_not_answer(
    server: E2bServer, provider: E2BProvider, answer: dict[str, int], expected: type[SandboxError]
) -> None:
    body = f'{{"code": {answer["status"]}, "message": "no"}}'
    server.fault("answer", "/templates/.*", method="DELETE", count=None, body=body, **answer)
    with pytest.raises(SandboxError) as raised:
        provider.forget("snapshot")
    assert type(raised.value) is expected


@contextmanager
def sweeping(store: Store, provider: E2BProvider, tmp_path: Path) -> Generator[list[bool]]:
    """The sweeper of a worker, on a thread of this process; what it says of its turns."""
    stopping, turns = threading.Event(), list[bool]()
    queue = TaskQueue(f"sqlite:///{tmp_path / 'queue.db'}")
    thread = threading.Thread(
        target=sweep_forever,
        args=(store, queue, [lambda: provider]),
        kwargs={
            "keyring": Keyring.from_file(tmp_path / "key"),
            "ring": list[str]().append,
            "deployment": "x",
            "timers": Timers(sweep_s=0.05, prune_s=600),
            "stopping": stopping,
            "wake": threading.Event(),
            "report": turns.append,
            "kept": Kept(days=0, megabytes=0),
        },
    )
    thread.start()
    try:
        yield turns
    finally:
        stopping.set()
        thread.join(20)
        queue.close()
    assert not thread.is_alive()


def make_older(tmp_path: Path, key: str, days: int) -> None:
    """As if that set-up had been used so many days ago."""
    with closing(sqlite3.connect(tmp_path / "store.db")) as database, database:
        changed = database.execute(
            "UPDATE templates SET last_used_at = strftime('%Y-%m-%d %H:%M:%f', last_used_at, ?) WHERE key = ?",
            (f"-{days} days", key),
        )
        assert changed.rowcount == 1


def test_the_sweeper_deletes_set_ups_that_nobody_has_used_for_thirty_days_and_no_others(
    store: Store, provider: E2BProvider, sandbox: E2BSandbox, tmp_path: Path
) -> None:
    old, recent, again = (keep(store, sandbox, key) for key in ("old", "recent", "again"))
    elsewhere = keep(store, sandbox, "elsewhere", provider="novita")
    for key, days in (("old", 31), ("recent", 29), ("again", 31), ("elsewhere", 31)):
        make_older(tmp_path, key, days)
    assert store.templates.find(LOCAL_ACCOUNT, "e2b", "again") == again
    with sweeping(store, provider, tmp_path) as turns:
        until(lambda: len(turns) >= 2, "the sweeper has been round twice")
    assert all(turns)
    assert not has(provider, old) and all(has(provider, template) for template in (recent, again, elsewhere))
    assert store.templates.find(LOCAL_ACCOUNT, "e2b", "old") is None
    assert store.templates.find(LOCAL_ACCOUNT, "e2b", "recent") == recent
    assert store.templates.find(LOCAL_ACCOUNT, "novita", "elsewhere") == elsewhere


def test_a_set_up_that_cannot_be_deleted_costs_the_sweeper_a_line_in_the_log_and_no_turn(
    server: E2bServer,
    store: Store,
    provider: E2BProvider,
    sandbox: E2BSandbox,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    keep(store, sandbox, "old")
    make_older(tmp_path, "old", 31)
    silent = server.fault("answer", "/templates/.*", method="DELETE", status=500, count=None)
    with sweeping(store, provider, tmp_path) as turns:
        until(lambda: len(turns) >= 3, "the sweeper goes on")
    assert silent.fired == 1 and all(turns)
    assert "does not answer" in caplog.text and "Traceback" not in caplog.text
    assert len(store.templates.unused("e2b", for_s=0)) == 1


def test_one_that_the_provider_refuses_to_delete_stays_known_and_holds_up_no_other(
    server: E2bServer, store: Store, provider: E2BProvider, sandbox: E2BSandbox
) -> None:
    stubborn, willing = keep(store, sandbox, "1"), keep(store, sandbox, "2")
    body = '{"code": 400, "message": "in use"}'
    refused = server.fault("answer", f"/templates/{stubborn}", method="DELETE", status=400, body=body)
    assert forget_unused(store, provider, for_s=0) == 1
    assert refused.fired == 1
    assert has(provider, stubborn) and not has(provider, willing)
    assert [kept.template for kept in store.templates.unused("e2b", for_s=-1)] == [stubborn]
    assert forget_unused(store, provider, for_s=0) == 1


def test_a_service_that_does_not_answer_is_asked_once_and_nothing_is_forgotten(
    server: E2bServer, store: Store, provider: E2BProvider, sandbox: E2BSandbox
) -> None:
    kept = [keep(store, sandbox, str(number)) for number in range(3)]
    silent = server.fault("answer", "/templates/.*", method="DELETE", status=500, count=None)
    with pytest.raises(SandboxUnreachable):
        forget_unused(store, provider, for_s=0)
    assert silent.fired == 1
    assert [found.template for found in store.templates.unused("e2b", for_s=-1)] == kept


def test_a_provider_without_a_key_forgets_nothing(store: Store, sandbox: E2BSandbox) -> None:
    kept = keep(store, sandbox, "1")
    with pytest.raises(SandboxUnavailable):
        forget_unused(store, E2BProvider({}), for_s=0)
    assert [found.template for found in store.templates.unused("e2b", for_s=-1)] == [kept]


def test_one_turn_deletes_no_more_than_schedules_can_wait_for(
    server: E2bServer, store: Store, provider: E2BProvider, sandbox: E2BSandbox
) -> None:
    for number in range(FORGOTTEN_AT_ONCE + 3):
        store.templates.keep(LOCAL_ACCOUNT, "e2b", str(number), f"gone{number}")
    before = store.now()
    until(lambda: store.now() > before, "the clock goes on")
    assert [forget_unused(store, provider, for_s=0) for _ in range(3)] == [FORGOTTEN_AT_ONCE, 3, 0]
