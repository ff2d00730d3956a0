"""A mutant: one promise of the product broken, with the tests that must see it."""

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
CANDIDATES = "tests/contracts/test_store_candidates.py"
PROCESSES = "tests/faults/test_workers.py"
QUESTIONS = "tests/contracts/test_store_questions.py"
WAITING = "tests/faults/test_questions.py"
SANDBOXES = "tests/faults/test_sandboxes.py"
CONTRACT = "tests/contracts/test_sandbox.py::test_contract"
RETRIES = "tests/faults/test_retries.py"
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
