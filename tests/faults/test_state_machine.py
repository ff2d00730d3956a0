"""No order of what users, workers, time and the sweeper do breaks a promise of the store.

The rules and the model are in `tests/support/protocol.py`.

A property that holds proves nothing until it has failed once: `tests/mutants/` breaks the store, and sees it fail.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from cloudagent_storage.store import Store
from cloudagent_storage.store.database import Database
from tests.support.protocol import Protocol

STEPS = 50


def throw(url: str, sequences: int, request: pytest.FixtureRequest, *, part: int = 0) -> None:
    """Throw so many sequences at a store. The seed is printed; with `--seed` the shortest failing sequence is."""
    given = request.config.getoption("--seed")
    seed = random.randrange(2**32) if given is None else given
    print(f"{sequences} sequences, part {part} of --seed {seed}")
    machine: Any = hypothesis.seed(seed + part)(lambda: Protocol(store, database))
    every_check: Any = list(HealthCheck)
    store, database = Store.open(url), Database(url)
    store.migrate()
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=sequences,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                print_blob=True,
                report_multiple_bugs=False,
                # To find the shortest sequence takes minutes: that is for who runs a seed again that has failed.
                phases=[Phase.generate] if given is None else [Phase.generate, Phase.shrink],
                suppress_health_check=every_check,
            ),
        )
    finally:
        database.close()
        store.close()


@pytest.mark.timeout(400)
def test_no_order_of_events_breaks_a_promise(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    throw(f"sqlite:///{tmp_path / 'store.db'}", 350, request)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(10))
def test_none_of_ten_thousand_orders_of_events_breaks_a_promise(
    empty_url: str, part: int, request: pytest.FixtureRequest
) -> None:
    throw(empty_url, 500, request, part=part)
