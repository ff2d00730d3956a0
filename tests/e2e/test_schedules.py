"""A worker that nobody tells anything fires a schedule, and the task runs to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cloudagent_mcp.client import LocalClient
from cloudagent_mcp.scripted_model import Rule, ScriptedModel, Text, ToolUse, Turn
from tests.support.scheduled import due_now
from tests.support.worlds import World, until

EDIT = {"file_path": "{{cwd}}/calc.py", "old_string": "return a - b", "new_string": "return a + b"}
FIX = Rule(
    prompt="Fix add",
    turns=(
        Turn(blocks=(ToolUse(name="Read", input={"file_path": "{{cwd}}/calc.py"}),)),
        Turn(blocks=(ToolUse(name="Edit", input=EDIT),)),
        Turn(blocks=(Text(text="Fixed add."),)),
    ),
)
NIGHTLY: dict[str, Any] = {
    "name": "nightly",
    "cron": "0 3 1 1 *",
    "timezone": "Europe/Berlin",
    "task": {"prompt": "Fix add please", "verify": "python3 -m unittest -q"},
}


def fired(client: LocalClient, schedule_id: str, count: int) -> list[dict[str, Any]]:
    """The runs of a schedule once there are so many."""
    return until(
        lambda: len(runs := client.call("get_schedule", schedule_id=schedule_id)["last_runs"]) >= count and runs,
        f"{count} runs",
    )


def fire_and_finish(world: World, repo: Path, workers: int) -> None:
    with ScriptedModel([FIX]) as model:
        world = world.with_model(model.environment())
        with world.client(repo) as client:
            made = client.call("create_schedule", **NIGHTLY)
            schedule_id = made["schedule_id"]
            for _ in range(workers):
                world.start_worker()
            # Written after the schedule was made: the folder is read when it is due.
            (repo / "notes.txt").write_text("of this morning\n")
            due_at = due_now(world.app().store, schedule_id)
            (run,) = fired(client, schedule_id, 1)
            assert (run["outcome"], run["reason"]) == ("submitted", None)
            assert run["due_at"].startswith(f"{due_at:%Y-%m-%dT%H:%M:%S}")
            task = world.wait(client, run["task_id"])
            assert (task["status"], task["verdict"], task["error"]) == ("completed", "passed", None)
            assert (task["schedule_id"], task["repository"]) == (schedule_id, str(repo))
            client.apply(task["task_id"])
            assert "return a + b" in (repo / "calc.py").read_text()

            # Once each, however many workers look.
            due_now(world.app().store, schedule_id, ago_s=700)
            after = fired(client, schedule_id, 2)
            assert sorted(found["outcome"] for found in after) == ["missed", "submitted"]
            assert client.call("list_tasks", schedule_id=schedule_id)["total"] == 1
            assert client.call("get_schedule", schedule_id=schedule_id)["next_due_at"] == made["next_due_at"]


def test_a_schedule_is_fired_by_a_worker_and_its_task_is_like_any_other(world: World, repo: Path) -> None:
    fire_and_finish(world, repo, workers=1)


@pytest.mark.timeout(180)
def test_two_workers_on_postgres_and_redis_fire_it_once(
    world: World, repo: Path, postgres_url: str, valkey_url: str
) -> None:
    world.environment.update(DATABASE_URL=postgres_url, REDIS_URL=valkey_url)
    fire_and_finish(world, repo, workers=2)
