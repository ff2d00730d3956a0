"""Mutants of the cloud sandboxes."""

from __future__ import annotations

from tests.mutants.mutant import CLOUD, CLOUD_TASKS, CONTRACT, PROCESSES, QUEUE, SANDBOXES, Mutant

MUTANTS = (
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
        "two_commands_run_at_once_in_the_cloud",
        f"{QUEUE}/sandboxes/inside.py",
        'if record.get("number", 1) >= number or _started() is not None:',
        'if record.get("number", 1) >= number:',
        (f"{CONTRACT}[e2b-a_later_command_starts_once_too_when_the_one_before_has_ended]",),
        fast=False,
    ),
    Mutant(
        "whoever_starts_second_has_started",
        f"{QUEUE}/sandboxes/inside.py",
        'return {"started": False}',
        'return {"started": True}',
        (f"{CLOUD}/test_once.py::test_two_processes_that_start_at_once_start_one_agent",),
        fast=False,
    ),
    Mutant(
        "a_repeated_start_is_taken_for_a_second_one",
        f"{QUEUE}/sandboxes/inside.py",
        'record["token"] == token:\n            return {"started": True}',
        'record["token"] == token:\n            return {"started": False}',
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
)
