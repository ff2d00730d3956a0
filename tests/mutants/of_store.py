"""Mutants of the store: what it promises to workers and users."""

from __future__ import annotations

from tests.mutants.mutant import BACKLOG, LOG, PROCESSES, QUEUE, STORE, TASKS, WORKERS, Mutant

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
)
