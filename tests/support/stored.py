"""Tasks in a store, for tests that start with one."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import psycopg2

from cloudagent_storage.records import (
    LOCAL_ACCOUNT,
    Claim,
    EventDraft,
    Question,
    TaskError,
    TaskSpec,
    TaskStatus,
    Verdict,
)
from cloudagent_storage.store import Store
from tests.support.git_repos import Result

T = TypeVar("T")

EXPIRED = -1.0
"""A lease of that many seconds has run out when it begins."""


def line(message: str = "a line") -> EventDraft:
    return EventDraft(kind="text", message=message)


def queued(store: Store, *, account_id: str = LOCAL_ACCOUNT, spec: TaskSpec | None = None) -> str:
    """The id of a new task with one line in its log."""
    spec = spec or TaskSpec(prompt="Fix the bug.", title="Fix the bug")
    return store.tasks.add(account_id, spec, credentials=b"sealed", lines=[line("Queued.")]).task_id


def claimed(store: Store, task_id: str | None = None, *, lease_s: float = 60.0) -> Claim:
    """A task that a worker has."""
    claim = store.tasks.claim(task_id or queued(store), worker="worker", lease_s=lease_s)
    assert claim is not None
    return claim


def with_result(
    store: Store,
    result: Result,
    spec: TaskSpec,
    *,
    account_id: str = LOCAL_ACCOUNT,
    parent_task_id: str | None = None,
    status: TaskStatus | None = TaskStatus.COMPLETED,
    error: TaskError | None = None,
) -> str:
    """The id of a task that has ended so, with that result; None is one that still runs and has it already."""
    assert result.input_bundle is not None
    store.tasks.add(
        account_id,
        spec,
        task_id=result.task_id,
        base_sha=result.base_sha,
        blobs={"input": result.input_bundle},
        credentials=b"",
        parent_task_id=parent_task_id,
    )
    claim = claimed(store, result.task_id)
    store.blobs.put(result.task_id, "result", result.result_bundle, attempt=claim.attempt)
    verdict = Verdict.PASSED if status is TaskStatus.COMPLETED else None
    if status is not None:
        store.tasks.finish(result.task_id, claim.attempt, status=status, verdict=verdict, error=error)
    return result.task_id


def ask(store: Store, task_id: str, attempt: int, text: str | None = "Which one?", *, lease_s: float = 60.0) -> None:
    """Its agent asks that, as question `q_1`; or, with None, waits for nothing any more."""
    question = None if text is None else Question(question_id="q_1", text=text, choices=("this", "that"))
    store.tasks.follow(task_id, attempt, [], log_offset=1, lease_s=lease_s, question=question)


def messages(store: Store, task_id: str) -> list[str]:
    """Its whole log; also makes sure that the lines are numbered from 1 without a gap."""
    page = store.events.list(LOCAL_ACCOUNT, task_id, limit=100_000)
    assert [event.seq for event in page.lines] == list(range(1, len(page.lines) + 1))
    return [event.message for event in page.lines]


def at_once(*calls: Callable[[], T]) -> list[T]:
    """Make calls on threads of their own that all begin in the same moment; their answers, in order."""
    barrier = Barrier(len(calls))

    def call(function: Callable[[], T]) -> T:
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


def in_processes(count: int, program: str, arguments: Sequence[str]) -> list[str]:
    """Run a program in several Python processes, which wait for each other at its `ready()`; what each prints."""
    preamble = "import sys\ndef ready():\n    print('ready', flush=True)\n    sys.stdin.readline()\n"
    command = [sys.executable, "-c", preamble + program, *arguments]
    env = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}  # the same code as here
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
        assert [process.returncode for process in processes] == [0] * count
        return outputs
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


def execute(url: str, sql: str) -> list[tuple[object, ...]]:
    """One statement from outside, in the words that both databases know."""
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as opened:
            rows = opened.execute(sql).fetchall()
        opened.close()
        return rows
    connection = psycopg2.connect(url)
    with connection, connection.cursor() as cursor:
        cursor.execute(sql)
        rows = cursor.fetchall() if cursor.description else []
    connection.close()
    return rows
