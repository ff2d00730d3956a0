"""The life of one task, from claim to finish: `run_task` is the whole story."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from cloudagent_queue import repository
from cloudagent_queue.agents import REPOSITORY_FOLDER, open_agent
from cloudagent_queue.allowed_hosts import egress_for
from cloudagent_queue.follow import Ending, LogReader, read_result
from cloudagent_queue.lease import Lease, Timers
from cloudagent_queue.redact import Redactor
from cloudagent_queue.sandboxes import Provider, Sandbox, SandboxSpec
from cloudagent_storage.errors import (
    CloudAgentError,
    DatabaseUnavailable,
    Internal,
    LeaseLost,
    SandboxError,
    SandboxGone,
    SandboxUnreachable,
    StorageFull,
)
from cloudagent_storage.records import (
    Artifacts,
    Claim,
    EventDraft,
    Level,
    Phase,
    Result,
    TaskError,
    TaskErrorCode,
    TaskStatus,
    Usage,
    Verdict,
    VerifyResult,
    bound_for_git,
    new_id,
)
from cloudagent_storage.secrets import Keyring
from cloudagent_storage.store import Store

log = logging.getLogger(__name__)


FULL_BYTES = 1_000_000
"""A disk with less free space than this is full."""


@dataclass(frozen=True)
class Worker:
    """What a worker process brings to every task that it runs."""

    name: str
    place: str
    """Where it runs: it reaches the sandboxes that are bound to this place."""
    store: Store
    keyring: Keyring
    open_provider: Callable[[str], Provider]
    deployment: str
    """Names this installation in a sandbox's metadata, so that it only ever kills its own."""
    cache_folder: Path
    git_environment: Mapping[str, str]
    """What git may know of the worker's own environment when it fetches: its user's ssh keys and credential helpers."""
    ring: Callable[[str], None]
    """Tells the queue of a task that another worker should take now."""
    stopping: threading.Event
    timers: Timers
    egress: str = "registries"
    """The hosts that sandboxes may reach, as the operator set them; see `allowed_hosts.py`."""
    running_max: int | None = None
    """How many tasks one account may have running at once, in the whole installation; None for any number."""


class Draining(Exception):
    """This worker stops; the sandbox lives on, and the next attempt adopts it."""


def run_waiting(worker: Worker, rung_for: str) -> None:
    """Somebody rang: run one task after the other, until none is left that this worker may have.

    Which task was rung for does not matter: the store knows whose turn it is, and a message may be late or double.
    """
    while not worker.stopping.is_set():
        if not run_task(worker):
            return
    worker.ring(rung_for)


def run_task(worker: Worker) -> bool:
    """Run the task whose turn it is to its end, or as far as this worker may. False when there was none to have.

    Whatever happens, one of three things is true afterwards: the task is in a terminal status with its work saved; or
    our lease was lost, and nothing was touched since; or the lease was given back with the sandbox alive, for the next
    attempt to adopt.
    """
    try:
        claim = worker.store.backlog.claim_next(
            worker=worker.name,
            place=worker.place,
            lease_s=worker.timers.lease_s,
            running_max=worker.running_max,
            patience_s=worker.timers.patience_s,
        )
    except DatabaseUnavailable as error:
        log.warning("no task can be claimed: %s", error)
        return False
    if claim is None:
        return False
    task_id = claim.task.task_id
    log.info("claimed %s, attempt %d", task_id, claim.attempt)
    try:
        with Lease(worker.store, claim, worker.timers) as lease:
            attempt = Attempt(worker, claim, lease)
            ending = attempt.work()
            saved = attempt.save()
            if saved and ending.status is TaskStatus.COMPLETED:
                ending = attempt.verify(ending)
            attempt.finish(ending)
        attempt.discard_sandbox()
    except LeaseLost:
        log.warning("%s belongs to another attempt now; attempt %d lets go", task_id, claim.attempt)
    except Draining:
        give_back(worker, claim)
        worker.ring(task_id)
    except (SandboxUnreachable, DatabaseUnavailable) as reason:
        log.warning("%s has to wait: %s", task_id, reason)
        give_back(worker, claim, pause_s=worker.timers.pause_s if isinstance(reason, SandboxUnreachable) else 0)
    except Exception:
        log.exception("%s failed in a way that nobody foresaw", task_id)
        give_up(worker, claim)
    return True


