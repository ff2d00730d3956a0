"""That the tests of the promises fail when a promise is broken. `run.py` beside this tries one by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.mutants.mutant import Mutant
from tests.mutants.run import ROOT, CannotTell, try_all
from tests.mutants.table import MUTANTS

SEEN = ("tests/contracts/test_store_tasks.py::test_an_account_is_made_once[sqlite]",)
ACCOUNTS = "storage/cloudagent_storage/store/accounts.py"


def test_every_mutant_names_one_place_and_tests_that_exist() -> None:
    for mutant in MUTANTS:
        assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, mutant.name
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    tests = sorted({test for mutant in MUTANTS for test in mutant.tests})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "--full", "--collect-only", "-q", *tests],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.timeout(600)
def test_every_fast_mutant_is_caught() -> None:
    outcomes = try_all([mutant for mutant in MUTANTS if mutant.fast])
    assert not [outcome.mutant.name for outcome in outcomes if not outcome.caught]


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_mutant_is_caught() -> None:
    outcomes = try_all(MUTANTS)
    assert not [outcome.mutant.name for outcome in outcomes if not outcome.caught]


STATE_MACHINE = "tests/faults/test_state_machine.py::test_no_order_of_events_breaks_a_promise"


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_model_of_the_store_catches_what_a_single_caller_can_see() -> None:
    mutants = [mutant for mutant in MUTANTS if mutant.seen_by_model]
    for _ in range(3):  # each with seeds of its own: a run of a commit's length may miss one of them
        outcomes = try_all(mutants, against=[STATE_MACHINE])
        mutants = [outcome.mutant for outcome in outcomes if not outcome.caught]
        if not mutants:
            return
    raise AssertionError(f"missed: {[mutant.name for mutant in mutants]}")


def test_a_mutant_that_changes_nothing_survives_and_one_that_proves_nothing_is_an_error() -> None:
    harmless = Mutant("harmless", ACCOUNTS, '"""Who owns tasks."""', '"""Whose tasks they are."""', SEEN)
    (outcome,) = try_all([harmless])
    assert not outcome.caught
    nowhere = Mutant("nowhere", ACCOUNTS, "no such text", "x", SEEN)
    with pytest.raises(CannotTell, match="0 times"):
        try_all([nowhere])
    unimportable = Mutant("unimportable", ACCOUNTS, "class Accounts:", "class Accountants:", SEEN)
    with pytest.raises(CannotTell, match="no test failed"):
        try_all([unimportable])
    impossible = Mutant("impossible", ACCOUNTS, "class Accounts:", "class Accounts", SEEN)
    with pytest.raises(CannotTell, match="no Python"):
        try_all([impossible])
