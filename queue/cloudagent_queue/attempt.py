"""One claim of one task: the steps of which `run_task` in run.py tells the story."""

from __future__ import annotations

import logging
import math
import threading
import time

from cloudagent_queue import repository
from cloudagent_queue.agents import EVENTS, REPOSITORY_FOLDER
from cloudagent_queue.follow import CHUNK, Ending, LogReader
from cloudagent_queue.placement import Draining, Ended, Placement
from cloudagent_queue.talk import Talk
from cloudagent_queue.touches import Touches
from cloudagent_storage.errors import (
    CloudAgentError,
    DatabaseUnavailable,
    Internal,
    LeaseLost,
    ProviderBusy,
    SandboxError,
    SandboxGone,
    SandboxUnreachable,
    StorageFull,
)
from cloudagent_storage.records import (
    Artifacts,
    EventDraft,
    Level,
    Phase,
    Result,
    TaskError,
    TaskStatus,
    Verdict,
)

log = logging.getLogger(__name__)

BUSY_MAX_S = 24 * 3600.0
"""A task that has got no sandbox for so long since it was submitted gets none any more."""


class Attempt(Placement):
    """One claim of one task; the steps of `run_task`."""

    def work(self, *, again_after: Ending | None = None) -> Ending:
        """Bring an agent to its end: the one that an earlier attempt left running, or a new one.

        With `again_after` the agent had ended so, and goes on with what the verify command said.
        """
        ending = self.bring_to_end(again_after)
        return ending.of_a_retry(again_after) if self.retries_used else ending

    def bring_to_end(self, again_after: Ending | None) -> Ending:
        try:
            adopted = False
            if again_after is None:
                self.heed(self.claim.config)
                adopted = self.adopt_sandbox()
            while True:
                try:
                    if again_after is not None:
                        before, again_after = again_after, None
                        self.start_retry(before)
                    elif not adopted:
                        bundle = self.bring_repository()
                        self.create_sandbox()
                        self.prepare_repository(bundle)
                        self.set_up()
                        self.start_agent()
                    return self.follow()
                except SandboxGone:
                    self.lose_sandbox()
                except _SessionEnds:
                    self.leave_sandbox()
                adopted = False
        except (LeaseLost, Draining, DatabaseUnavailable):
            raise
        except ProviderBusy as error:
            if time.time() - self.claim.task.created_at.timestamp() > BUSY_MAX_S:
                return Ending.failed_by(error)
            raise
        except SandboxUnreachable as error:
            if (full := self.full_disk(error)) is not None:
                return full
            raise
        except Ended as ended:
            return ended.ending
        except CloudAgentError as error:
            if self.lease.signals.cancel_requested:
                return Ending.cancelled()  # that is why it failed
            return self.full_disk(error) or Ending.failed_by(error)
        except Exception as error:
            log.exception("%s failed in a way that nobody foresaw", self.task_id)
            if (full := self.full_disk(error)) is not None:
                return full
            return Ending.failed("internal", Internal().message, Internal.remedy)

    def bring_repository(self) -> bytes | None:
        """The input bundle, before there is a sandbox: what that is to be stands in the repository."""
        bundle = self.input_bundle()
        if bundle is None and self.spec.repository != "none":
            self.enter(Phase.REPOSITORY)
            give_up = threading.Event()
            with self.lease.interruptible(give_up.set):
                fetched = repository.fetch(
                    self.spec.repository,
                    base_ref=self.spec.base_ref,
                    cache_folder=self.worker.cache_folder,
                    env=self.worker.git_environment,
                    timeout_s=self.timers.fetch_s,
                    tokens=self.git_tokens,
                    account_id=self.claim.account_id,
                    give_up=give_up,
                )
            bundle, self.base_sha = fetched.bundle, fetched.base_sha
            # Before the bundle: whoever finds that takes these for what belongs to it.
            self.tasks.update(
                self.task_id,
                self.claim.attempt,
                config=fetched.config,
                manifests=fetched.manifests,
                source_key=fetched.root,
            )
            self.keep({"input": bundle})
            self.heed(fetched.config)
            self.manifests = fetched.manifests
        if self.config.named:
            self.note_once(f"The repository's .cloudagent.toml sets: {self.config.named}.", level=Level.INFO)
        return bundle

    def prepare_repository(self, bundle: bytes | None) -> None:
        self.enter(Phase.REPOSITORY)
        self.base_sha = repository.check_out(
            self.box, bundle=bundle, base_sha=self.base_sha, branch=self.claim.task.branch, keep_files=self.is_set_up
        )
        self.tasks.update(self.task_id, self.claim.attempt, base_sha=self.base_sha)
        if (checkpoint := self.kept("checkpoint") or self.start_bundle()) is not None:
            repository.restore(self.box, checkpoint, branch=self.claim.task.branch)
        self.note(f"Repository ready at {self.base_sha[:12]}, branch {self.claim.task.branch}.")

    def set_up(self) -> None:
        if self.spec.setup is None:
            return
        if self.is_set_up:
            self.note("The set-up was done before: its sandbox was kept.")
            return
        self.enter(Phase.SETUP)
        with self.lease.interruptible(self.box.end_processes):
            done = repository.run_setup(
                self.box, self.spec.setup, timeout_s=self.timers.setup_s, env=self.config.environment
            )
        self.note(self.redactor.text(done.output) or "The set-up command printed nothing.", kind="tool_result")
        self.stop_if_cancelled()
        if done.exit_code != 0:
            how = "did not end in time" if done.exit_code is None else f"ended with exit code {done.exit_code}"
            self.end("setup_failed", f"The set-up command {how}.", "Its output is in the log; correct `setup`.")
        if not self.agent_has_run and self.start_bundle() is None:  # else an agent's work would be in it
            self.keep_set_up()

    def may_retry(self, ending: Ending) -> bool:
        """Is the result known to be wrong, and are a retry and something of every limit left?"""
        retries = self.spec.retries or 0
        wrong = ending.status is TaskStatus.COMPLETED and self.verdict is Verdict.FAILED and self.sandbox is not None
        if not wrong or ending.retry_error is not None or self.retries_used >= retries:
            return False
        spec, used = self.spec, ending.usage or self.usage
        limits = {
            "timeout_minutes": self.running_s >= spec.timeout_minutes * 60,
            "max_turns": spec.max_turns is not None and used.turns >= spec.max_turns,
            "max_budget_usd": spec.max_budget_usd is not None and used.cost_usd >= spec.max_budget_usd,
        }
        if reached := [name for name, is_reached in limits.items() if is_reached]:
            self.note(f"No retry: {' and '.join(reached)} of the task used up.", level=Level.WARNING)
        return not reached

    def start_retry(self, before: Ending) -> None:
        """Start the agent once more, in the same conversation, to mend what failed."""
        failed = self.result.verify
        assert failed is not None
        how = "did not end in time" if failed.exit_code is None else f"failed with exit code {failed.exit_code}"
        self.stop_if_cancelled()
        self.note(failed.output or "The verify command printed nothing.", kind="tool_result")
        retry = f"retry {self.retries_used + 1} of {self.spec.retries}"
        self.note(f"Verify {how}; its output goes back to the agent ({retry}).", level=Level.WARNING)
        self.go_on_from_result()
        self.left = "checkpoint"
        self.usage = self.whole_usage(before.usage or self.usage)
        # The next phase that is entered takes these into the row with it: so none is spent twice, and none is for free.
        self.retries_used, self.failed = self.retries_used + 1, failed
        if self.session_ends():
            self.enter(Phase.AGENT)
            raise _SessionEnds
        self.start_agent()

    def start_agent(self) -> None:
        self.stop_if_cancelled()
        own = self.kept_session("session")
        self.agent.install(
            self.box,
            self.spec,
            session=own or self.kept_session("conversation"),
            interrupted=own is not None,
            goes_on=self.agent_has_run and not self.agent_is_here,
            used=self.usage,
            number=self.number,
            failed=self.failed,
        )
        # Before the start, not after it: an attempt that finds this phase never sets the repository up again.
        self.enter(Phase.AGENT)
        self.agent_has_run = self.agent_is_here = True
        self.agent.start(self.box, env=self.agent_env, number=self.number)

    def follow(self) -> Ending:
        """Read the agent's log into the store until the agent ends, or has to be ended."""
        self.touches.folder = f"{self.box.root}/{REPOSITORY_FOLDER}"
        reader = LogReader(self.log_offset, self.redactor, question=self.question, touches=self.touches)
        limit_s = self.spec.timeout_minutes * 60
        if self.phase in (Phase.SAVE, Phase.VERIFY):
            # It had ended when an earlier attempt died; what it was stopped for, if it was, is still so.
            ended = self.said_at_its_end()
            why = self.reason_to_stop(self.running_s, limit_s, 0, reader)
            if why is not None and (ended is None or ended.status is not TaskStatus.COMPLETED):
                return why.with_summary_of(ended)
            return ended or Ending.failed(
                "interrupted", "The agent's result is missing.", "Look at the end of the log."
            )
        talk = Talk(self, reader)
        now = time.monotonic()
        started = now - self.running_s
        """When it would have been, had the agent never waited for its user."""
        last_event = checkpoint_at = result_at = now
        """The time of the last checkpoint, or since when there was nothing to keep."""
        asked_to_stop: tuple[float, Ending | None] | None = None
        died_at: float | None = None
        while True:
            self.lease.check()
            if self.worker.stopping.is_set():
                raise Draining
            chunk, alive = self.box.watch(EVENTS, offset=reader.offset, max_bytes=CHUNK, wait_s=self.timers.watch_s)
            before, now = now, time.monotonic()
            if waits := talk.waits:
                started, last_event = started + now - before, now
            ended = None
            if not alive or now - result_at > self.timers.signals_s:  # a runner may hang when it has ended
                ended, result_at = self.said_at_its_end(), now
            if events := reader.take(chunk):
                last_event = now
            said = any(event.kind in ("question", "answer") for event in events)
            self.running_s = now - started
            if more := bool(events) or reader.moved:
                self.usage = self.whole_usage(reader.usage(self.usage))
                signals = self.tasks.follow(
                    self.task_id,
                    self.claim.attempt,
                    events,
                    log_offset=reader.offset,
                    lease_s=self.timers.lease_s,
                    usage=self.usage,
                    running_seconds=self.running_s,
                    question=reader.question if said else ...,
                    touches=self.touches.news(),
                )
                self.lease.renewed(signals)
                self.log_offset, self.question = reader.offset, reader.question
                # What it said to its end is read, unless something that it left behind talks on and on.
                over = ended is not None or not alive
                died_at = now if died_at is None and over else died_at
                why = self.reason_to_stop(self.running_s, limit_s, 0, reader)
                if over and (why is None or now - (died_at or now) < self.timers.stop_grace_s):
                    continue
            # Also while there is more to read: an agent that talks faster than it is read is to be stopped, too.
            if waits:
                checkpoint_at = -math.inf if talk.is_new() else now  # one for as long as it may take
            elif not reader.tool_running and last_event < checkpoint_at:
                checkpoint_at = now  # it does nothing
            if alive and asked_to_stop is None and now - checkpoint_at > self.timers.checkpoint_s:
                checkpoint_at = now
                with self.not_now():
                    self.keep_checkpoint()
                    self.touch_changed_files()
            if alive and ended is None and asked_to_stop is None:
                talk.hand_on()
            if asked_to_stop is not None:
                since, ending = asked_to_stop
                if ended is not None or not alive or now - since > self.timers.stop_grace_s:
                    if ending is not None:
                        return ending.with_summary_of(ended)
                    if ended is None or ended.stopped:
                        raise _SessionEnds
                    return ended
            elif ended is not None:
                if ended.status is TaskStatus.COMPLETED:
                    return ended
                # It may be that an earlier attempt asked it to stop, and died.
                if (why := self.reason_to_stop(self.running_s, limit_s, 0, reader)) is not None:
                    return why.with_summary_of(ended)
                if ended.stopped and self.session_ends():
                    raise _SessionEnds
                return ended
            elif not alive:
                # Where somebody ends the whole sandbox, the agent goes first.
                self.worker.stopping.wait(self.timers.signals_s)
                self.box.alive()
                if said := self.box.output(max_bytes=2000).decode("utf-8", "replace").strip():
                    self.note(self.redactor.text(said), level=Level.WARNING, kind="stderr")
                return Ending.failed(
                    "interrupted",
                    "The agent's process died.",
                    "What it had done is saved; submit the task again to go on.",
                )
            elif (ending := self.reason_to_stop(self.running_s, limit_s, now - last_event, reader)) is not None:
                asked_to_stop = (now, ending)
                self.note(ending.why, level=Level.WARNING)
                self.tell_to_stop(ending.why)
            elif self.session_ends():
                asked_to_stop = (now, None)
                self.tell_to_stop("The sandbox's time is nearly up.")
            if more:
                self.worker.stopping.wait(self.timers.poll_s)  # what an agent says at once is taken at once

    def tell_to_stop(self, why: str) -> None:
        self.agent.tell(self.box, "stop", {"kind": "stop", "reason": why, "number": self.number})

    def touch_changed_files(self) -> None:
        """After a checkpoint: what its agent has changed by other means than tool calls that say so."""
        for path in repository.changed_files(self.box):
            self.touches.add(path)
        if (found := self.touches.news()) is not None:
            self.tasks.update(self.task_id, self.claim.attempt, touches=found)

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
        """Bring out and keep what the agent did, however it ended. True when there is something to verify.

        Of a sandbox that is gone the last checkpoint is left.
        """
        if not self.agent_has_run or self.base_sha is None:
            return False
        self.enter(Phase.SAVE)
        branch = self.claim.task.branch
        self.result, self.verdict = Result(artifacts=Artifacts(branch=branch)), Verdict.UNVERIFIED
        try:
            bundle = self.collect() if self.agent_is_here else self.kept(self.left) or self.start_bundle()
            changes = None if bundle is None else self.inspected(bundle)
        except (LeaseLost, SandboxGone, SandboxUnreachable, DatabaseUnavailable):
            raise
        except Exception as error:
            self.full_disk(error)
            if not isinstance(error, CloudAgentError):
                raise
            if self.agent_is_here:
                self.box.alive()  # raises SandboxGone where that is why; another attempt goes on from the checkpoint
            self.note(f"The agent's work could not be brought out: {error.message}", level=Level.ERROR, kind="error")
            if not self.retries_used or (bundle := self.kept("result")) is None:
                return False
            self.note("What was saved before its last retry stays.", level=Level.WARNING)
            changes = self.inspected(bundle)
        if self.failed is not None and self.failed.commit == (self.base_sha if changes is None else changes.head):
            self.verdict = Verdict.FAILED  # it is what was checked before the last retry
        if bundle is None or changes is None:
            self.blobs.drop(self.task_id, ["result", "diff"], attempt=self.claim.attempt)  # of before a retry
            self.note("The agent changed no file.")
            self.tasks.update(self.task_id, self.claim.attempt, touches=())
            return True
        self.keep({"result": bundle, "diff": self.redactor.data(changes.diff)})
        touched = Touches(path for file in changes.files for path in (file.path, file.old_path) if path is not None)
        self.tasks.update(self.task_id, self.claim.attempt, touches=touched.paths)
        self.result = Result(
            verify=self.failed if self.verdict is Verdict.FAILED else None,
            artifacts=Artifacts(
                branch=branch,
                commits=changes.commits,
                files_changed=len(changes.files),
                insertions=changes.insertions,
                deletions=changes.deletions,
            ),
        )
        self.note(f"Saved: {_files(len(changes.files))} changed, +{changes.insertions} -{changes.deletions} lines.")
        return True

    def inspected(self, bundle: bytes) -> repository.Changes:
        assert self.base_sha is not None
        return repository.inspect(self.input_bundle(), self.base_sha, bundle, self.claim.task.branch)

    def collect(self) -> bytes | None:
        """End all processes and bring out what the agent did and said; None when it changed nothing."""
        assert self.base_sha is not None
        self.box.end_processes()
        if (session := self.agent.session(self.box, self.number)) is not None:
            self.keep({"session": self.sealed(session)})
        message = f"{self.spec.title}\n\nTask {self.task_id}"
        return repository.collect(self.box, base_sha=self.base_sha, branch=self.claim.task.branch, message=message)

    def verify(self, ending: Ending) -> Ending:
        """Run the `verify` command in a clean checkout of what was saved; no process of the agent's is left by now."""
        if self.spec.verify is None:
            return ending
        if self.sandbox is None:
            if self.verdict is Verdict.UNVERIFIED:
                self.note("The sandbox died before the result could be verified.", level=Level.WARNING)
            return ending
        try:
            self.enter(Phase.VERIFY)
            with self.lease.interruptible(self.box.end_processes):
                done = repository.verify(
                    self.box,
                    input_bundle=self.input_bundle(),
                    result_bundle=self.kept("result"),
                    base_sha=self.base_sha,
                    branch=self.claim.task.branch,
                    command=self.spec.verify,
                    timeout_s=self.timers.verify_s,
                    env=self.config.environment,
                )
            self.stop_if_cancelled()
        except Ended as ended:
            return ended.ending
        except (LeaseLost, SandboxUnreachable, DatabaseUnavailable):
            raise
        except CloudAgentError as error:
            if self.lease.signals.cancel_requested:
                return Ending.cancelled()  # that is why
            self.note(f"The verify command could not be run: {error.message}", level=Level.ERROR, kind="error")
            return ending
        self.verdict = Verdict.PASSED if done.exit_code == 0 else Verdict.FAILED
        output = self.redactor.text(done.output)[-repository.OUTPUT_LIMIT :]  # cut last: no half of a secret is left
        done = done.model_copy(update={"output": output, "tries": self.number})
        self.result = self.result.model_copy(update={"verify": done})
        level = Level.INFO if self.verdict is Verdict.PASSED else Level.WARNING
        self.note(f"Verdict: {self.verdict}.", level=level)
        return ending

    def finish(self, ending: Ending) -> None:
        summary = None if ending.summary is None else self.redactor.text(ending.summary)
        error, retry_error = self.told(ending.error), self.told(ending.retry_error)
        well = ending.status is TaskStatus.COMPLETED and retry_error is None
        level = Level.INFO if well else Level.WARNING
        self.lease.check()
        self.blobs.drop(self.task_id, ["checkpoint"], attempt=self.claim.attempt)
        if ending.model is not None and self.spec.model is None:
            self.tasks.update(self.task_id, self.claim.attempt, model=ending.model)
        self.tasks.finish(
            self.task_id,
            self.claim.attempt,
            status=ending.status,
            verdict=self.verdict if ending.status is TaskStatus.COMPLETED else None,
            result=self.result.model_copy(
                update={"summary": summary, "retry_error": retry_error, "blocked_hosts": self.blocked_hosts()}
            )
            if self.agent_has_run
            else None,
            error=error,
            usage=self.whole_usage(ending.usage or self.usage),
            events=[
                EventDraft(
                    kind="status", message=f"{ending.status.value.capitalize()}. {ending.why}".strip(), level=level
                )
            ],
        )

    def told(self, error: TaskError | None) -> TaskError | None:
        return None if error is None else error.model_copy(update={"message": self.redactor.text(error.message)})

    def blocked_hosts(self) -> tuple[str, ...]:
        """What the sandbox's processes wanted to reach and may not."""
        if self.sandbox is None:
            return ()
        try:
            hosts = tuple(self.redactor.text(host) for host in self.sandbox.blocked())
        except SandboxError:
            return ()  # it has ended by now
        if hosts:
            self.note(f"Hosts that it may not reach: {', '.join(hosts)}.", level=Level.WARNING)
        return hosts

    def discard_sandbox(self) -> None:
        """After the finish: a worker that dies here leaves an orphan, which the sweeper finds."""
        if self.sandbox is None:
            return
        try:
            self.sandbox.kill()
        except CloudAgentError as error:
            log.warning("could not delete the sandbox of %s, the sweeper will: %s", self.task_id, error)

    def full_disk(self, error: Exception) -> Ending | None:
        """How the attempt ends where a full disk of this worker's is behind its failure; None where none is.

        Raises `StorageFull` once an agent has run: its work is safe in the sandbox, and another attempt goes on when
        there is space.
        """
        if not self.worker.disk_is_full(error):
            return None
        if self.agent_is_here:
            raise StorageFull() from error
        return Ending.failed("storage_full", "The worker's disk is full.", "Free space there; then submit it again.")


class _SessionEnds(Exception):
    """The provider ends the sandbox soon; the agent has come to rest in it."""


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"
