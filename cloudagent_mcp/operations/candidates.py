"""Several candidates for one task: how they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cloudagent_queue.repository import Source, is_remote, read_config
from cloudagent_storage.errors import InvalidInput, OutOfRange, UnknownProvider
from cloudagent_storage.records import TaskSpec

MODEL_LENGTH = 100


def several(asked: Mapping[str, Any], providers: Sequence[str]) -> dict[str, Any]:
    """How many try a task and with what, of the arguments of `submit_task`, as fields of its spec.

    One candidate is a plain task. `providers` are those that may be asked for. Raises errors under `InvalidInput`.
    """
    for one, each in (("model", "models"), ("provider", "providers")):
        if asked[one] is not None and asked[each]:
            raise InvalidInput(
                f"{one} is for all candidates alike, and {each} for one after the other.",
                remedy=f"Leave one of the two out; {each} may hold a single one.",
                field=one,
            )
    if any(not model.strip() or len(model) > MODEL_LENGTH for model in asked["models"]):
        raise OutOfRange(f"Each of models has 1 to {MODEL_LENGTH} characters.", field="models")
    if any(provider not in providers for provider in asked["providers"]):
        raise UnknownProvider(remedy=f"Choose among: {', '.join(providers)}.", field="providers")
    wanted = max(len(asked["models"]), len(asked["providers"]), 1)
    count = asked["best_of"] or wanted
    if count < wanted:
        raise OutOfRange(
            "There are fewer candidates than models or providers for them.",
            remedy="Raise best_of, or leave it out: there is one candidate for each then.",
            field="best_of",
        )
    if count > 1:
        names = ("models", "providers")
        return {"best_of": count, **{name: tuple(asked[name]) for name in names}}
    if asked["cancel_losers"]:
        raise InvalidInput(
            "With one candidate nobody loses.",
            remedy="Leave cancel_losers out, or pass best_of.",
            field="cancel_losers",
        )
    alone = {"best_of": None, "models": (), "providers": ()}
    return alone | {
        one: asked[each][0] for one, each in (("model", "models"), ("provider", "providers")) if asked[each]
    }


def check_losers(spec: TaskSpec, source: Source) -> None:
    """Losers are known by one that has passed: there must be a verify command. Raises an `InvalidInput`.

    What a remote repository's `.cloudagent.toml` says is not known yet.
    """
    if not spec.cancel_losers or spec.verify is not None or is_remote(source.repository):
        return
    if read_config(source.config).verify is None:
        raise InvalidInput(
            "Without a verify command no candidate can pass, and so none can lose.",
            remedy="Pass verify, or leave cancel_losers out.",
            field="cancel_losers",
        )
