"""Best of four against one: wall time and scripted cost, as ratios. Gates nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cloudagent_mcp.scripted_model import Rule, ScriptedModel
from tests.support.scripts import bash, pause, say
from tests.support.worlds import World

pytestmark = pytest.mark.benchmark

WORKS = Rule(prompt="Fix add", turns=(bash(pause(3, "sed -i 's/a - b/a + b/' calc.py")), say("Fixed.")))
"""Real Claude Code, whose tool takes three seconds: what an agent does is mostly waiting."""


def test_best_of_four_against_one(world: World, repo: Path) -> None:
    with ScriptedModel([WORKS]) as model:
        world = world.with_model(model.environment())
        world.start_worker(concurrency=4)
        with world.client(repo) as client:

            def run(best_of: int) -> tuple[float, float]:
                """Seconds from the submit to the end, and dollars."""
                started = time.monotonic()
                given = {"prompt": "Fix add", "verify": "python3 -m unittest -q", "best_of": best_of}
                task = world.wait(client, client.call("submit_task", **given)["task_id"], 120)
                assert (task["status"], task["verdict"]) == ("completed", "passed")
                return time.monotonic() - started, task["usage"]["cost_usd"]

            run(1)
            one_s, one_usd = run(1)
            four_s, four_usd = run(4)
            print(f"\n  best of 1: {one_s:.1f} s, ${one_usd:.5f}")
            print(f"  best of 4: {four_s:.1f} s, ${four_usd:.5f}")
            print(f"             {four_s / one_s:.2f}x the wall time, {four_usd / one_usd:.2f}x the cost")
