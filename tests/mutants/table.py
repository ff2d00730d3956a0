"""The mutants: one promise broken at a time, each with the tests that must see it.

The texts are exact; where the product's code moves on, its mutants have to follow, and `run.py` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

STORE = "storage/cloudagent_storage/store"
QUEUE = "queue/cloudagent_queue"
WORKERS = "tests/contracts/test_store_workers.py"
TASKS = "tests/contracts/test_store_tasks.py"
LOG = "tests/contracts/test_store_log.py"
LEASES = "tests/faults/test_leases.py"
SWEEP = "tests/integration/test_worker.py"
BACKLOG = "tests/contracts/test_store_backlog.py"
PROCESSES = "tests/faults/test_workers.py"
QUESTIONS = "tests/contracts/test_store_questions.py"
WAITING = "tests/faults/test_questions.py"
SANDBOXES = "tests/faults/test_sandboxes.py"
CLOUD = "tests/cloud"
CLOUD_TASKS = "tests/faults/test_cloud.py"


@dataclass(frozen=True)
class Mutant:
    """One change to the product, and the fastest tests that fail of it."""

    name: str
    file: str
    old: str
    """Stands in the file exactly once."""
    new: str
    tests: tuple[str, ...]
    """Node ids for pytest."""
    fast: bool = True
    """Is it tried with every commit, and not only in a full run?"""
    seen_by_model: bool = False
    """Does the state machine, which calls the store from one thread at a time, see it too?"""


MUTANTS = (
    # -- the fence -------------------------------------------------------------------------------------------------
    Mutant(
        "no_fence",
        f"{STORE}/row.py",
        "return (rows.attempt == attempt) & rows.status.in_(ACTIVE)",
        "return rows.status.in_(ACTIVE)",
        (f"{WORKERS}::test_a_worker_that_lost_its_lease_changes_nothing[sqlite-<lambda>0]",),
        seen_by_model=True,
    ),
    Mutant(
        "writes_after_a_release",
        f"{STORE}/row.py",
        "rows.status.in_(ACTIVE) & rows.lease_until.is_null(False)",
        "rows.status.in_(ACTIVE)",
        (f"{WORKERS}::test_a_worker_changes_nothing_after_it_gave_the_task_back[sqlite-<lambda>4]",),
        seen_by_model=True,
    ),
    Mutant(
        "finish_is_not_fenced",
        f"{STORE}/tasks.py",
        "return task_of(change_held(self._db, task_id, attempt, lines=events, whole=True, **columns))",
        "return task_of(change(self._db, task_id, self._rows.task_id == task_id, lines=events, whole=True, **columns))",
        (f"{WORKERS}::test_a_worker_that_lost_its_lease_changes_nothing[sqlite-<lambda>6]",),
        seen_by_model=True,
    ),
    Mutant(
        "a_delivery_is_not_fenced",
        f"{STORE}/messages.py",
        "            change_held(self._db, task_id, attempt)\n            mine",
        "            mine",
        (f"{WORKERS}::test_a_worker_that_lost_its_lease_changes_nothing[sqlite-<lambda>9]",),
        fast=False,
        seen_by_model=True,
    ),
    # -- the claim -------------------------------------------------------------------------------------------------
    Mutant(
        "a_held_task_is_claimed",
        f"{STORE}/backlog.py",
        "expired = active & rows.lease_until.is_null(False) & (rows.lease_until < db.now)",
        "expired = active & rows.lease_until.is_null(False)",
        (f"{WORKERS}::test_a_task_that_a_worker_has_is_not_to_be_had[sqlite]",),
        seen_by_model=True,
    ),
    Mutant(
        "a_dead_workers_task_is_never_claimed",
        f"{STORE}/backlog.py",
        "expired = active & rows.lease_until.is_null(False) & (rows.lease_until < db.now)",
        "expired = active & rows.task_id.is_null()",
        (f"{WORKERS}::test_the_next_attempt_goes_on_where_the_last_one_stopped[sqlite]",),
        seen_by_model=True,
    ),
    Mutant(
        "an_ended_task_is_claimed",
        f"{STORE}/backlog.py",
        "released = active & rows.lease_until.is_null()",
        "released = rows.lease_until.is_null()",
        (f"{WORKERS}::test_the_end_of_a_task_is_one_step[sqlite]",),
        seen_by_model=True,
    ),
    Mutant(
        "a_claim_in_two_steps",
        f"{STORE}/backlog.py",
        """    row = change(
        db,
        task_id,
        queued | released | expired,
""",
        """    if not rows.select().where(rows.task_id == task_id, queued | released | expired).exists():
        return None
    row = change(
        db,
        task_id,
        rows.task_id == task_id,
""",
        (f"{WORKERS}::test_of_several_workers_on_several_stores_one_gets_the_task[postgres]",),
    ),
    Mutant(
        "an_account_takes_more_than_it_may",
        f"{STORE}/backlog.py",
        "if running_max is not None and not self._has_room(account_id, running_max):",
        "if False:",
        (f"{BACKLOG}::test_an_account_never_has_more_tasks_running_than_it_may_however_many_claim_at_once[postgres]",),
    ),
    Mutant(
        "the_first_account_takes_all",
        f"{STORE}/backlog.py",
        "waiting.sort(key=lambda found: (found.running, found.oldest_at))",
        "waiting.sort(key=lambda found: found.oldest_at)",
        (f"{BACKLOG}::test_an_account_with_a_thousand_waiting_does_not_keep_another_from_its_first[sqlite]",),
    ),
    Mutant(
        "a_sandbox_of_another_machine_is_taken",
        f"{STORE}/backlog.py",
        "unheld, ours, self._ready()",
        "unheld, self._ready()",
        (f"{BACKLOG}::test_a_task_whose_sandbox_is_elsewhere_is_left_to_the_workers_there[sqlite]",),
    ),
    Mutant(
        "nobody_is_told_of_a_change",
        f"{STORE}/row.py",
        "        db.announce(task_id)\n",
        "        pass\n",
        ("tests/contracts/test_store_changes.py::test_a_change_of_this_very_process_is_told_as_well[postgres]",),
    ),
    # -- lost leases -----------------------------------------------------------------------------------------------
    Mutant(
        "no_task_is_poisoned",
        f"{STORE}/backlog.py",
        "expired & (rows.lost_leases >= LOST_LEASES - 1)",
        "expired & (rows.lost_leases >= 1000)",
        (f"{WORKERS}::test_a_task_whose_third_lease_is_lost_without_progress_is_poisoned[sqlite]",),
        seen_by_model=True,
    ),
    Mutant(
        "poisoned_one_lease_early",
        f"{STORE}/backlog.py",
        "expired & (rows.lost_leases >= LOST_LEASES - 1)",
        "expired & (rows.lost_leases >= LOST_LEASES - 2)",
        (f"{WORKERS}::test_a_task_whose_third_lease_is_lost_without_progress_is_poisoned[sqlite]",),
        fast=False,
        seen_by_model=True,
    ),
    Mutant(
        "lost_leases_are_not_counted",
        f"{STORE}/backlog.py",
        "lost_leases=Case(None, [(expired, rows.lost_leases + 1)], rows.lost_leases),",
        "lost_leases=rows.lost_leases,",
        (f"{WORKERS}::test_a_task_whose_third_lease_is_lost_without_progress_is_poisoned[sqlite]",),
        fast=False,
        seen_by_model=True,
    ),
    Mutant(
        "progress_does_not_count",
        f"{STORE}/tasks.py",
        '            columns["lost_leases"] = 0\n',
        "            pass\n",
        (f"{WORKERS}::test_progress_makes_up_for_lost_leases[sqlite]",),
        seen_by_model=True,
    ),
    Mutant(
        "a_release_counts_as_a_loss",
        f"{STORE}/tasks.py",
        '{"owner": None, "lease_until": None, "rung_at": None}',
        '{"owner": None, "lease_until": self._db.now, "rung_at": None}',
        (f"{WORKERS}::test_a_task_that_is_given_back_can_be_had_at_once_and_loses_no_lease[sqlite]",),
        fast=False,
        seen_by_model=True,
    ),
    # -- the log ---------------------------------------------------------------------------------------------------
    Mutant(
        "lines_without_their_offset",
        f"{STORE}/tasks.py",
        '{"log_offset": log_offset, "lease_until": self._db.later(lease_s)}',
        '{"lease_until": self._db.later(lease_s)}',
        (f"{WORKERS}::test_the_next_attempt_goes_on_where_the_last_one_stopped[sqlite]",),
        seen_by_model=True,
    ),
    Mutant(
        "a_lines_number_is_read_before_it_is_taken",
        f"{STORE}/row.py",
        "    query = rows.update(last_seq=rows.last_seq + len(lines)",
        "    last = rows.select(rows.last_seq).where(rows.task_id == task_id).scalar() or 0\n"
        "    query = rows.update(last_seq=last + len(lines)",
        (f"{LOG}::test_a_cancel_while_lines_are_added_leaves_no_gap_and_no_duplicate[postgres]",),
    ),
    Mutant(
        "the_next_attempt_reads_the_log_from_its_start",
        f"{QUEUE}/attempt.py",
        "LogReader(self.log_offset, ",
        "LogReader(0, ",
        (f"{PROCESSES}::test_the_agents_of_a_killed_worker_go_on_and_the_next_worker_adopts_them[sqlite]",),
        fast=False,
    ),
    # -- submit, cancel, end -----------------------------------------------------------------------------------------
    Mutant(
        "idempotency_keys_are_not_unique",
        "storage/cloudagent_storage/migrations/0002_idempotency.py",
        '("account_id", "idempotency_key"), unique=True)',
        '("account_id", "idempotency_key"), unique=False)',
        (
            "tests/contracts/test_store_idempotency.py"
            "::test_the_same_key_and_arguments_are_the_same_task_kept_once[sqlite]",
        ),
        seen_by_model=True,
    ),
    Mutant(
        "a_cancel_is_ignored_while_queued",
        f"{STORE}/tasks.py",
        "            if row.status == TaskStatus.QUEUED:\n",
        "            if False:\n",
        (f"{TASKS}::test_a_queued_task_is_cancelled_at_once[sqlite]",),
        seen_by_model=True,
    ),
    Mutant(
        "a_cancel_is_ignored_while_running",
        f"{STORE}/tasks.py",
        "elif row.status in ACTIVE and row.cancel_requested_at is None:",
        "elif False:",
        (f"{TASKS}::test_the_worker_of_a_running_task_is_told_of_a_cancel_once[sqlite]",),
        seen_by_model=True,
    ),
    Mutant(
        "no_worker_is_told_of_a_cancel",
        f"{STORE}/row.py",
        "        cancel_requested=row.cancel_requested_at is not None,\n        messages",
        "        cancel_requested=False,\n        messages",
        (f"{TASKS}::test_the_worker_of_a_running_task_is_told_of_a_cancel_once[sqlite]",),
        fast=False,
        seen_by_model=True,
    ),
    Mutant(
        "a_cancel_looks_before_it_locks",
        f"{STORE}/tasks.py",
        "row = find(self._db, account_id, task_id, lock=True)",
        "row = find(self._db, account_id, task_id)",
        (
            f"{TASKS}::test_of_many_cancels_at_once_one_changes_something[postgres]",
            f"{WORKERS}::test_a_claim_and_a_cancel_at_once_leave_one_of_two_states[postgres]",
        ),
        fast=False,
    ),
    Mutant(
        "credentials_outlive_their_task",
        f"{STORE}/row.py",
        '        "credentials": None,\n',
        "",
        (f"{WORKERS}::test_a_task_that_has_ended_keeps_no_credentials[sqlite]",),
        seen_by_model=True,
    ),
    Mutant(
        "a_task_is_found_for_every_account",
        f"{STORE}/row.py",
        "where(rows.task_id == task_id, rows.account_id == account_id)",
        "where(rows.task_id == task_id)",
        (f"{TASKS}::test_an_id_of_another_account_looks_like_an_unknown_one",),
    ),
    # -- the sweeper -------------------------------------------------------------------------------------------------
    Mutant(
        "nobody_rings_again",
        f"{QUEUE}/sweep.py",
        "        queue.put(task_id)\n",
        "        pass\n",
        (f"{LEASES}::test_what_nobody_has_rung_for_is_put_into_the_queue",),
    ),
    Mutant(
        "a_lease_that_ran_out_is_not_due",
        f"{STORE}/tasks.py",
        "rows.lease_until.is_null() | (rows.lease_until < self._db.now))",
        "rows.lease_until.is_null())",
        (f"{WORKERS}::test_tasks_that_wait_for_a_worker_are_due_once_in_a_while[sqlite]",),
        seen_by_model=True,
    ),
    Mutant(
        "every_sandbox_is_an_orphan",
        f"{QUEUE}/sweep.py",
        "            continue\n        log.info",
        "            pass\n        log.info",
        (f"{SWEEP}::test_only_sandboxes_that_no_living_task_owns_are_killed",),
    ),
    Mutant(
        "no_sandbox_is_an_orphan",
        f"{QUEUE}/sweep.py",
        "            provider.connect(info.id).kill()\n        except SandboxGone:",
        "            pass\n        except SandboxGone:",
        (f"{SWEEP}::test_only_sandboxes_that_no_living_task_owns_are_killed",),
    ),
    Mutant(
        "a_nonce_owns_nothing",
        f"{STORE}/tasks.py",
        "(rows.sandbox_id == storable(sandbox_id)) | (rows.sandbox_nonce == storable(nonce))",
        "rows.sandbox_id == storable(sandbox_id)",
        (f"{WORKERS}::test_a_sandbox_belongs_to_a_task_by_its_id_or_by_the_nonce[sqlite]",),
        seen_by_model=True,
    ),
    Mutant(
        "an_ended_task_owns_its_sandbox",
        f"{STORE}/tasks.py",
        "where(rows.task_id == task_id, self._unfinished(), owned).exists()",
        "where(rows.task_id == task_id, owned).exists()",
        (f"{WORKERS}::test_a_sandbox_belongs_to_a_task_by_its_id_or_by_the_nonce[sqlite]",),
        fast=False,
        seen_by_model=True,
    ),
    # -- the worker --------------------------------------------------------------------------------------------------
    Mutant(
        "never_adopt",
        f"{QUEUE}/placement.py",
        "            if agent_was_started:\n                self.sandbox, ",
        "            if ():\n                self.sandbox, ",
        (f"{PROCESSES}::test_the_agents_of_a_killed_worker_go_on_and_the_next_worker_adopts_them[sqlite]",),
        fast=False,
    ),
    Mutant(
        "a_new_sandbox_starts_from_nothing",
        f"{QUEUE}/attempt.py",
        'if (checkpoint := self.kept("checkpoint") or',
        'if (checkpoint := None and self.kept("checkpoint") or',
        (f"{SANDBOXES}::test_a_task_whose_sandbox_dies_goes_on_in_another_from_its_last_checkpoint[sqlite]",),
    ),
    Mutant(
        "the_age_of_a_sandbox_is_forgotten",
        f"{QUEUE}/placement.py",
        "self.sandbox_age_s = claim.sandbox_age_s",
        "self.sandbox_age_s = 0.0",
        (f"{SANDBOXES}::test_a_task_moves_in_time_however_often_its_worker_changes[sqlite]",),
        fast=False,
    ),
    Mutant(
        "the_log_of_the_old_sandbox_is_gone_on_with",
        f"{STORE}/tasks.py",
        "                log_offset=0,\n                **asking",
        "                **asking",
        (f"{WORKERS}::test_of_an_earlier_sandbox_nothing_is_left_when_a_new_one_is_begun[sqlite]",),
    ),
    Mutant(
        "sandboxes_may_be_lost_for_ever",
        f"{QUEUE}/placement.py",
        "or self.losses > LOSSES_MAX:",
        "or False:",
        (f"{SANDBOXES}::test_a_task_that_kills_every_sandbox_ends[sqlite]",),
        fast=False,
    ),
    Mutant(
        "what_a_lost_sandbox_left_is_forgotten",
        f"{QUEUE}/attempt.py",
        "self.collect() if self.agent_is_here else self.kept(self.left)",
        "self.collect() if self.agent_is_here else None",
        (f"{SANDBOXES}::test_a_task_that_wants_to_fail_keeps_its_last_checkpoint[sqlite]",),
    ),
    Mutant(
        "the_old_sandbox_lives_on",
        f"{QUEUE}/placement.py",
        "                return True\n            sandbox.kill()\n",
        "                return True\n",
        (f"{LEASES}::test_a_sandbox_without_an_agent_is_gone_before_another_is_made[left_by_id]",),
    ),
    Mutant(
        "what_carries_the_nonce_lives_on",
        f"{QUEUE}/placement.py",
        "                provider.connect(info.id).kill()\n        return False",
        "                provider.connect(info.id)\n        return False",
        (f"{LEASES}::test_a_sandbox_without_an_agent_is_gone_before_another_is_made[left_by_nonce]",),
    ),
    Mutant(
        "a_worker_that_cannot_renew_goes_on",
        f"{QUEUE}/lease.py",
        "if self._lost or time.monotonic() - self._renewed > self._timers.let_go_s:",
        "if self._lost:",
        (f"{LEASES}::test_a_lease_that_cannot_be_renewed_is_let_go_of_before_it_ends",),
    ),
    Mutant(
        "no_heartbeat",
        f"{QUEUE}/lease.py",
        "if time.monotonic() - self._renewed >= self._timers.heartbeat_s:",
        "if False:",
        (f"{LEASES}::test_a_heartbeat_keeps_a_lease_for_as_long_as_it_is_wanted",),
    ),
    Mutant(
        "a_stop_ends_the_task",
        f"{QUEUE}/run.py",
        "    except Draining:\n        give_back(worker, claim)\n",
        "    except Draining:\n        give_up(worker, claim)\n",
        (f"{PROCESSES}::test_a_stop_gives_running_tasks_back_at_once_and_their_agents_go_on[sqlite-SIGTERM]",),
        fast=False,
    ),
    Mutant(
        "a_stop_keeps_the_lease",
        f"{QUEUE}/run.py",
        "    except Draining:\n        give_back(worker, claim)\n",
        "    except Draining:\n",
        (f"{PROCESSES}::test_a_stop_gives_running_tasks_back_at_once_and_their_agents_go_on[sqlite-SIGTERM]",),
        fast=False,
    ),
    # -- the cloud ---------------------------------------------------------------------------------------------------
    Mutant(
        "what_does_not_answer_is_gone",
        f"{QUEUE}/sandboxes/e2b_api.py",
        "            raise self._out_of_reach(error) from error\n\n    def confirm",
        "            raise SandboxGone from error\n\n    def confirm",
        (f"{CLOUD}/test_reach.py::test_only_a_clear_answer_of_the_control_plane_makes_a_sandbox_gone[500]",),
    ),
    Mutant(
        "what_is_gone_does_not_answer",
        f"{QUEUE}/sandboxes/e2b_api.py",
        "            raise SandboxGone from error\n        except Exception",
        "            raise SandboxUnreachable from error\n        except Exception",
        (f"{CLOUD}/test_reach.py::test_a_sandbox_that_vanished_is_gone_in_every_use",),
        fast=False,
    ),
    Mutant(
        "what_a_failed_create_made_is_left",
        f"{QUEUE}/sandboxes/e2b_api.py",
        "and (found := self._made_nevertheless(mark, response)) is not None:",
        "and (found := None) is not None:",
        (
            f"{CLOUD}/test_create.py"
            "::test_what_a_create_made_that_failed_is_adopted_and_never_made_twice[answer_after-500]",
        ),
        fast=False,
    ),
    Mutant(
        "a_failed_create_adopts_anybodys",
        f"{QUEUE}/sandboxes/e2b_api.py",
        "for info in self.find({_MARK: mark}):",
        "for info in self.find({}):",
        (f"{CLOUD}/test_create.py::test_a_failed_create_adopts_nobody_elses_sandbox",),
        fast=False,
    ),
    Mutant(
        "two_may_start_at_once",
        f"{QUEUE}/sandboxes/inside.py",
        '    fcntl.flock(lock, fcntl.LOCK_EX)\n    if record := _load("started.json"):',
        '    if record := _load("started.json"):',
        (f"{CLOUD}/test_once.py::test_whoever_starts_waits_for_another_one_that_is_starting",),
        fast=False,
    ),
    Mutant(
        "whoever_starts_second_has_started",
        f"{QUEUE}/sandboxes/inside.py",
        'return {"started": record["token"] == token}',
        'return {"started": True}',
        (f"{CLOUD}/test_once.py::test_two_processes_that_start_at_once_start_one_agent",),
        fast=False,
    ),
    Mutant(
        "a_repeated_start_is_taken_for_a_second_one",
        f"{QUEUE}/sandboxes/inside.py",
        'return {"started": record["token"] == token}',
        'return {"started": False}',
        (f"{CLOUD}/test_once.py::test_a_start_whose_answer_is_lost_starts_once[cut-0]",),
        fast=False,
    ),
    Mutant(
        "the_log_is_read_from_its_start",
        f"{QUEUE}/sandboxes/e2b.py",
        '(path), "offset": offset, "max_bytes": max_bytes}',
        '(path), "offset": 0, "max_bytes": max_bytes}',
        (f"{PROCESSES}::test_the_agents_of_a_killed_worker_go_on_and_the_next_worker_adopts_them[e2b]",),
        fast=False,
    ),
    Mutant(
        "no_session_ends",
        f"{QUEUE}/placement.py",
        "return cap_s is not None and self.age_s() > cap_s",
        "return cap_s is not None and self.age_s() > 100 * cap_s",
        (f"{SANDBOXES}::test_before_the_providers_time_is_up_a_task_moves_to_a_new_sandbox[e2b]",),
        fast=False,
    ),
    Mutant(
        "making_a_sandbox_takes_no_time",
        f"{QUEUE}/placement.py",
        "self.sandbox_since = began\n",
        "self.sandbox_since = time.monotonic()\n",
        (f"{SANDBOXES}::test_the_time_in_which_a_sandbox_was_made_ready_counts",),
        fast=False,
    ),
    Mutant(
        "a_sick_provider_is_asked_by_everyone",
        f"{QUEUE}/sandboxes/circuit.py",
        "            if left > 0:\n",
        "            if False:\n",
        ("tests/unit/test_circuit.py::test_one_that_refuses_is_left_alone_for_longer_and_longer",),
    ),
    Mutant(
        "a_provider_never_recovers",
        f"{QUEUE}/sandboxes/circuit.py",
        "            self._states.pop(provider, None)\n",
        "            pass\n",
        ("tests/unit/test_circuit.py::test_after_a_pause_one_task_alone_tries_it",),
    ),
    Mutant(
        "nobody_looks_at_the_circuit",
        f"{QUEUE}/placement.py",
        "if (wait_s := circuit.wait_s(name)) > 0:",
        "if (wait_s := 0.0) > 0:",
        (f"{CLOUD_TASKS}::test_twenty_tasks_do_not_hammer_a_provider_that_is_sick",),
        fast=False,
    ),
    Mutant(
        "the_second_provider_is_not_tried",
        f"{QUEUE}/placement.py",
        'self.note_once(f"No sandbox from {name}: {error.message}")\n                continue',
        'self.note_once(f"No sandbox from {name}: {error.message}")\n                break',
        (f"{CLOUD_TASKS}::test_where_the_first_provider_gives_no_sandbox_the_second_does_and_the_log_says_why[quota]",),
        fast=False,
    ),
    Mutant(
        "who_talks_is_not_stopped",
        f"{QUEUE}/attempt.py",
        "if over and (why is None or ",
        "if True or (why is None or ",
        (
            "tests/faults/test_endings.py"
            "::test_an_agent_that_talks_without_a_pause_is_cancelled_whether_it_obeys_or_not[e2b-ignores]",
        ),
        fast=False,
    ),
    Mutant(
        "a_cancel_interrupts_once",
        f"{QUEUE}/lease.py",
        "                    self._interrupt()\n",
        "                    self._interrupt()\n                    self._interrupt = None\n",
        ("tests/integration/test_worker.py::test_a_cancel_interrupts_a_long_call_from_the_leases_own_thread[sqlite]",),
        fast=False,
    ),
    # -- questions -------------------------------------------------------------------------------------------------
    Mutant(
        "an_answer_leaves_the_question_open",
        f"{STORE}/messages.py",
        "closed = {} if answers is None else asking(self._db, None)",
        "closed = {}",
        (f"{QUESTIONS}::test_the_first_answer_closes_the_question_and_the_task_runs[sqlite]",),
        seen_by_model=True,
    ),
    Mutant(
        "an_answer_goes_to_the_next_question",
        f"{STORE}/messages.py",
        "                raise QuestionClosed()",
        "                pass",
        (f"{QUESTIONS}::test_an_answer_to_a_named_question_is_never_that_to_the_next[sqlite]",),
    ),
    Mutant(
        "a_claim_forgets_the_question",
        f"{STORE}/backlog.py",
        "Case(None, [(rows.question.is_null(False), TaskStatus.WAITING)], TaskStatus.RUNNING)",
        "TaskStatus.RUNNING",
        (f"{QUESTIONS}::test_a_question_and_its_answer_outlive_the_worker[sqlite]",),
        fast=False,
        seen_by_model=True,
    ),
    Mutant(
        "an_answer_is_handed_on_again",
        f"{QUEUE}/talk.py",
        "        if fresh:\n",
        "        if not at:\n",
        (f"{WAITING}::test_the_question_of_a_sandbox_that_dies_is_void_and_the_next_agent_asks_anew[sqlite]",),
        fast=False,
    ),
    Mutant(
        "waiting_counts",
        f"{QUEUE}/attempt.py",
        "started, last_event = started + now - before, now",
        "last_event = now",
        (f"{WAITING}::test_waiting_counts_toward_no_limit",),
        fast=False,
    ),
    Mutant(
        "a_declined_form_is_consent",
        "cloudagent_mcp/elicitation.py",
        'if result is None or result.action != "accept" or ',
        "if result is None or ",
        (
            "tests/integration/test_elicitation.py"
            "::test_without_the_persons_consent_nothing_is_written_whatever_the_model_names[asyncio-declined-unnamed-auto]",
        ),
    ),
)
