"""What can be done with tasks."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, WithJsonSchema

from cloudagent_mcp.checked import what_was_checked
from cloudagent_mcp.operations import Caller, in_thread, operation
from cloudagent_mcp.operations.candidates import check_losers
from cloudagent_mcp.operations.credentials import Credentials, secret
from cloudagent_mcp.operations.overlaps import warned
from cloudagent_mcp.operations.sessions import Sessions
from cloudagent_mcp.operations.submission import Allowed, check_task, find_source, going_on
from cloudagent_mcp.operations.waiting import brief_line, wait_for
from cloudagent_mcp.session_home import PACKED_MAX
from cloudagent_queue.agents import open_agent
from cloudagent_queue.candidates import Sealing
from cloudagent_queue.repository import upload_in
from cloudagent_storage.errors import NotReady, StartGiven
from cloudagent_storage.overview import Place
from cloudagent_storage.records import (
    MAX_CANDIDATES,
    RETRIES_MAX,
    Asked,
    BlobKind,
    Candidate,
    EventDraft,
    EventKind,
    Idempotency,
    Level,
    LogPage,
    OnInterrupt,
    Record,
    Task,
    TaskPage,
    TaskSpec,
    TaskStatus,
    new_id,
)

if TYPE_CHECKING:
    from cloudagent_storage.secrets import Keyring
    from cloudagent_storage.store import Store

log = logging.getLogger(__name__)
T = TypeVar("T")

WAIT_MAX_S = 50
"""Clients give up on a silent call after about a minute."""

TaskId = Annotated[str, Field(max_length=200)]
Limit = Annotated[int, Field(ge=1, le=100)]
Kind = Annotated[EventKind, WithJsonSchema({"type": "string"})]
"""There are many: whoever guesses wrong is told all of them."""


class Submitted(Task):
    """A task that was handed over."""

    replayed: bool = False
    """Was it there already, under the same idempotency key?"""


class TaskDetail(Task):
    """A task with the last lines of its log."""

    log: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    """Compared: those that have ended, the best first, then the others."""
    queue: Place | None = None
    """Where it stands in the queue, while it is in it."""
    updated_at: datetime | None = None
    """The time of the last of these lines."""


class TaskList(Record):
    """Several tasks, in the order in which they were named."""

    tasks: tuple[Task, ...]
    finished: bool
    """Is what was waited for the case?"""


class Cancelled(Task):
    """A task after a cancel."""

    changed: bool
    """False when it had ended, or a cancel was under way, before."""


class Tasks:
    """Submit, watch and cancel tasks."""

    def __init__(
        self,
        store: Callable[[], Store],
        keyring: Callable[[], Keyring],
        sessions: Sessions,
        *,
        allowed: Allowed,
        credentials: Credentials,
        running_max: int | None,
        ring: Callable[[str], None],
    ) -> None:
        """`store` and `keyring` are opened when they are first needed.

        `ring` sees to it that a worker takes the task; it is called after the commit and raises nothing.
        """
        self._open_store = store
        self._keyring = keyring
        self._sessions = sessions
        self._allowed = allowed
        self._credentials = credentials
        self._running_max = running_max
        self._ring = ring

    @property
    def _store(self) -> Store:
        return self._open_store()

    @operation("POST", "/tasks", title="Submit a task", open_world=True, status=202)
    def submit_task(
        self,
        caller: Caller,
        *,
        prompt: Annotated[
            str, Field(description="What the agent should do, in plain words. It sees nothing else of this talk.")
        ],
        repository: Annotated[
            str | None,
            Field(
                description="https, ssh or git@ address, a local folder, or none. Default: the repository you are in."
            ),
        ] = None,
        base_ref: Annotated[
            str | None,
            Field(description="Branch, tag or commit to start from. Default: your working tree as it is."),
        ] = None,
        title: Annotated[
            str | None, Field(max_length=200, description="A short name. Default: the prompt's first line.")
        ] = None,
        model: Annotated[str | None, Field(min_length=1, max_length=100)] = None,
        best_of: Annotated[
            int | None, Field(ge=1, le=MAX_CANDIDATES, description="Independent tries; the best counts.")
        ] = None,
        models: Annotated[list[str], Field(max_length=MAX_CANDIDATES, description="For the tries in turn.")] = [],  # noqa: B006
        providers: Annotated[list[str], Field(max_length=MAX_CANDIDATES)] = [],  # noqa: B006
        cancel_losers: Annotated[bool, Field(description="Once one passed.")] = False,
        verify: Annotated[
            str | None,
            Field(
                max_length=10_000,
                description="Shell command that passes if the result is right; run in a clean checkout.",
            ),
        ] = None,
        retries: Annotated[
            int | None, Field(ge=0, le=RETRIES_MAX, description="How often the agent may mend a failure.")
        ] = None,
        setup: Annotated[
            str | None,
            Field(max_length=10_000, description="Shell command that is run in the repository before the agent."),
        ] = None,
        on_interrupt: Annotated[OnInterrupt, Field(description="What follows its sandbox's death.")] = "resume",
        timeout_minutes: Annotated[float, Field(gt=0, le=1440)] = 60.0,
        max_turns: Annotated[int | None, Field(ge=1, le=10_000)] = None,
        max_budget_usd: Annotated[float | None, Field(gt=0, le=10_000)] = None,
        provider: Annotated[str | None, Field(max_length=100, description="Of its sandbox.")] = None,
        egress: Annotated[list[str], Field(max_length=200, description="More hosts that its sandbox may reach.")] = [],  # noqa: B006
        tags: Annotated[list[str], Field(max_length=20)] = [],  # noqa: B006
        priority: Literal["low", "normal", "high"] = "normal",
        continue_task_id: Annotated[
            str | None, Field(max_length=200, description="Go on from this ended task: its branch, its talk.")
        ] = None,
        session: Annotated[
            str | None, Field(max_length=PACKED_MAX, description="A conversation to go on with, as `ca` packs it.")
        ] = None,
        allow_secrets: Annotated[
            list[str], Field(max_length=200, description="Files that look like secrets, each allowed by your user.")
        ] = [],  # noqa: B006
        idempotency_key: Annotated[
            str | None,
            Field(min_length=1, max_length=255, description="Repeat the call with the same key: still one task."),
        ] = None,
        anthropic_api_key: Annotated[str | None, secret("For its model; never echoed.")] = None,
        github_token: Annotated[str | None, secret("Fetches from github.com; never echoed.")] = None,
    ) -> Submitted:
        """Hand a coding task to a remote agent that works alone in a sandbox on a copy of a repository.
        Answers at once with a task_id; the task goes on whatever becomes of this call. Then wait with get_task.

        Raises every error under InvalidInput, CredentialMissing and DatabaseUnavailable (StorageFull among them), and,
        to go on from another task, TaskNotFound, TaskExpired, NotReady and SessionRefused; nothing is kept then.
        """
        several = {"best_of": best_of, "models": models, "providers": providers, "cancel_losers": cancel_losers}
        basic = {
            "prompt": prompt,
            "repository": repository,
            "base_ref": base_ref,
            "title": title,
            "model": model,
            "verify": verify,
            "retries": retries,
            "setup": setup,
            "on_interrupt": on_interrupt,
            "timeout_minutes": timeout_minutes,
            "max_turns": max_turns,
            "max_budget_usd": max_budget_usd,
            "provider": provider,
            "egress": egress,
            "tags": tags,
            "priority": priority,
        }
        asked = {**basic, **several}
        spec = check_task(asked, self._allowed, own_user=caller.local)
        environment = self._credentials.for_agent(caller, open_agent(spec.agent), anthropic_api_key)
        tokens = self._credentials.for_git(caller, github_token)
        idempotency = None
        if idempotency_key is not None:
            # Without the credentials: the same submit may be repeated with fresh ones. Nor does it matter which upload
            # it is, as it does not matter what is in a folder by then.
            place = "upload" if repository and upload_in(repository) else repository
            said = [*{**basic, "repository": place}.values()]
            # What there was not in earlier versions is left out where it is not asked for.
            said += [each for each in (continue_task_id, session) if each is not None]
            said += [several] if any(several.values()) else []
            digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
            idempotency = Idempotency(key=idempotency_key, digest=digest)
            if (before := self._store.tasks.replay(caller.account_id, idempotency)) is not None:
                return Submitted.model_validate({**dict(advise(before)), "replayed": True})
        task_id = new_id("task")
        conversation: Mapping[BlobKind, bytes] = {}
        if continue_task_id is None:
            source = find_source(caller, repository, base_ref, self._store.uploads, allow_secrets)
            if session is not None:
                secrets = [*open_agent(spec.agent).secrets(environment), *tokens.values()]
                carried = self._sessions.taken_along(caller, session, for_task=task_id, secrets=secrets)
                conversation = {"conversation": carried}
        else:
            given = {"repository": repository, "base_ref": base_ref, "session": session}
            if too_much := [name for name, value in given.items() if value is not None]:
                raise StartGiven(field=too_much[0])
            earlier = self._sessions.earlier(caller, continue_task_id, for_task=task_id)
            spec = check_task(going_on(asked, earlier.spec), self._allowed, own_user=caller.local)
            source, conversation = earlier.source, earlier.blobs
        check_losers(spec, source)
        spec = spec.model_copy(update={"repository": source.repository})
        task = self._store.tasks.add(
            caller.account_id,
            spec,
            task_id=task_id,
            base_sha=source.base_sha,
            config=source.config,
            manifests=source.manifests,
            source_key=source.key,
            **self._sealed(spec, task_id, environment, tokens),
            blobs={**({"input": source.bundle} if source.bundle is not None else {}), **conversation},
            lines=[EventDraft(kind="status", message="Queued."), *source.warnings],
            idempotency=idempotency,
            parent_task_id=continue_task_id,
        )
        # Also for a task that another submit with the same key has added meanwhile: its caller may be dead by now.
        self._ring_for(caller.account_id, task)
        return Submitted.model_validate({**dict(advise(task)), "replayed": task.task_id != task_id})

    @operation("GET", "/tasks/{task_id}", title="Look at a task", read_only=True, idempotent=True)
    async def get_task(
        self,
        caller: Caller,
        *,
        task_id: TaskId,
        wait_seconds: Annotated[
            float,
            Field(ge=0, le=WAIT_MAX_S, description="Wait this long for its status to change; 50 saves you polling."),
        ] = 0,
        log_lines: Annotated[int, Field(ge=0, le=50, description="Last lines of its log to show.")] = 5,
    ) -> TaskDetail:
        """One task: status, phase, verdict, result, cost, last log lines, and what to do next."""
        detail = await self._in_thread(self._detail_of, caller.account_id, task_id, log_lines)
        if not wait_seconds or detail.status.terminal:
            return detail
        before = detail
        await wait_for(self._open_store, caller, [task_id], lambda tasks: changed(before, tasks[0]), wait_seconds)
        return await self._in_thread(self._detail_of, caller.account_id, task_id, log_lines)

    @operation("POST", "/tasks/wait", title="Wait for tasks", read_only=True, idempotent=True)
    async def wait_tasks(
        self,
        caller: Caller,
        *,
        task_ids: Annotated[list[str], Field(min_length=1, max_length=50)],
        mode: Literal["any", "all"] = "all",
        timeout_seconds: Annotated[float, Field(ge=0, le=WAIT_MAX_S)] = WAIT_MAX_S,
    ) -> TaskList:
        """Wait until any or all have ended, one asks something, or time is up; call again while `finished` is false."""
        enough = any if mode == "any" else all
        asked: set[tuple[str, str]] | None = None

        def finished(found: list[Task]) -> bool:
            return enough(task.status.terminal for task in found)

        def wanted(found: list[Task]) -> bool:
            """Also when an agent has begun to ask something: what waits for an answer ends no sooner."""
            nonlocal asked
            asking = {(task.task_id, task.asked.question_id) for task in found if task.asked is not None}
            asking |= {(task.task_id, candidate) for task in found for candidate in task.asking}
            asked = asking if asked is None else asked & asking
            return finished(found) or not asking <= asked

        tasks = await wait_for(self._open_store, caller, task_ids, wanted, timeout_seconds)
        advised = await self._in_thread(self._advised, caller.account_id, tasks)
        return TaskList(tasks=advised, finished=finished(tasks))

    @operation("GET", "/tasks", title="List tasks", read_only=True, idempotent=True)
    def list_tasks(
        self,
        caller: Caller,
        *,
        status: Literal["queued", "running", "waiting", "completed", "failed", "cancelled"] | None = None,
        repository: Annotated[str | None, Field(max_length=2000)] = None,
        tag: Annotated[str | None, Field(max_length=100)] = None,
        schedule_id: Annotated[str | None, Field(max_length=200)] = None,
        limit: Limit = 20,
        cursor: Annotated[str | None, Field(max_length=500, description="next_cursor of the list before.")] = None,
        offset: Annotated[int, Field(ge=0, le=1_000_000)] = 0,
        candidates: Annotated[bool, Field(description="With the candidates of other tasks; only in REST.")] = False,
    ) -> TaskPage:
        """Your tasks, newest first."""
        page = self._store.tasks.list(
            caller.account_id,
            status=None if status is None else TaskStatus(status),
            repository=repository,
            tag=tag,
            schedule_id=schedule_id,
            candidates=candidates,
            limit=limit,
            cursor=cursor,
            offset=offset,
        )
        return page.model_copy(update={"tasks": self._advised(caller.account_id, page.tasks)})

    @operation("POST", "/tasks/{task_id}/cancel", title="Cancel a task", destructive=True, idempotent=True)
    def cancel_task(self, caller: Caller, *, task_id: TaskId) -> Cancelled:
        """Stop a task. What the agent did until then is saved; twice, or after its end, nothing changes."""
        task, changed = self._store.tasks.request_cancel(caller.account_id, task_id)
        return Cancelled.model_validate({**dict(advise(task)), "changed": changed})

    @operation("POST", "/tasks/{task_id}/retry", title="Try a task again", open_world=True, status=202)
    def retry_task(self, caller: Caller, *, task_id: TaskId) -> Task:
        """Try a task that has ended once more: a new task with the same prompt, files and limits.

        Raises `NotReady` while it has not ended, and what submit_task raises.
        """
        earlier = self._store.tasks.get(caller.account_id, task_id)
        if not earlier.status.terminal:
            raise NotReady()
        spec = self._store.tasks.spec(caller.account_id, task_id)
        bundle = self._store.blobs.get(caller.account_id, task_id, "input")
        config, manifests = self._store.tasks.settings(caller.account_id, task_id)
        environment = self._credentials.for_agent(caller, open_agent(spec.agent), None)
        again = new_id("task")
        origin = self._store.tasks.get(caller.account_id, earlier.submitted_as)
        task = self._store.tasks.add(
            caller.account_id,
            spec,
            task_id=again,
            # Of a remote repository it is fetched anew, unless it was fetched before.
            base_sha=earlier.base_sha if bundle is not None else None,
            config=config if bundle is not None else None,
            manifests=manifests if bundle is not None else None,
            source_key=self._store.tasks.source_key(caller.account_id, task_id),
            **self._sealed(spec, again, environment, self._credentials.for_git(caller, None)),
            blobs={**({"input": bundle} if bundle is not None else {}), **self._sessions.again(caller, task_id, again)},
            lines=[EventDraft(kind="status", message=f"Queued, to try {task_id} once more.")],
            retry_of=task_id,
            parent_task_id=origin.parent_task_id,
        )
        self._ring_for(caller.account_id, task)
        return advise(task)

    @operation("GET", "/tasks/{task_id}/logs", title="Read a task's log", read_only=True, idempotent=True)
    def get_task_logs(
        self,
        caller: Caller,
        *,
        task_id: TaskId,
        after: Annotated[int, Field(ge=0, le=2**53, description="next_after of the page before.")] = 0,
        limit: Annotated[int, Field(ge=1, le=1000)] = 100,
        level: Annotated[
            Literal["debug", "info", "warning", "error"] | None, Field(description="The lowest to show.")
        ] = None,
        kinds: Annotated[list[Kind], Field(max_length=11, description="Such as text, tool_use, question, error.")] = [],  # noqa: B006
        raw: Annotated[bool, Field(description="With the agent's own messages; only in REST.")] = False,
        tail: Annotated[bool, Field(description="The last lines, whatever else is asked for; only in REST.")] = False,
    ) -> LogPage:
        """What happened in a task, line by line: what the agent said, did and saw."""
        if tail:
            # Refused as a page of it would be, once the log is gone.
            self._store.events.list(caller.account_id, task_id, after=2**53, limit=1)
            return self._store.events.tail(caller.account_id, task_id, limit)
        return self._store.events.list(
            caller.account_id,
            task_id,
            after=after,
            limit=limit,
            level=None if level is None else Level(level),
            kinds=tuple(kinds),
            raw=raw,
        )

    def _detail_of(self, account_id: str, task_id: str, log_lines: int) -> TaskDetail:
        store = self._store
        task = store.tasks.get(account_id, task_id)
        candidates = store.candidates.of(account_id, task_id) if task.best_of is not None else ()
        if candidates and not task.status.terminal:
            task = task.model_copy(update={"usage": store.candidates.usage(account_id, task_id)})
        lines = store.events.tail(account_id, task_id, log_lines).lines if log_lines else ()
        place = None
        if task.status is TaskStatus.QUEUED:
            place = store.backlog.place_of(account_id, task_id, running_max=self._running_max)
        (advised,) = self._advised(account_id, [task])
        return TaskDetail(
            **dict(advised),
            log=tuple(map(brief_line, lines)),
            candidates=tuple(candidates),
            queue=place,
            updated_at=lines[-1].timestamp if lines else None,
        )

    def _advised(self, account_id: str, tasks: Sequence[Task]) -> tuple[Task, ...]:
        return tuple(warned(self._store, account_id, list(map(advise, tasks))))

    # -- shared ---------------------------------------------------------------------------------------------------

    def _sealed(
        self, spec: TaskSpec, task_id: str, environment: Mapping[str, str], tokens: Mapping[str, str]
    ) -> dict[str, Any]:
        """A task's credentials as they are kept; where it has candidates, those have them, and it has none itself."""
        sealing = Sealing(self._keyring(), environment, tokens)
        if candidates := sealing.candidates(spec):
            return {"candidates": candidates}
        return {"credentials": sealing.for_agent(task_id), "git_credentials": sealing.for_git(task_id)}

    def _ring_for(self, account_id: str, task: Task) -> None:
        """Ring for a task, or for each of its candidates."""
        candidates = () if task.best_of is None else self._store.candidates.of(account_id, task.task_id)
        for task_id in [candidate.task_id for candidate in candidates] or [task.task_id]:
            self._ring(task_id)

    @staticmethod
    def _in_thread(function: Callable[..., T], *arguments: object) -> Awaitable[T]:
        return in_thread(lambda: function(*arguments))


