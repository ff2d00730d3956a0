"""In which sandbox a task is: found, made, lost and left, with the checkpoints by which it goes on in another."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Generator, Mapping
from typing import Literal, NoReturn

from cloudagent_queue import repository
from cloudagent_queue.agents import open_agent
from cloudagent_queue.allowed_hosts import check_asked, egress_for
from cloudagent_queue.follow import Ending, read_result
from cloudagent_queue.lease import Lease
from cloudagent_queue.redact import Redactor
from cloudagent_queue.sandboxes import Provider, Sandbox, SandboxSpec
from cloudagent_queue.seal import seal, unseal
from cloudagent_queue.touches import Touches
from cloudagent_queue.worker import Worker
from cloudagent_storage.errors import (
    CloudAgentError,
    DatabaseUnavailable,
    InvalidInput,
    LeaseLost,
    ProviderBusy,
    SandboxError,
    SandboxGone,
    SandboxUnavailable,
    SandboxUnreachable,
    SessionRefused,
    StorageFull,
    TemplateNotFound,
    UnknownProvider,
)
from cloudagent_storage.records import (
    BlobKind,
    Claim,
    EventDraft,
    KeptTemplate,
    Level,
    Phase,
    Question,
    Result,
    TaskErrorCode,
    TaskStatus,
    Usage,
    Verdict,
    VerifyResult,
    bound_for_git,
    new_id,
)
from cloudagent_storage.store import Changes

log = logging.getLogger(__name__)

LOSSES_MAX = 3
"""A task that has lost more sandboxes than this goes on in no other: it may be what kills them."""
LEAVE_EARLY_S = 300.0
"""A sandbox is left so long before its provider ends it, or a tenth of its time where that is less."""
NOTED_ONCE = 5
"""What is among the last lines of the log already is not noted once more."""


class Draining(Exception):
    """This worker stops; the sandbox lives on, and the next attempt adopts it."""


class Ended(Exception):
    """The attempt is over before, or without, an agent's own end."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.why)
        self.ending = ending


