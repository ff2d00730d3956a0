"""When a provider that refuses is asked again."""

from __future__ import annotations

import pytest

from cloudagent_queue.sandboxes.circuit import ASKED_MAX_S, FIRST_S, LONGEST_S, TRIAL_S, Circuit


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def circuit(clock: Clock) -> Circuit:
    return Circuit(clock)


def test_a_provider_that_never_refused_is_asked_by_everyone(circuit: Circuit) -> None:
    assert [circuit.wait_s("e2b") for _ in range(3)] == [0, 0, 0]


def test_one_that_refuses_is_left_alone_for_longer_and_longer(circuit: Circuit, clock: Clock) -> None:
    pauses: list[float] = []
    for _ in range(8):
        pauses.append(circuit.refused("e2b"))
        assert circuit.wait_s("e2b") == pytest.approx(pauses[-1])
        clock.now += pauses[-1] + 1
    assert FIRST_S <= pauses[0] < 2 * FIRST_S
    assert pauses[1] > pauses[0]
    assert LONGEST_S <= pauses[-1] < 1.5 * LONGEST_S


def test_it_is_given_the_time_that_it_asks_for_within_reason(circuit: Circuit) -> None:
    assert 40 <= circuit.refused("e2b", retry_after_s=40) < 60
    assert circuit.refused("e2b", retry_after_s=1e9) < 1.5 * ASKED_MAX_S
    assert circuit.refused("e2b", retry_after_s=-5) >= FIRST_S


def test_after_a_pause_one_task_alone_tries_it(circuit: Circuit, clock: Clock) -> None:
    clock.now += circuit.refused("e2b") + 1
    assert circuit.wait_s("e2b") == 0
    assert circuit.wait_s("e2b") == FIRST_S
    circuit.succeeded("e2b")
    assert circuit.wait_s("e2b") == circuit.wait_s("e2b") == 0


def test_many_that_are_refused_at_once_are_one_refusal(circuit: Circuit, clock: Clock) -> None:
    first = circuit.refused("e2b")
    assert [circuit.refused("e2b") for _ in range(5)] == [pytest.approx(first)] * 5
    clock.now += first + 1
    assert circuit.wait_s("e2b") == 0
    assert circuit.refused("e2b") > 1.5 * FIRST_S, "but a refused trial is another"


def test_a_trial_that_never_ends_is_repeated(circuit: Circuit, clock: Clock) -> None:
    clock.now += circuit.refused("e2b") + 1
    assert circuit.wait_s("e2b") == 0
    clock.now += TRIAL_S + 1
    assert circuit.wait_s("e2b") == 0


def test_providers_know_nothing_of_each_other(circuit: Circuit) -> None:
    circuit.refused("novita")
    assert circuit.wait_s("e2b") == 0 < circuit.wait_s("novita")
