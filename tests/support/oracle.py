"""What must hold after every fault: no task lost, no agent twice, no line lost or doubled, nothing left over."""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cloudagent_storage.records import LOCAL_ACCOUNT, Task, TaskStatus
from cloudagent_storage.store.backlog import POISONED

if TYPE_CHECKING:
    from tests.support.installation import Installation

LAST_WORDS = re.compile(rf"(Completed|Failed|Cancelled)\b|{re.escape(POISONED.message)}$")
"""How the last line of the log of every task begins that has ended."""


def wrong_with(installation: Installation, ended: Mapping[str, str]) -> list[str]:
    """All that is wrong, a line each. `ended` names the tasks that did not complete; see `Installation.check`."""
    tasks = installation.tasks()
    wrong = [f"{task_id} was accepted and is lost" for task_id in installation.accepted if task_id not in tasks]
    for task in tasks.values():
        found = [*_ending(task, ended.get(task.task_id, "completed"))]
        # A parent of candidates has no agent, and tells of theirs.
        found += _candidates(tasks, task) if task.best_of else [*_log(installation, task), *_agent(installation, task)]
        wrong += [f"{task.task_id}: {what}" for what in found]
    wrong += [f"there is a process left over: {pid}, {command}" for pid, command in leftover_processes(installation)]
    for host in sorted(installation.hosts):
        sandboxes = installation.home(host) / "sandboxes"
        wrong += [f"there is a sandbox left over: {path}" for path in sandboxes.glob("*")]
        wrong += [f"there is a sandbox left over: {path}" for path in sandboxes.glob(".*")]
    return [*wrong, *_cloud(installation)]


def _cloud(installation: Installation) -> Iterator[str]:
    if installation.cloud is None:
        return
    sandboxes = {sandbox["id"]: sandbox for sandbox in installation.cloud.sandboxes()}
    for sandbox in sandboxes.values():
        if sandbox["alive"]:
            yield f"there is a sandbox left over: {sandbox['id']}, made as {sandbox['asked']['metadata']}"
    for task_id in installation.tasks():
        starts = dict.fromkeys(line["sandbox"] for line in installation.journal(task_id, "start"))
        for earlier, later in itertools.pairwise(starts):
            ended_at = sandboxes[earlier]["ended_at"]
            if ended_at is None or ended_at > sandboxes[later]["started_at"]:
                yield f"{task_id}: two sandboxes with an agent lived at once, {earlier} and {later}"


def _ending(task: Task, expected: str) -> Iterator[str]:
    if not task.status.terminal:
        yield f"it has not ended: {task.status}, {task.phase}, attempt {task.attempt}"
        return
    how = task.status.value if task.error is None or task.status is TaskStatus.CANCELLED else task.error.code
    if expected not in (how, "any"):
        yield f"it should have ended as {expected} and did as {how}"
    if task.completed_at is None or task.phase is not None:
        yield "it has ended and does not look like it"


def _candidates(tasks: Mapping[str, Task], parent: Task) -> Iterator[str]:
    mine = [task for task in tasks.values() if task.parent_task_id == parent.task_id and task.candidate is not None]
    if sorted(task.candidate or 0 for task in mine) != list(range(1, (parent.best_of or 0) + 1)):
        yield f"it has the candidates {[task.candidate for task in mine]}"
    if parent.status.terminal != all(task.status.terminal for task in mine):
        yield f"it is {parent.status}, and its candidates are {[task.status for task in mine]}"
    cost = sum(task.usage.cost_usd for task in mine)
    if parent.status.terminal and abs(parent.usage.cost_usd - cost) > 1e-9:
        yield f"it cost {parent.usage.cost_usd}, and its candidates {cost}"