class Placement:
    """What all steps of an attempt share, and its sandbox."""

    def __init__(self, worker: Worker, claim: Claim, lease: Lease) -> None:
        self.worker = worker
        self.claim = claim
        self.lease = lease
        self.timers = worker.timers
        self.tasks = worker.store.tasks
        self.blobs = worker.store.blobs
        self.task_id = claim.task.task_id
        self.spec = claim.spec
        self.base_sha: str | None = claim.task.base_sha
        self.agent = open_agent(self.spec.agent)
        sealed = claim.credentials
        self.env: dict[str, str] = json.loads(worker.keyring.open(sealed, bound_to=self.task_id)) if sealed else {}
        sealed = claim.git_credentials
        self.git_tokens: dict[str, str] = (
            json.loads(worker.keyring.open(sealed, bound_to=bound_for_git(self.task_id))) if sealed else {}
        )
        self.redactor = Redactor([*self.agent.secrets(self.env), *self.git_tokens.values()])
        self.heed(None)
        self.provider: Provider | None = None
        """The one that the sandbox is from."""
        self.sandbox: Sandbox | None = None
        self.agent_has_run = claim.running_seconds > 0
        """In whatever sandbox."""
        self.agent_is_here = False
        """Has it been started in the sandbox that we have?"""
        self.result = Result()
        self.verdict = Verdict.UNVERIFIED
        self.usage = claim.task.usage
        self.sandbox_since: float | None = None
        """When this attempt got hold of its sandbox, by the machine's monotonic time."""
        self.sandbox_age_s = claim.sandbox_age_s
        """How old it was then."""
        self.log_offset = claim.log_offset
        self.question: Question | None = _open_question(claim)
        """What its agent asks, as far as the log has been read."""
        self.running_s = claim.running_seconds
        """How long agents have run before `follow`."""
        self.losses = claim.sandbox_losses
        self.retries_used = claim.task.retries_used
        self.failed: VerifyResult | None = claim.failed_verify
        """What the agent was told of when it last went on after a failed verify."""
        self.phase = claim.task.phase
        self.manifests = claim.manifests
        self.touches = Touches(claim.touches)
        self.is_set_up = False
        """Has the set-up been done in the template that the sandbox was made of?"""
        self.left: BlobKind = "result" if claim.task.phase is Phase.VERIFY else "checkpoint"
        """What is there of a sandbox's work once it is gone."""
        self.paid = claim.task.usage
        """With the sandboxes that were let go, of every attempt."""

    def heed(self, config: bytes | None) -> None:
        """Run the task as its repository says, which was checked when it was read, by a version that may be another."""
        self.config = repository.read_config(config)
        self.spec = self.config.applied_to(self.claim.spec)
        # The agent's credentials win.
        self.agent_env = {**self.config.environment, **self.env}

    # -- the sandbox -----------------------------------------------------------------------------------------------

    def adopt_sandbox(self) -> bool:
        """Find the sandbox of an earlier attempt. True when an agent was started in it: go straight to `follow`.

        A sandbox in which no agent was started holds nothing that is worth keeping; it is killed, and confirmed gone,
        before a new one may be made.
        """
        if self.claim.sandbox_nonce is None and self.claim.sandbox_id is None:
            return False
        provider = self.provider = self.earlier_provider()
        agent_was_started = self.claim.task.phase in (Phase.AGENT, Phase.SAVE, Phase.VERIFY)
        if self.claim.sandbox_place not in (None, provider.place):
            # Nothing here can tell whether it lives: the machine that it is on has been away for longer than
            # `patience_s`. Should it come back, its sweeper finds a sandbox that no row names any more.
            self.lose_sandbox("The machine that the sandbox is on did not come back.")
            return False
        if (sandbox_id := self.claim.sandbox_id) is not None:
            try:
                sandbox = provider.connect(sandbox_id)
            except SandboxGone:
                if self.claim.task.phase is Phase.VERIFY:
                    self.agent_has_run = True
                    raise Ended(Ending(TaskStatus.COMPLETED)) from None  # only what completed is verified, once saved
                if agent_was_started:
                    self.lose_sandbox()
                return False
            if agent_was_started:
                self.sandbox, self.sandbox_since = sandbox, time.monotonic()
                self.agent_has_run = self.agent_is_here = True
                self.note(f"Attempt {self.claim.attempt} goes on in the same sandbox.")
                if self.claim.task.phase is Phase.AGENT and self.said_at_its_end() is None and not sandbox.alive():
                    # Only where the last worker died just before the start: a sandbox starts each number once.
                    with contextlib.suppress(SandboxError):
                        self.agent.start(sandbox, env=self.agent_env, number=self.number)
                return True
            sandbox.kill()
        else:
            for info in provider.list({"nonce": self.claim.sandbox_nonce or ""}):
                provider.connect(info.id).kill()
        return False

    def earlier_provider(self) -> Provider:
        """The one that the sandbox of an earlier attempt is from. It may live, whatever this worker's settings are."""
        name = self.claim.task.provider or self.worker.providers[0]
        try:
            return self.worker.open_provider(name)
        except (SandboxUnavailable, UnknownProvider) as error:
            raise SandboxUnreachable(f"{name}: {error.message}", remedy=error.remedy) from error

    def lose_sandbox(self, why: str = "The sandbox died.") -> None:
        """Go on without the sandbox that is confirmed gone, from the last checkpoint; or end, as the task wants it."""
        self.let_go()
        self.losses += 1
        if self.spec.on_interrupt == "fail" or self.losses > LOSSES_MAX:
            self.end("sandbox_lost", why, "What was kept of its work is saved; retry_task tries it once more.")
        if self.spec.on_interrupt == "restart":
            self.blobs.drop(self.task_id, ["checkpoint", "session"], attempt=self.claim.attempt)
            if self.retries_used:
                self.go_on_from_result()
        self.left = "checkpoint"
        self.tasks.update(self.task_id, self.claim.attempt, sandbox_losses=self.losses)
        self.note(f"{why} The task goes on in a new one.", level=Level.WARNING)

    def leave_sandbox(self) -> None:
        """Take the work along before the provider ends the sandbox; no agent runs in it any more."""
        self.box.end_processes()
        self.keep_checkpoint()
        self.box.kill()
        self.let_go()
        self.note("The sandbox's time is nearly up. The task goes on in a new one.")

    def let_go(self) -> None:
        """Of a sandbox that is gone; its time has been paid for."""
        self.usage = self.whole_usage(self.usage)
        self.paid = self.usage
        self.sandbox, self.sandbox_since, self.sandbox_age_s = None, None, 0.0
        self.agent_is_here = False

    def create_sandbox(self) -> None:
        """Of the first provider that has one to give. Raises `ProviderBusy` when one may have one later."""
        self.enter(Phase.SANDBOX)
        circuit, refusals = self.worker.circuit, list[SandboxUnavailable]()
        for name in (self.spec.provider,) if self.spec.provider else self.worker.providers:
            if (wait_s := circuit.wait_s(name)) > 0:
                refusals.append(ProviderBusy(retry_after_s=wait_s))
                self.note_once(f"No sandbox from {name} for now: it is left alone, since it has refused.")
                continue
            try:
                self.create_sandbox_at(self.worker.open_provider(name))
            except SandboxUnavailable as error:
                if isinstance(error, ProviderBusy):
                    error.retry_after_s = circuit.refused(name, retry_after_s=error.retry_after_s)
                refusals.append(error)
                self.note_once(f"No sandbox from {name}: {error.message}")
                continue
            circuit.succeeded(name)
            self.note(f"Sandbox ready: {name}.")
            if self.box.remark:
                self.note(self.box.remark)
            return
        busy = [error for error in refusals if isinstance(error, ProviderBusy)]
        raise min(busy, key=lambda error: error.retry_after_s or 0) if busy else refusals[-1]

    def create_sandbox_at(self, provider: Provider) -> None:
        nonce = new_id("sbx")
        self.tasks.begin_sandbox(
            self.task_id, self.claim.attempt, nonce=nonce, provider=provider.name, place=provider.place
        )
        self.log_offset, self.sandbox_age_s, self.question = 0, 0.0, None
        metadata = {"deployment": self.worker.deployment, "task": self.task_id, "nonce": nonce}
        self.provider, self.is_set_up = provider, False
        ready = self.finished_set_up(provider)
        began = time.monotonic()  # its time runs, and is billed, while it is made ready
        if ready is not None:
            try:
                self.sandbox = provider.create(self.sandbox_spec(ready.template), metadata=metadata)
                self.is_set_up = True
            except TemplateNotFound:
                self.worker.store.templates.forget(ready)
        if not self.is_set_up:
            self.sandbox = provider.create(self.sandbox_spec(self.config.template), metadata=metadata)
        self.sandbox_since = began
        self.tasks.update(self.task_id, self.claim.attempt, sandbox_id=self.box.id)

    def sandbox_spec(self, template: str | None) -> SandboxSpec:
        wanted = self.spec.egress
        try:
            wanted += check_asked(self.config.egress or (), self.worker.egress_of_tasks, own_user=False)
        except InvalidInput as error:
            self.note_once(f"The hosts that .cloudagent.toml asks for stay closed: {error.message}")
        spec = self.spec.model_copy(update={"egress": wanted})
        return SandboxSpec(template=template, egress=egress_for(self.worker.egress, self.agent, self.env, spec))

    def finished_set_up(self, provider: Provider) -> KeptTemplate | None:
        """A template with the files of a sandbox in which this very set-up was done before."""
        if self.spec.setup is None:
            return None
        key = self.set_up_key(provider)
        template = self.worker.store.templates.find(self.claim.account_id, provider.name, key)
        if template is None:
            return None
        return KeptTemplate(account_id=self.claim.account_id, provider=provider.name, key=key, template=template)

    def keep_set_up(self) -> None:
        """Keep the sandbox as it is for the tasks that have the same set-up, where its provider can."""
        assert self.provider is not None
        try:
            template = self.box.snapshot()
        except (SandboxGone, SandboxUnreachable):
            raise
        except SandboxError as error:
            log.warning("the set-up of %s was not kept: %s", self.task_id, error)
            return
        if template is not None:
            key = self.set_up_key(self.provider)
            replaced = self.worker.store.templates.keep(self.claim.account_id, self.provider.name, key, template)
            self.note("Kept the finished set-up for later tasks.", level=Level.DEBUG)
            if replaced is not None:
                try:
                    self.provider.forget(replaced)
                except (SandboxError, SandboxUnavailable) as error:
                    log.warning("a set-up that was replaced stays at %s: %s", self.provider.name, error)

    def set_up_key(self, provider: Provider) -> str:
        assert self.spec.setup is not None
        return repository.setup_key(
            repository=self.spec.repository,
            provider=provider.name,
            template=self.config.template or provider.template,
            setup=self.spec.setup,
            environment=self.config.environment,
            manifests=self.manifests,
        )

    def session_ends(self) -> bool:
        """Will the provider end the sandbox soon?"""
        assert self.provider is not None
        cap_s = self.provider.session_cap_s
        return cap_s is not None and self.age_s() > cap_s - min(LEAVE_EARLY_S, cap_s / 10)

    def keep_checkpoint(self) -> None:
        """Keep what another sandbox needs to go on from here. The agent may be at work, and hostile."""
        assert self.base_sha is not None
        bundle = repository.checkpoint(self.box, base_sha=self.base_sha, branch=self.claim.task.branch)
        session = self.agent.session(self.box, self.number)
        blobs: dict[BlobKind, bytes] = {} if bundle is None else {"checkpoint": bundle}
        if session is not None:
            blobs["session"] = self.sealed(session)
        self.keep(blobs)
        self.note("Kept a checkpoint of the work in progress.", level=Level.DEBUG)

    def go_on_from_result(self) -> None:
        """Should the sandbox die from here on, the task goes on from what was saved: a checkpoint may be older."""
        if (result := self.kept("result")) is None:
            self.blobs.drop(self.task_id, ["checkpoint"], attempt=self.claim.attempt)
        else:
            self.keep({"checkpoint": result})

    @contextlib.contextmanager
    def not_now(self) -> Generator[None]:
        """For a checkpoint of which there will be another: what only this one has no luck with is let pass."""
        try:
            yield
        except (LeaseLost, SandboxGone, SandboxUnreachable):
            raise
        except CloudAgentError as error:
            if isinstance(error, DatabaseUnavailable) and not isinstance(error, StorageFull):
                raise
            log.warning("no checkpoint of %s was kept: %s", self.task_id, error)

    def whole_usage(self, said: Usage) -> Usage:
        """What the agent said that it used, with the time of every sandbox in every attempt that held it."""
        paid = {"sandbox_seconds": self.paid.sandbox_seconds, "sandbox_cost_usd": self.paid.sandbox_cost_usd}
        said = said.model_copy(update=paid)
        if self.sandbox is None or self.provider is None:
            return said
        held_s = self.age_s() - self.sandbox_age_s
        return self.worker.prices.charged(said, self.provider.name, self.sandbox.resources, held_s)

    def age_s(self) -> float:
        """How old the sandbox is."""
        held_s = 0.0 if self.sandbox_since is None else time.monotonic() - self.sandbox_since
        return self.sandbox_age_s + held_s

    # -- what the steps share -------------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """Of the agent's run among those of the task, from 1; a run that moves to another sandbox stays the same."""
        return self.retries_used + 1

    def said_at_its_end(self) -> Ending | None:
        """How the runner of this number says that it ended, if it has."""
        return read_result(self.box, self.number)

    @property
    def box(self) -> Sandbox:
        assert self.sandbox is not None
        return self.sandbox

    def input_bundle(self) -> bytes | None:
        return self.kept("input")

    def kept(self, kind: BlobKind) -> bytes | None:
        return self.blobs.get(self.claim.account_id, self.task_id, kind)

    def start_bundle(self) -> bytes | None:
        """Where the branch stands before its agent has done anything: a result of the task that it goes on from."""
        start = self.kept("start")
        # It may be on the branch of the parent, with which it is kept.
        return None if start is None else repository.with_ref(start, self.claim.task.branch)

    def sealed(self, session: bytes) -> bytes:
        """What an agent said, without secrets, and marked as this task's."""
        return seal(
            self.worker.keyring,
            self.redactor.data(session),
            account_id=self.claim.account_id,
            task_id=self.task_id,
            attempt=self.claim.attempt,
        )

    def kept_session(self, kind: Literal["session", "conversation"]) -> bytes | None:
        """What an agent said before, for the next one. One that nobody here has sealed is left alone."""
        if (sealed := self.kept(kind)) is None:
            return None
        owner = self.task_id if kind == "session" else self.claim.task.submitted_as
        try:
            return unseal(self.worker.keyring, sealed, account_id=self.claim.account_id, task_id=owner)
        except SessionRefused as error:
            self.note(f"The agent starts without the earlier conversation: {error.message}", level=Level.WARNING)
            return None

    def enter(self, phase: Phase) -> None:
        """Say how far the task is. Raises `LeaseLost`, and ends the attempt where a cancel or a drain is waiting."""
        self.lease.check()
        if phase is not Phase.SAVE:
            self.stop_if_cancelled()
        if self.worker.stopping.is_set():
            raise Draining
        changes: Changes = {"phase": phase}
        if self.failed is not None:
            changes |= {"retries_used": self.retries_used, "failed_verify": self.failed}
        self.tasks.update(self.task_id, self.claim.attempt, **changes)
        self.phase = phase

    def note(self, message: str, *, level: Level = Level.INFO, kind: str = "status") -> None:
        draft = EventDraft.model_validate({"kind": kind, "message": message, "level": level})
        self.worker.store.events.add(self.task_id, draft, attempt=self.claim.attempt)

    def note_once(self, message: str, *, level: Level = Level.WARNING) -> None:
        """What would be repeated as long as the task waits."""
        last = self.worker.store.events.tail(self.claim.account_id, self.task_id, NOTED_ONCE).lines
        if message not in [line.message for line in last]:
            self.note(message, level=level)

    def keep(self, blobs: Mapping[BlobKind, bytes]) -> None:
        self.blobs.put_all(self.task_id, blobs, attempt=self.claim.attempt)

    def stop_if_cancelled(self) -> None:
        if self.lease.signals.cancel_requested:
            raise Ended(Ending.cancelled())

    def end(self, code: TaskErrorCode, message: str, remedy: str) -> NoReturn:
        raise Ended(Ending.failed(code, message, remedy))


def _open_question(claim: Claim) -> Question | None:
    """The one that waited for an answer when the task was claimed."""
    task = claim.task
    if task.asked is None or task.question is None:
        return None
    return Question(text=task.question, **dict(task.asked))