def advise(task: Task) -> Task:
    """The task with what to do next, and when to look again."""
    which = "" if task.best is None else f" Candidate {task.best.candidate} is the best of {task.best_of};"
    which += " candidate=K names another, and get_task compares them." if which else ""
    match task.status:
        case _ if task.expired_at is not None:
            step, pause = "Its log, diff and bundles were pruned; submit it again if they are wanted.", None
        case TaskStatus.RUNNING if task.asking:
            asks = f"An agent asks something in {', '.join(task.asking)}"
            step, pause = f"{asks}: see list_pending_questions, and answer there with send_message.", 5.0
        case TaskStatus.QUEUED | TaskStatus.RUNNING:
            step, pause = f"Wait with get_task(task_id={task.task_id!r}, wait_seconds=50).", 5.0
        case TaskStatus.WAITING:
            step, pause = f"Its agent asks `question`. {how_to_answer(task.task_id, task.asked)}", 5.0
        case TaskStatus.COMPLETED if task.agent == "none":
            step, pause = f"Nothing is to be applied: it was only verified, and the verdict is {task.verdict}.", None
        case TaskStatus.COMPLETED if task.result is None or not _changed(task):
            checked = f"{_checked(task)} " if task.verdict != "unverified" else ""
            step, pause = f"{checked}No file was changed; the agent's answer is in result.summary.{which}", None
        case TaskStatus.COMPLETED:
            step, pause = f"{_checked(task)} Look at get_task_diff, then apply_task.{which}", None
        case _:
            saved = " What it had done is in get_task_diff; nothing has checked it." if _changed(task) else ""
            remedy = task.error.remedy if task.error else ""
            step, pause = f"{remedy} Read get_task_logs.{saved}{which}".strip(), None
    return task.model_copy(update={"next_action": step, "poll_after_seconds": pause})


def changed(before: Task, now: Task) -> bool:
    """Has that happened for which get_task is told to wait?"""
    return now.status is not before.status or not set(now.asking) <= set(before.asking)


def how_to_answer(task_id: str, asked: Asked | None) -> str:
    """What answers an agent's question: what only its user can know is asked of that person."""
    named = "" if asked is None else f", question_id={asked.question_id!r}"
    return f"Ask your user, then call send_message(task_id={task_id!r}{named}, message=the answer)."


def _checked(task: Task) -> str:
    """What `verify` said of the result, and why the agent was not done with it, if it was not."""
    verify = task.result.verify if task.result else None
    said = what_was_checked(task.verdict, None if verify is None else verify.model_dump(exclude={"output"}))
    if task.result is None or (cut_short := task.result.retry_error) is None:
        return said
    return f"{said} Its last retry was cut short ({cut_short.code}): see result.retry_error."


def _changed(task: Task) -> bool:
    return bool(task.result and task.result.artifacts and task.result.artifacts.files_changed)
