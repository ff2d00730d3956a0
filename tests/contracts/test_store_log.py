"""The log of a task, on both databases."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta, timezone

import pytest

from cloudagent_storage.errors import DatabaseUnavailable
from cloudagent_storage.records import LOCAL_ACCOUNT, Event, EventDraft, Level, LogPage, TaskStatus, Usage
from cloudagent_storage.store import Store
from tests.support.stored import ask, claimed, line, messages, queued


def test_lines_are_numbered_from_one_and_come_in_their_order(store: Store) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    store.events.add(task_id, line("two"), line("three"))
    store.tasks.follow(task_id, claim.attempt, [line(str(n)) for n in range(4, 1204)], log_offset=9, lease_s=60)
    store.events.add(task_id)
    store.tasks.finish(task_id, claim.attempt, status=TaskStatus.COMPLETED, events=[line("last")])
    expected = ["Queued.", "two", "three", *map(str, range(4, 1204)), "last"]
    assert messages(store, task_id) == expected

    page = store.events.list(LOCAL_ACCOUNT, task_id, after=1, limit=2)
    assert [event.message for event in page.lines] == ["two", "three"]
    assert (page.task_id, page.next_after, page.more) == (task_id, 3, True)


def test_a_cancel_while_lines_are_added_leaves_no_gap_and_no_duplicate(store: Store, store_url: str) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    other = Store.open(store_url)
    batches, others = 40, 30
    started = threading.Event()

    def note() -> None:
        for n in range(others):
            other.events.add(task_id, line(f"note {n}"))
            if n == others // 2:
                other.tasks.request_cancel(LOCAL_ACCOUNT, task_id)
            started.set()

    thread = threading.Thread(target=note)
    thread.start()
    try:
        started.wait()
        for n in range(batches):
            store.tasks.follow(
                task_id, claim.attempt, [line(f"{n} a"), line(f"{n} b"), line(f"{n} c")], log_offset=n, lease_s=60
            )
    finally:
        thread.join()
        other.close()
    found = messages(store, task_id)
    assert len(found) == 1 + batches * 3 + others + 1
    assert found.count("Cancel requested.") == 1
    for n in range(batches):
        at = found.index(f"{n} a")
        assert found[at : at + 3] == [f"{n} a", f"{n} b", f"{n} c"]
    assert [message for message in found if message.startswith("note")] == [f"note {n}" for n in range(others)]


def test_a_reader_who_follows_a_growing_log_sees_each_line_once(store: Store, store_url: str) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    writer = Store.open(store_url)

    def write() -> None:
        for n in range(60):
            writer.tasks.follow(task_id, claim.attempt, [line(str(n))] * (n % 3 + 1), log_offset=n, lease_s=60)
        writer.tasks.finish(task_id, claim.attempt, status=TaskStatus.COMPLETED, events=[line("end")])

    thread = threading.Thread(target=write)
    thread.start()
    seen: list[Event] = []
    after = 0
    try:
        while not seen or seen[-1].message != "end":
            page = store.events.list(LOCAL_ACCOUNT, task_id, after=after, limit=7)
            seen.extend(page.lines)
            after = page.next_after
    finally:
        thread.join()
        writer.close()
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert [event.message for event in seen] == messages(store, task_id)


def mixed(store: Store) -> str:
    task_id = queued(store)
    drafts: list[EventDraft] = []
    for n in range(30):
        if n % 10 == 9:
            drafts.append(EventDraft(kind="error", level=Level.ERROR, message=f"error {n}"))
        elif n % 2:
            drafts.append(EventDraft(kind="tool_use", level=Level.DEBUG, message=f"tool {n}"))
        else:
            drafts.append(EventDraft(kind="stderr", level=Level.WARNING, message=f"warning {n}"))
    store.events.add(task_id, *drafts)
    return task_id


def texts(page: LogPage) -> list[str]:
    return [event.message for event in page.lines]


def test_a_level_is_a_minimum(store: Store) -> None:
    task_id = mixed(store)
    counts = {Level.DEBUG: 31, Level.INFO: 19, Level.WARNING: 18, Level.ERROR: 3}
    for level, count in counts.items():
        page = store.events.list(LOCAL_ACCOUNT, task_id, level=level)
        assert (len(page.lines), page.more, page.next_after) == (count, False, 31)
        assert all(event.level.rank >= level.rank for event in page.lines)


def test_a_filter_never_loops_and_says_exactly_whether_there_is_more(store: Store) -> None:
    task_id = mixed(store)
    page = store.events.list(LOCAL_ACCOUNT, task_id, limit=2, kinds=["error"])
    assert (texts(page), page.next_after, page.more) == (["error 9", "error 19"], 21, True)
    page = store.events.list(LOCAL_ACCOUNT, task_id, limit=2, kinds=["error"], after=page.next_after)
    assert (texts(page), page.next_after, page.more) == (["error 29"], 31, False)
    page = store.events.list(LOCAL_ACCOUNT, task_id, limit=3, kinds=["error"])
    assert (len(page.lines), page.next_after, page.more) == (3, 31, False)
    page = store.events.list(LOCAL_ACCOUNT, task_id, kinds=["question"])
    assert (texts(page), page.next_after, page.more) == ([], 31, False)
    page = store.events.list(LOCAL_ACCOUNT, task_id, kinds=["error", "stderr"], level=Level.ERROR)
    assert texts(page) == ["error 9", "error 19", "error 29"]


def test_past_the_end_there_is_nothing_and_the_place_is_kept(store: Store) -> None:
    task_id = queued(store)
    for after in (1, 2, 2**53):
        page = store.events.list(LOCAL_ACCOUNT, task_id, after=after)
        assert (page.lines, page.next_after, page.more) == ((), after, False)


def test_the_tail_is_the_last_lines_in_their_order(store: Store) -> None:
    task_id = mixed(store)
    page = store.events.tail(LOCAL_ACCOUNT, task_id, 3)
    assert [event.seq for event in page.lines] == [29, 30, 31]
    assert (page.next_after, page.more) == (31, False)
    assert len(store.events.tail(LOCAL_ACCOUNT, task_id, 100).lines) == 31


def test_what_a_database_cannot_keep_is_replaced(store: Store) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    # As an agent writes it: JSON of which every single escape is well formed.
    raw = json.loads(
        r'{"a\u0000": ["\u0000", "\ud800x", "\ud83d\ude00", {"n": [NaN, Infinity, 1.5, null, true]}], "\\u0000": 1}'
    )
    draft = EventDraft(kind="tool_result", message="nul \x00, half \ud83d, whole \U0001f600, \\u0000", raw=raw)
    store.tasks.follow(task_id, claim.attempt, [draft], log_offset=1, lease_s=60, usage=Usage(cost_usd=float("nan")))
    event = store.events.list(LOCAL_ACCOUNT, task_id, after=1, raw=True).lines[0]
    assert event.message == "nul \ufffd, half \ufffd, whole \U0001f600, \\u0000"
    assert event.raw == {
        "a\ufffd": ["\ufffd", "\ufffdx", "\U0001f600", {"n": [None, None, 1.5, None, True]}],
        "\\u0000": 1,
    }
    assert store.tasks.get(LOCAL_ACCOUNT, task_id).usage == Usage()
    ask(store, task_id, claim.attempt, "\x00\udfff?")
    assert store.tasks.get(LOCAL_ACCOUNT, task_id).question == "\ufffd\ufffd?"


def test_a_raw_message_that_is_nested_without_end_costs_only_itself(store: Store) -> None:
    task_id = queued(store)
    nested: dict[str, object] = {}
    for _ in range(5000):
        nested = {"a": nested}
    store.events.add(
        task_id, EventDraft.model_construct(kind="text", message="hello", level=Level.INFO, raw=nested, timestamp=None)
    )
    event = store.events.list(LOCAL_ACCOUNT, task_id, after=1, raw=True).lines[0]
    assert (event.message, event.raw) == ("hello", None)


def test_the_raw_message_comes_only_when_asked_for(store: Store) -> None:
    task_id = queued(store)
    store.events.add(task_id, EventDraft(kind="text", message="hello", raw={"a": 1}))
    assert store.events.list(LOCAL_ACCOUNT, task_id).lines[1].raw is None
    assert store.events.list(LOCAL_ACCOUNT, task_id, raw=True).lines[1].raw == {"a": 1}
    assert store.events.list(LOCAL_ACCOUNT, task_id, raw=True).lines[0].raw is None


def test_a_line_keeps_the_time_that_it_was_given(store: Store) -> None:
    task_id = queued(store)
    moment = datetime(2026, 3, 4, 5, 6, 7, 89000, tzinfo=UTC)
    far = timezone(-timedelta(hours=23))
    given = [moment, moment.astimezone(far), moment.replace(tzinfo=None), datetime.max.replace(tzinfo=far)]
    given += [datetime.min, datetime(2026, 3, 4, tzinfo=UTC)]
    store.events.add(task_id, *(EventDraft(kind="text", message="at", timestamp=each) for each in given))
    found = [event.timestamp for event in store.events.list(LOCAL_ACCOUNT, task_id, after=1).lines]
    assert found[:3] == [moment] * 3
    assert (found[3].year, found[4].year, found[5]) == (9999, 1, datetime(2026, 3, 4, tzinfo=UTC))
    assert {timestamp.utcoffset() for timestamp in found} == {timedelta(0)}


def test_a_batch_is_kept_whole_or_not_at_all(store: Store) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    unstorable = EventDraft.model_construct(kind="text" * 100, message=None, level=Level.INFO, raw=None, timestamp=None)
    with pytest.raises(Exception) as caught:
        store.tasks.follow(task_id, claim.attempt, [line("one"), unstorable], log_offset=50, lease_s=60)
    assert not isinstance(caught.value, DatabaseUnavailable)
    assert messages(store, task_id) == ["Queued."]
    store.tasks.release(task_id, claim.attempt)
    assert claimed(store, task_id).log_offset == 0
