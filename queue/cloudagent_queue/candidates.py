"""One task as several candidates: independent tries at the same prompt, each a task of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cloudagent_storage.records import CandidateDraft, TaskSpec, bound_for_git, new_id
from cloudagent_storage.secrets import Keyring


def split(spec: TaskSpec) -> list[TaskSpec]:
    """What each candidate is asked for; [] for a task that is tried by itself.

    They take the models and the providers in turn, and an equal part of the budget each: together they never spend
    more. The limits of time and turns hold for each.
    """
    alone: dict[str, Any] = {"best_of": None, "models": (), "providers": (), "cancel_losers": False}
    alone["budget_shares"] = spec.best_of or 1
    if spec.max_budget_usd is not None and spec.best_of is not None:
        alone["max_budget_usd"] = spec.max_budget_usd / spec.best_of
    return [
        spec.model_copy(
            update={
                **alone,
                "model": spec.models[number % len(spec.models)] if spec.models else spec.model,
                "provider": spec.providers[number % len(spec.providers)] if spec.providers else spec.provider,
            }
        )
        for number in range(spec.best_of or 0)
    ]


class Sealing:
    """The credentials of a submit, sealed for whichever tasks come of it."""

    def __init__(self, keyring: Keyring, environment: Mapping[str, str], tokens: Mapping[str, str]) -> None:
        self._keyring = keyring
        self._environment = json.dumps(dict(environment)).encode()
        self._tokens = json.dumps(dict(tokens)).encode() if tokens else None

    def for_agent(self, task_id: str) -> bytes:
        return self._keyring.seal(self._environment, bound_to=task_id)

    def for_git(self, task_id: str) -> bytes | None:
        """The agent never sees these, see `bound_for_git`."""
        return None if self._tokens is None else self._keyring.seal(self._tokens, bound_to=bound_for_git(task_id))

    def candidates(self, spec: TaskSpec) -> tuple[CandidateDraft, ...]:
        """The candidates that a task is to have."""
        return tuple(
            CandidateDraft(
                task_id=(task_id := new_id("task")),
                spec=of_one,
                credentials=self.for_agent(task_id),
                git_credentials=self.for_git(task_id),
            )
            for of_one in split(spec)
        )
