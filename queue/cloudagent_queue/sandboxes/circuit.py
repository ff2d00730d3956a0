"""Leaving a provider alone that refuses: two hundred tasks must not hammer one that is sick."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

FIRST_S = 5.0
LONGEST_S = 60.0
"""Pauses double from the first to the longest; a provider that names one itself is given that, up to `ASKED_MAX_S`."""
ASKED_MAX_S = 600.0
TRIAL_S = 60.0
"""While one task tries a provider again the others come back every `FIRST_S`; after so long the next one tries."""


@dataclass
class _State:
    failures: int = 0
    closed_until: float = 0.0
    on_trial: bool = False


class Circuit:
    """What a process knows of its providers. Safe to use from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[str, _State] = {}
        self._guard = threading.Lock()

    def wait_s(self, provider: str) -> float:
        """How long the provider is to be left alone; 0 lets the caller ask it, and after a pause only the first."""
        with self._guard:
            state = self._states.setdefault(provider, _State())
            left = state.closed_until - self._clock()
            if left > 0:
                return min(left, FIRST_S) if state.on_trial else left
            if state.failures:
                state.on_trial, state.closed_until = True, self._clock() + TRIAL_S
            return 0.0

    def refused(self, provider: str, *, retry_after_s: float | None = None) -> float:
        """It takes nothing at the moment; returns how long it is left alone now, in seconds."""
        with self._guard:
            state = self._states.setdefault(provider, _State())
            left = state.closed_until - self._clock()
            if left > 0 and not state.on_trial and retry_after_s is None:
                return left  # several were refused at once: that is one refusal
            pause_s = min(LONGEST_S, FIRST_S * 2**state.failures)
            if retry_after_s is not None:
                pause_s = min(ASKED_MAX_S, max(retry_after_s, FIRST_S))
            # Jitter, upwards only: whoever asks to be left alone for so long is not asked earlier.
            pause_s *= random.uniform(1.0, 1.3)
            state.failures, state.on_trial = min(state.failures + 1, 10), False
            state.closed_until = self._clock() + pause_s
            return pause_s

    def succeeded(self, provider: str) -> None:
        with self._guard:
            self._states.pop(provider, None)