def _log(installation: Installation, task: Task) -> Iterator[str]:
    lines = installation.store.events.list(LOCAL_ACCOUNT, task.task_id, limit=1_000_000, raw=True).lines
    if [line.seq for line in lines] != list(range(1, len(lines) + 1)):
        yield f"its log has a gap: {[line.seq for line in lines]}"
    numbers = [line.raw["number"] for line in lines if line.raw is not None and "number" in line.raw]
    # Of each agent, should it have been started anew in another sandbox; the last words of one that died with its
    # sandbox are lost.
    told = list(_from_zero(numbers))
    if any(part != list(range(len(part))) for part in told) or len(told) > 1 + _moves(installation, task):
        yield f"lines of its agent are lost, doubled or out of order: {numbers}"
    ends = [end["events"] for end in installation.journal(task.task_id, "end")]
    last = len(told[-1]) if told else 0
    if task.status is TaskStatus.COMPLETED and (not ends or ends[-1] != last):
        yield f"its agent wrote {ends} lines, and its log has {last}"
    last_words = [line.seq for line in lines if line.kind in ("status", "error") and LAST_WORDS.match(line.message)]
    if task.status is TaskStatus.COMPLETED and last_words != [len(lines)]:
        yield f"the lines that say that it ended are {last_words} of {len(lines)}"
    if len(last_words) > 1:
        yield f"it ended more than once: {last_words}"


def _agent(installation: Installation, task: Task) -> Iterator[str]:
    journal = installation.journal(task.task_id)
    if any(line["what"] == "overlap" for line in journal):
        yield "two agents lived at once"
    runs = [(line["sandbox"], line["number"]) for line in journal if line["what"] == "start"]
    numbers = [number for _, number in runs]
    if len(runs) > 1 + task.retries_used + _moves(installation, task) or len(set(runs)) < len(runs):
        yield f"its agent was started {len(runs)} times: {runs}"
    if numbers != sorted(numbers) or set(numbers) - set(range(1, task.retries_used + 2)):
        yield f"its agent had the runs {numbers}, and {task.retries_used} retries were used"
    if task.status is TaskStatus.COMPLETED and max(numbers, default=0) != task.retries_used + 1:
        yield f"its agent had the runs {numbers}, and {task.retries_used} retries are said to be used"
    calls = [line for line in journal if line["what"] == "call"]
    for run in dict.fromkeys((line["sandbox"], line["number"]) for line in calls):
        steps_there = [line["step"] for line in calls if (line["sandbox"], line["number"]) == run]
        if steps_there != list(range(len(steps_there))):
            yield f"calls were repeated or left out: {steps_there}"
    steps = {(line["number"], line["step"]) for line in calls}
    if task.status is TaskStatus.COMPLETED:
        artifacts = None if task.result is None else task.result.artifacts
        changed = 0 if artifacts is None else artifacts.files_changed
        if not steps or changed != len(steps):
            yield f"its agent wrote {len(steps)} files, and its result has {changed}"


def _moves(installation: Installation, task: Task) -> int:
    """How often its log says that it goes on in another sandbox."""
    return sum("goes on in a new one" in message for message in installation.log(task.task_id))


def _from_zero(numbers: list[int]) -> Iterator[list[int]]:
    """The parts of a list that each begin with 0."""
    part: list[int] = []
    for number in numbers:
        if number == 0 and part:
            yield part
            part = []
        part.append(number)
    if part:
        yield part


def leftover_processes(installation: Installation) -> list[tuple[int, str]]:
    """Living processes of any sandbox of this installation, by their environment: pid and command."""
    marks = [str(installation.folder).encode()]
    for path in installation.journal_folder.glob("*.jsonl"):
        marks += [line["sandbox"].encode() for line in installation.journal(path.stem)]
    found: list[tuple[int, str]] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # gone meanwhile
                environment = (folder / "environ").read_bytes()
                of_a_sandbox = b"CLOUDAGENT_SANDBOX=" in environment or b"STANDIN_JOURNAL=" in environment
                if of_a_sandbox and any(mark in environment for mark in marks):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append((int(folder.name), command))
    return found


def kill_leftovers(installation: Installation) -> None:
    """End them, where a test failed."""
    for pid, _ in leftover_processes(installation):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