def give_back(worker: Worker, claim: Claim, *, pause_s: float = 0) -> None:
    """Let another attempt go on, after `pause_s`; the sweeper rings for it.

    A database that is away is waited for: else, once it is back, nobody could follow the task, or cancel it, before
    the lease has run out.
    """
    while True:
        try:
            worker.store.tasks.release(claim.task.task_id, claim.attempt, pause_s=pause_s)
            return
        except CloudAgentError as error:
            if not isinstance(error, DatabaseUnavailable) or worker.stopping.wait(worker.timers.signals_s):
                log.warning("could not release %s: %s", claim.task.task_id, error)
                return


def give_up(worker: Worker, claim: Claim) -> None:
    """End a task that no step could end: trying it again would fail again."""
    error = TaskError(code="internal", message=Internal().message, remedy=Internal.remedy)
    line = EventDraft(kind="error", level=Level.ERROR, message=error.message)
    try:
        worker.store.tasks.finish(
            claim.task.task_id, claim.attempt, status=TaskStatus.FAILED, error=error, events=[line]
        )
    except CloudAgentError as refused:
        log.warning("could not end %s: %s", claim.task.task_id, refused)


class Attempt:
    """One claim of one task; the steps of `run_task`."""

    def __init__(self, worker: Worker, claim: Claim, lease: Lease) -> None:
        self.worker = worker
        self.claim = claim
        self.lease = lease
        self.timers = worker.timers
        self.tasks = worker.store.tasks
        self.blobs = worker.store.blobs
        self.task_id = claim.task.task_id
        self.spec = claim.spec
        self.base_sha = claim.task.base_sha
        self.agent = open_agent(self.spec.agent)
        sealed = claim.credentials
        self.env: dict[str, str] = json.loads(worker.keyring.open(sealed, bound_to=self.task_id)) if sealed else {}
        sealed = claim.git_credentials
        self.git_tokens: dict[str, str] = (
            json.loads(worker.keyring.open(sealed, bound_to=bound_for_git(self.task_id))) if sealed else {}
        )
        self.redactor = Redactor([*self.agent.secrets(self.env), *self.git_tokens.values()])
        self.sandbox: Sandbox | None = None
        self.reader: LogReader | None = None
        self.agent_has_run = False
        self.result = Result()
        self.verdict = Verdict.UNVERIFIED
        self.usage = claim.task.usage
        self.sandbox_since: float | None = None

    # -- the steps ------------------------------------------------------------------------------------------------

    def work(self) -> Ending:
        """Bring an agent to its end: the one that an earlier attempt left running, or a new one."""
        try:
            if not self.adopt_sandbox():
                self.create_sandbox()
                self.prepare_repository()
                self.set_up()
                self.start_agent()
            return self.follow()
        except (LeaseLost, Draining, DatabaseUnavailable):
            raise
        except SandboxUnreachable as error:
            if (full := self.full_disk(error)) is not None:
                return full
            raise
        except _Ended as ended:
            return ended.ending
        except SandboxGone as error:
            self.sandbox = None
            return Ending.failed("sandbox_lost", "The sandbox died, and what was not saved is lost.", error.remedy)
        except CloudAgentError as error:
            if self.lease.signals.cancel_requested:
                return Ending.cancelled()  # that is why it failed
            return self.full_disk(error) or Ending.failed_by(error)
        except Exception as error:
            log.exception("%s failed in a way that nobody foresaw", self.task_id)
            if (full := self.full_disk(error)) is not None:
                return full
            return Ending.failed("internal", Internal().message, Internal.remedy)

    def adopt_sandbox(self) -> bool:
        """Find the sandbox of an earlier attempt. True when an agent was started in it: go straight to `follow`.

        A sandbox in which no agent was started holds nothing that is worth keeping; it is killed, and confirmed gone,
        before a new one may be made.
        """
        provider = self.provider()
        if self.claim.sandbox_place not in (None, provider.place):
            # No new sandbox before the old one is confirmed gone, and this one never can be from here.
            self.end(
                "sandbox_lost",
                "The machine that the sandbox is on did not come back.",
                "Start a worker there again, or try the task once more with retry_task.",
            )
        if (sandbox_id := self.claim.sandbox_id) is not None:
            try:
                sandbox = provider.connect(sandbox_id)
            except SandboxGone:
                if self.claim.task.phase in (Phase.AGENT, Phase.SAVE, Phase.VERIFY):
                    self.end("sandbox_lost", "The sandbox died while the agent was working.", SandboxGone.remedy)
                return False
            if self.claim.task.phase in (Phase.AGENT, Phase.SAVE, Phase.VERIFY):
                self.sandbox, self.sandbox_since = sandbox, time.monotonic()
                self.agent_has_run = True
                self.note(f"Attempt {self.claim.attempt} goes on in the same sandbox.")
                if self.claim.task.phase is Phase.AGENT and read_result(sandbox) is None and not sandbox.alive():
                    # Only where the last worker died just before the start: a sandbox starts one command in its life.
                    with contextlib.suppress(SandboxError):
                        self.agent.start(sandbox, env=self.env)
                return True
            sandbox.kill()
        elif (nonce := self.claim.sandbox_nonce) is not None:
            for info in provider.list({"nonce": nonce}):
                provider.connect(info.id).kill()
        return False

    def create_sandbox(self) -> None:
        self.enter(Phase.SANDBOX)
        nonce = new_id("sbx")
        provider = self.provider()
        self.tasks.update(self.task_id, self.claim.attempt, sandbox_nonce=nonce, sandbox_place=provider.place)
        metadata = {"deployment": self.worker.deployment, "task": self.task_id, "nonce": nonce}
        wanted = SandboxSpec(egress=egress_for(self.worker.egress, self.agent, self.env, self.spec))
        self.sandbox, self.sandbox_since = provider.create(wanted, metadata=metadata), time.monotonic()
        self.tasks.update(self.task_id, self.claim.attempt, sandbox_id=self.sandbox.id, provider=provider.name)
        self.note(f"Sandbox ready: {provider.name}.")

    def prepare_repository(self) -> None:
        self.enter(Phase.REPOSITORY)
        bundle = self.blobs.get(self.claim.account_id, self.task_id, "input")
        if bundle is None and self.spec.repository != "none":
            give_up = threading.Event()
            with self.lease.interruptible(give_up.set):
                bundle, self.base_sha = repository.fetch_remote(
                    self.spec.repository,
                    base_ref=self.spec.base_ref,
                    cache_folder=self.worker.cache_folder,
                    env=self.worker.git_environment,
                    timeout_s=self.timers.fetch_s,
                    tokens=self.git_tokens,
                    account_id=self.claim.account_id,
                    give_up=give_up,
                )
            self.blobs.put(self.task_id, "input", bundle, attempt=self.claim.attempt)
        self.base_sha = repository.check_out(
            self.box, bundle=bundle, base_sha=self.base_sha, branch=self.claim.task.branch
        )
        self.tasks.update(self.task_id, self.claim.attempt, base_sha=self.base_sha)
        self.note(f"Repository ready at {self.base_sha[:12]}, branch {self.claim.task.branch}.")

    def set_up(self) -> None:
        if self.spec.setup is None:
            return
        self.enter(Phase.SETUP)
        with self.lease.interruptible(self.box.end_processes):
            done = repository.run_setup(self.box, self.spec.setup, timeout_s=self.timers.setup_s)
        self.note(self.redactor.text(done.output) or "The set-up command printed nothing.", kind="tool_result")
        self.stop_if_cancelled()
        if done.exit_code != 0:
            how = "did not end in time" if done.exit_code is None else f"ended with exit code {done.exit_code}"
            self.end("setup_failed", f"The set-up command {how}.", "Its output is in the log; correct `setup`.")

    def start_agent(self) -> None:
        self.stop_if_cancelled()
        self.agent.install(
            self.box,
            self.spec,
            request={
                "prompt": self.spec.prompt,
                "cwd": REPOSITORY_FOLDER,
                "resume": None,
                "model": self.spec.model,
                "max_turns": self.spec.max_turns,
                "max_budget_usd": self.spec.max_budget_usd,
                "checkpoint_seconds": self.timers.checkpoint_s,
            },
        )
        # Before the start, not after it: an attempt that finds this phase never sets the repository up again.
        self.enter(Phase.AGENT)
        self.agent_has_run = True
        self.agent.start(self.box, env=self.env)

    def follow(self) -> Ending:
        """Read the agent's log into the store until the agent ends, or has to be ended."""
        reader = self.reader = LogReader(self.box, self.claim.log_offset, self.redactor)
        limit_s = self.spec.timeout_minutes * 60
        if self.claim.task.phase in (Phase.SAVE, Phase.VERIFY):
            # It had ended when an earlier attempt died; what it was stopped for, if it was, is still so.
            ended = read_result(self.box)
            why = self.reason_to_stop(self.claim.running_seconds, limit_s, 0, reader)
            if why is not None and (ended is None or ended.status is not TaskStatus.COMPLETED):
                return why.with_summary_of(ended)
            return ended or Ending.failed(
                "interrupted", "The agent's result is missing.", "Look at the end of the log."
            )
        started = time.monotonic() - self.claim.running_seconds
        last_event = time.monotonic()
        asked_to_stop: tuple[float, Ending] | None = None
        while True:
            self.lease.check()
            if self.worker.stopping.is_set():
                raise Draining
            ended = read_result(self.box)
            alive = ended is None and self.box.alive()
            if ended is None and not alive:
                ended = read_result(self.box)  # it may have come to its end between the two looks
            now = time.monotonic()
            # Read after looking for the end, so that the last lines are never missed.
            if events := reader.read():
                last_event = now
            if events or reader.moved:
                self.usage = self.whole_usage(reader.usage(self.usage))
                signals = self.tasks.follow(
                    self.task_id,
                    self.claim.attempt,
                    events,
                    log_offset=reader.offset,
                    lease_s=self.timers.lease_s,
                    usage=self.usage,
                    running_seconds=now - started,
                )
                self.lease.renewed(signals)
                continue
            if asked_to_stop is not None:
                since, ending = asked_to_stop
                if ended is not None or not alive or now - since > self.timers.stop_grace_s:
                    return ending.with_summary_of(ended)
            elif ended is not None:
                # It may be that an earlier attempt asked it to stop, and died.
                why = (
                    None
                    if ended.status is TaskStatus.COMPLETED
                    else self.reason_to_stop(now - started, limit_s, 0, reader)
                )
                return ended if why is None else why.with_summary_of(ended)
            elif not alive:
                if said := self.box.output(max_bytes=2000).decode("utf-8", "replace").strip():
                    self.note(self.redactor.text(said), level=Level.WARNING, kind="stderr")
                return Ending.failed(
                    "interrupted",
                    "The agent's process died.",
                    "What it had done is saved; submit the task again to go on.",
                )
            elif (ending := self.reason_to_stop(now - started, limit_s, now - last_event, reader)) is not None:
                asked_to_stop = (now, ending)
                self.note(ending.why, level=Level.WARNING)
                self.agent.tell(self.box, "stop", {"kind": "stop", "reason": ending.why})
            self.worker.stopping.wait(self.timers.poll_s)

    def reason_to_stop(self, running_s: float, limit_s: float, quiet_s: float, reader: LogReader) -> Ending | None:
        if self.lease.signals.cancel_requested:
            return Ending.cancelled()
        if running_s > limit_s:
            return Ending.failed(
                "timed_out",
                f"The task ran longer than its limit of {self.spec.timeout_minutes:g} minutes.",
                "What the agent had done is saved; submit again with a higher timeout_minutes.",
            )
        idle_s = self.timers.idle_in_tool_s if reader.tool_running else self.timers.idle_s
        if quiet_s > idle_s:
            return Ending.failed(
                "idle",
                f"The agent said nothing for {idle_s / 60:g} minutes.",
                "What the agent had done is saved; look at the end of the log for what it waited for.",
            )
        return None

    def save(self) -> bool:
        """Bring out and keep what the agent did, however it ended. True when there is something to verify."""
        if self.sandbox is None or not self.agent_has_run or self.base_sha is None:
            return False
        self.enter(Phase.SAVE)
        branch = self.claim.task.branch
        self.result = Result(artifacts=Artifacts(branch=branch))
        try:
            self.box.end_processes()
            if (session := self.agent.session(self.box)) is not None:
                self.keep("session", self.redactor.data(session))
            bundle = repository.collect(
                self.box, base_sha=self.base_sha, branch=branch, message=f"{self.spec.title}\n\nTask {self.task_id}"
            )
            if bundle is None:
                self.note("The agent changed no file.")
                return True
            changes = repository.inspect(self.input_bundle(), self.base_sha, bundle, branch)
        except (LeaseLost, SandboxUnreachable, DatabaseUnavailable):
            raise
        except Exception as error:
            self.full_disk(error)
            if not isinstance(error, CloudAgentError):
                raise
            self.note(f"The agent's work could not be brought out: {error.message}", level=Level.ERROR, kind="error")
            return False
        self.keep("result", bundle)
        self.keep("diff", self.redactor.data(changes.diff))
        self.result = Result(
            artifacts=Artifacts(
                branch=branch,
                commits=changes.commits,
                files_changed=len(changes.files),
                insertions=changes.insertions,
                deletions=changes.deletions,
            )
        )
        self.note(f"Saved: {_files(len(changes.files))} changed, +{changes.insertions} -{changes.deletions} lines.")
        return True

    def verify(self, ending: Ending) -> Ending:
        """Run the `verify` command in a clean checkout of what was saved; no process of the agent's is left by now."""
        if self.spec.verify is None:
            return ending
        try:
            self.enter(Phase.VERIFY)
            with self.lease.interruptible(self.box.end_processes):
                done = repository.verify(
                    self.box,
                    input_bundle=self.input_bundle(),
                    result_bundle=self.blobs.get(self.claim.account_id, self.task_id, "result"),
                    base_sha=self.base_sha,
                    branch=self.claim.task.branch,
                    command=self.spec.verify,
                    timeout_s=self.timers.verify_s,
                )
            self.stop_if_cancelled()
        except _Ended as ended:
            return ended.ending
        except (LeaseLost, SandboxUnreachable, DatabaseUnavailable):
            raise
        except CloudAgentError as error:
            if self.lease.signals.cancel_requested:
                return Ending.cancelled()  # that is why
            self.note(f"The verify command could not be run: {error.message}", level=Level.ERROR, kind="error")
            return ending
        self.verdict = Verdict.PASSED if done.exit_code == 0 else Verdict.FAILED
        done = VerifyResult(command=done.command, exit_code=done.exit_code, output=self.redactor.text(done.output))
        self.result = self.result.model_copy(update={"verify": done})
        level = Level.INFO if self.verdict is Verdict.PASSED else Level.WARNING
        self.note(f"Verdict: {self.verdict}.", level=level)
        return ending

    def finish(self, ending: Ending) -> None:
        summary = None if ending.summary is None else self.redactor.text(ending.summary)
        error = ending.error
        if error is not None:
            error = error.model_copy(update={"message": self.redactor.text(error.message)})
        level = Level.INFO if ending.status is TaskStatus.COMPLETED else Level.WARNING
        self.lease.check()
        if ending.model is not None and self.spec.model is None:
            self.tasks.update(self.task_id, self.claim.attempt, model=ending.model)
        self.tasks.finish(
            self.task_id,
            self.claim.attempt,
            status=ending.status,
            verdict=self.verdict if ending.status is TaskStatus.COMPLETED else None,
            result=self.result.model_copy(update={"summary": summary}) if self.agent_has_run else None,
            error=error,
            usage=self.whole_usage(ending.usage or self.usage),
            events=[
                EventDraft(
                    kind="status", message=f"{ending.status.value.capitalize()}. {ending.why}".strip(), level=level
                )
            ],
        )

    def whole_usage(self, said: Usage) -> Usage:
        """What the agent said that it used, with the time of the sandbox in every attempt that held it."""
        held = 0.0 if self.sandbox_since is None else time.monotonic() - self.sandbox_since
        return said.model_copy(update={"sandbox_seconds": round(self.claim.task.usage.sandbox_seconds + held, 3)})

    def discard_sandbox(self) -> None:
        """After the finish: a worker that dies here leaves an orphan, which the sweeper finds."""
        if self.sandbox is None:
            return
        try:
            self.sandbox.kill()
        except CloudAgentError as error:
            log.warning("could not delete the sandbox of %s, the sweeper will: %s", self.task_id, error)

    # -- what the steps share -------------------------------------------------------------------------------------

    @property
    def box(self) -> Sandbox:
        assert self.sandbox is not None
        return self.sandbox

    def full_disk(self, error: Exception) -> Ending | None:
        """How the attempt ends where a full disk of this worker's is behind its failure; None where none is.

        Most of what fails is git, which says no more than that it failed: so the disks are asked. Raises `StorageFull`
        once an agent has run: its work is safe in the sandbox, and another attempt goes on when there is space.
        """
        cause = error if isinstance(error, OSError) else error.__cause__
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        for folder in (self.worker.cache_folder.parent, Path(tempfile.gettempdir())):
            with contextlib.suppress(OSError):
                full = full or shutil.disk_usage(folder).free < FULL_BYTES
        if not full:
            return None
        if self.agent_has_run:
            raise StorageFull() from error
        return Ending.failed("storage_full", "The worker's disk is full.", "Free space there; then submit it again.")

    def provider(self) -> Provider:
        return self.worker.open_provider(self.claim.task.provider or self.spec.provider or "local")

    def input_bundle(self) -> bytes | None:
        return self.blobs.get(self.claim.account_id, self.task_id, "input")

    def enter(self, phase: Phase) -> None:
        """Say how far the task is. Raises `LeaseLost`, and ends the attempt where a cancel or a drain is waiting."""
        self.lease.check()
        if phase is not Phase.SAVE:
            self.stop_if_cancelled()
        if self.worker.stopping.is_set():
            raise Draining
        self.tasks.update(self.task_id, self.claim.attempt, phase=phase)

    def note(self, message: str, *, level: Level = Level.INFO, kind: str = "status") -> None:
        draft = EventDraft.model_validate({"kind": kind, "message": message, "level": level})
        self.worker.store.events.add(self.task_id, draft, attempt=self.claim.attempt)

    def keep(self, kind: str, data: bytes) -> None:
        self.blobs.put(self.task_id, kind, data, attempt=self.claim.attempt)  # pyright: ignore[reportArgumentType]

    def stop_if_cancelled(self) -> None:
        if self.lease.signals.cancel_requested:
            raise _Ended(Ending.cancelled())

    def end(self, code: TaskErrorCode, message: str, remedy: str) -> NoReturn:
        raise _Ended(Ending.failed(code, message, remedy))


class _Ended(Exception):
    """The attempt is over before, or without, an agent's own end."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.why)
        self.ending = ending


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
