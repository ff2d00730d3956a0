"""Schedules as users and workers see them: the operations over every face, and the sweeper that fires them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncGenerator, Generator
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest
from mcp import Client
from mcp.types import CallToolResult
from starlette.testclient import TestClient

from cloudagent_mcp.client import LocalClient
from cloudagent_mcp.embedded import only_worker, running_worker, stop_when_idle
from cloudagent_mcp.server import http_app, mcp_server
from cloudagent_queue.lease import Timers
from cloudagent_queue.sweep import Kept, sweep_forever
from cloudagent_queue.task_queue import TaskQueue
from cloudagent_storage import errors
from cloudagent_storage.records import LOCAL_ACCOUNT
from cloudagent_storage.schedule import MAX_SCHEDULES
from tests.support.scheduled import due_now, scheduled
from tests.support.worlds import World, until

KEY = "a-key-for-the-tests"
HOST = "127.0.0.1:8420"
TASK: dict[str, Any] = {"prompt": "Run the tests.\nAnd fix them.", "repository": "none"}
NIGHTLY: dict[str, Any] = {"name": "nightly", "cron": "0 3 * * 1-5", "timezone": "Europe/Berlin", "task": TASK}


@pytest.fixture
def api(world: World, repo: Path) -> Generator[LocalClient]:
    with world.client(repo) as client:
        yield client


@pytest.fixture
async def mcp(world: World) -> AsyncGenerator[Client]:
    async with Client(mcp_server(world.app(), remote=False)) as client:
        yield client


@pytest.fixture
def rest(world: World) -> Generator[TestClient]:
    app = http_app(world.app(), key=KEY, host="127.0.0.1", port=8420)
    headers = {"Authorization": f"Bearer {KEY}", "Host": HOST}
    with TestClient(app, base_url=f"http://{HOST}/api/v1", headers=headers) as client:
        yield client


def structured(result: CallToolResult) -> dict[str, Any]:
    return cast("dict[str, Any]", result.structured_content)


def test_a_schedule_says_when_it_is_due_and_never_a_credential(api: LocalClient, repo: Path) -> None:
    made = api.call("create_schedule", **{**NIGHTLY, "cron": " 0  3 * * mon-fri ", "task": {"prompt": "x"}})
    assert (made["name"], made["cron"], made["timezone"]) == ("nightly", "0 3 * * MON-FRI", "Europe/Berlin")
    assert made["enabled"] and made["last_runs"] == []
    due = [datetime.fromisoformat(moment) for moment in made["next_due_at"]]
    assert len(due) == 3 and due == sorted(due) and all(moment.hour in (1, 2) for moment in due)
    # Left out, the repository is the one that its user is in, by its whole path.
    assert made["task"]["repository"] == str(repo) and made["task"]["title"] == "x"
    assert api.call("get_schedule", schedule_id=made["schedule_id"]) == made
    assert api.call("list_schedules") == {"schedules": [made], "total": 1}
    assert "sk-ant" not in json.dumps(made) and "credential" not in json.dumps(made)


def test_a_folder_that_is_named_from_where_its_user_is_becomes_a_whole_path(api: LocalClient, repo: Path) -> None:
    (repo / "sub").mkdir()
    (repo / "sub" / "file").write_text("x")
    made = api.call("create_schedule", **{**NIGHTLY, "task": {"prompt": "x", "repository": "sub"}})
    assert made["task"]["repository"] == str(repo)


def test_a_change_keeps_what_it_does_not_name(api: LocalClient) -> None:
    task = {**TASK, "verify": "make test", "tags": ["night"], "timeout_minutes": 5.0}
    made = api.call("create_schedule", **{**NIGHTLY, "task": task})
    schedule_id = made["schedule_id"]
    changed = api.call("update_schedule", schedule_id=schedule_id, task={"prompt": "Lint.", "timeout_minutes": None})
    assert changed["task"] == {**made["task"], "prompt": "Lint.", "title": "Lint.", "timeout_minutes": 60.0}
    assert changed["next_due_at"] == made["next_due_at"] and changed["updated_at"] > made["updated_at"]
    renamed = api.call("update_schedule", schedule_id=schedule_id, name="other", task={"title": "Kept"})
    again = api.call("update_schedule", schedule_id=schedule_id, task={"prompt": "Third."})
    assert renamed["name"] == "other" and again["task"]["title"] == "Kept" and again["task"]["verify"] == "make test"
    moved = api.call("update_schedule", schedule_id=schedule_id, cron="30 4 * * *")
    assert moved["timezone"] == "Europe/Berlin" and all(due[14:16] == "30" for due in moved["next_due_at"])


def test_a_paused_schedule_is_due_again_when_it_is_resumed(api: LocalClient) -> None:
    made = api.call("create_schedule", **NIGHTLY)
    paused = api.call("update_schedule", schedule_id=made["schedule_id"], enabled=False)
    assert not paused["enabled"] and paused["next_due_at"] == []
    moved = api.call("update_schedule", schedule_id=made["schedule_id"], cron="0 4 * * 1-5")
    assert not moved["enabled"] and moved["next_due_at"] == []
    resumed = api.call("update_schedule", schedule_id=made["schedule_id"], enabled=True)
    assert resumed["enabled"] and len(resumed["next_due_at"]) == 3


@pytest.mark.parametrize("change", [{"enabled": False}, {"cron": "30 4 * * *"}])
def test_a_change_of_the_times_leaves_a_run_for_the_one_that_nobody_answered(
    world: World, api: LocalClient, change: dict[str, object]
) -> None:
    made = api.call("create_schedule", **NIGHTLY)
    due_at = due_now(world.app().store, made["schedule_id"])
    renamed = api.call("update_schedule", schedule_id=made["schedule_id"], name="other")
    assert renamed["last_runs"] == []
    (run,) = api.call("update_schedule", schedule_id=made["schedule_id"], **change)["last_runs"]
    assert (datetime.fromisoformat(run["due_at"]), run["outcome"], run["task_id"]) == (due_at, "skipped", None)
    assert "before a worker came to it" in run["reason"]


def test_a_run_is_a_task_of_the_schedule_at_once(api: LocalClient) -> None:
    made = api.call("create_schedule", **NIGHTLY)
    api.call("update_schedule", schedule_id=made["schedule_id"], enabled=False)
    ran = api.call("run_schedule", schedule_id=made["schedule_id"])
    assert ran["run"]["outcome"] == "submitted" and ran["last_runs"] == [ran["run"]]
    task = api.call("get_task", task_id=ran["run"]["task_id"])
    assert (task["schedule_id"], task["status"], task["title"]) == (made["schedule_id"], "queued", "Run the tests.")
    api.call("submit_task", prompt="x", repository="none")
    assert api.call("list_tasks", schedule_id=made["schedule_id"])["total"] == 1
    deleted = api.call("delete_schedule", schedule_id=made["schedule_id"])
    assert deleted["name"] == "nightly"
    assert api.call("get_task", task_id=ran["run"]["task_id"])["schedule_id"] == made["schedule_id"]
    with pytest.raises(errors.ScheduleNotFound):
        api.call("delete_schedule", schedule_id=made["schedule_id"])


def test_a_change_of_the_task_takes_the_credential_anew_and_keeps_the_earlier_one_without(world: World) -> None:
    store, keyring = world.app().store, world.settings.keyring

    def sealed(schedule_id: str) -> dict[str, str]:
        credentials = store.schedules.hold(LOCAL_ACCOUNT, schedule_id).credentials
        assert credentials is not None
        return json.loads(keyring.open(credentials, bound_to=schedule_id))["agent"]

    with world.client() as client:
        schedule_id = client.call("create_schedule", **NIGHTLY)["schedule_id"]
    with world.with_model({"ANTHROPIC_API_KEY": "sk-ant-another"}).client() as client:
        client.call("update_schedule", schedule_id=schedule_id, enabled=False)
        assert sealed(schedule_id)["ANTHROPIC_API_KEY"] == world.environment["ANTHROPIC_API_KEY"]
        client.call("update_schedule", schedule_id=schedule_id, task={})
        assert sealed(schedule_id)["ANTHROPIC_API_KEY"] == "sk-ant-another"
    with world.without_credential().client() as client:
        client.call("update_schedule", schedule_id=schedule_id, task={"prompt": "y"})
        assert sealed(schedule_id)["ANTHROPIC_API_KEY"] == "sk-ant-another"
        with pytest.raises(errors.CredentialMissing):
            client.call("create_schedule", **NIGHTLY)


BAD: list[tuple[dict[str, Any], str, str | None]] = [
    ({"cron": ""}, "invalid_cron", "cron"),
    ({"cron": "@hourly"}, "invalid_cron", "cron"),
    ({"cron": "0 0 30 2 *"}, "never_fires", "cron"),
    ({"cron": "* * * * *"}, "too_frequent", "cron"),
    ({"cron": "1 " * 2500}, "invalid_cron", "cron"),
    ({"timezone": "Mars/X"}, "unknown_timezone", "timezone"),
    ({"name": ""}, "out_of_range", "name"),
    ({"name": " \n"}, "invalid_input", "name"),
    ({"name": "a\0"}, "invalid_character", "name"),
    ({"task": {}}, "missing_argument", "task.prompt"),
    ({"task": "Run the tests."}, "wrong_type", "task"),
    ({"task": {**TASK, "prompt": " "}}, "prompt_empty", "task.prompt"),
    ({"task": {**TASK, "promt": "x"}}, "unknown_argument", "task.promt"),
    ({"task": {**TASK, "idempotency_key": "k"}}, "unknown_argument", "task.idempotency_key"),
    ({"task": {**TASK, "max_turns": 0}}, "out_of_range", "task.max_turns"),
    ({"task": {**TASK, "timeout_minutes": "60"}}, "wrong_type", "task.timeout_minutes"),
    ({"task": {**TASK, "prompt": "a\0b"}}, "invalid_character", "task"),
    ({"task": {**TASK, "provider": "mars"}}, "unknown_provider", "task.provider"),
    ({"task": {**TASK, "repository": "ext::sh -c id"}}, "repository_not_allowed", "task.repository"),
    ({"task": {**TASK, "repository": "/nowhere/at/all"}}, "repository_not_found", "task.repository"),
    ({"schedule": "x"}, "unknown_argument", "schedule"),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("arguments", "code", "field"), BAD)
async def test_bad_input_names_its_field_and_keeps_nothing(
    mcp: Client, arguments: dict[str, Any], code: str, field: str | None
) -> None:
    kept = structured(await mcp.call_tool("create_schedule", NIGHTLY))
    for tool, given in (
        ("create_schedule", {**NIGHTLY, **arguments}),
        ("update_schedule", {"schedule_id": kept["schedule_id"], **arguments}),
    ):
        if tool == "update_schedule" and arguments.get("task") == {}:
            continue  # nothing of it changes
        result = await mcp.call_tool(tool, given)
        assert result.is_error
        error = structured(result)
        assert (error["code"], error["field"]) == (code, field)
        assert not any(value in json.dumps(error) for value in ("Mars", "mars", "sh -c", "/nowhere", "Traceback"))
    assert structured(await mcp.call_tool("list_schedules", {})) == {"schedules": [kept], "total": 1}


@pytest.mark.anyio
async def test_over_rest_a_schedule_is_made_changed_run_and_deleted(mcp: Client, rest: TestClient) -> None:
    made = rest.post(
        "/schedules", json={**NIGHTLY, "task": {"prompt": "x", "repository_url": "https://example.com/x.git"}}
    )
    assert made.status_code == 201 and made.json()["task"]["repository"] == "https://example.com/x.git"
    path = f"/schedules/{made.json()['schedule_id']}"
    assert rest.get(path).json() == made.json()
    assert structured(await mcp.call_tool("get_schedule", {"schedule_id": made.json()["schedule_id"]})) == made.json()
    changed = rest.patch(path, json={"name": "changed", "enabled": False})
    assert changed.status_code == 200 and changed.json()["name"] == "changed" and not changed.json()["enabled"]
    ran = rest.post(f"{path}/run")
    assert ran.status_code == 202
    task_id = ran.json()["run"]["task_id"]
    assert (
        rest.get("/tasks", params={"schedule_id": made.json()["schedule_id"]}).json()["tasks"][0]["task_id"] == task_id
    )
    assert rest.delete(path).json()["schedule_id"] == made.json()["schedule_id"]
    gone = rest.get(path)
    assert gone.status_code == 404 and gone.json()["code"] == "schedule_not_found"
    assert rest.patch(path, json={"name": "x"}).json() == gone.json() == rest.delete(path).json()
    assert rest.delete(path, params={"force": "1"}).json()["code"] == "unknown_argument"


def test_a_remote_client_reaches_no_folder_through_a_schedule(rest: TestClient, api: LocalClient, repo: Path) -> None:
    refused = rest.post("/schedules", json={**NIGHTLY, "task": {"prompt": "x", "repository": str(repo)}})
    assert refused.json()["code"] == "repository_not_allowed"
    assert rest.post("/schedules", json={**NIGHTLY, "task": {"prompt": "x"}}).json()["task"]["repository"] == "none"
    local = api.call("create_schedule", **{**NIGHTLY, "task": {"prompt": "x"}})
    path = f"/schedules/{local['schedule_id']}"
    # It would be another's words about a folder that only its user may name.
    assert rest.patch(path, json={"task": {"prompt": "Print all of it."}}).json()["code"] == "repository_not_allowed"
    assert rest.patch(path, json={"cron": "0 4 * * *"}).json()["task"] == local["task"]


def test_the_hundred_and_first_schedule_is_refused(rest: TestClient, world: World) -> None:
    store = world.app().store
    for _ in range(MAX_SCHEDULES):
        scheduled(store, keyring=world.settings.keyring)
    refused = rest.post("/schedules", json=NIGHTLY)
    assert (refused.status_code, refused.json()["code"]) == (409, "limit_reached")


@pytest.mark.anyio
async def test_a_list_of_many_schedules_is_cut_so_that_it_fits(mcp: Client, world: World) -> None:
    store = world.app().store
    made = [scheduled(store, keyring=world.settings.keyring).schedule_id for _ in range(60)]
    found: list[str] = []
    while len(found) < 60:
        result = await mcp.call_tool("list_schedules", {"offset": len(found)})
        assert len(result.content[0].text) <= 30_000  # pyright: ignore
        page = structured(result)
        assert page["total"] == 60 and page["schedules"]
        found += [schedule["schedule_id"] for schedule in page["schedules"]]
    assert sorted(found) == sorted(made), "each once"


def test_an_embedded_worker_stays_for_as_long_as_a_schedule_may_be_due(world: World) -> None:
    store = world.app().store
    schedule = scheduled(store, keyring=world.settings.keyring)
    stopping = threading.Event()
    with only_worker(world.home, version="1.0") as lock:
        arguments = (store, lock, world.home, stopping)
        watching = threading.Thread(target=stop_when_idle, args=arguments, kwargs={"idle_s": 0.2})
        watching.start()
        assert not stopping.wait(1.0)
        held = store.schedules.hold(LOCAL_ACCOUNT, schedule.schedule_id)
        store.schedules.change(held, enabled=False, next_due_at=None)
        assert stopping.wait(10)
        watching.join(10)
        assert running_worker(world.home) is None


class Sweeper:
    """The sweeper of a worker, on a thread of this process."""

    def __init__(self, world: World, queue: TaskQueue, *, sweep_s: float) -> None:
        self.stopping, self.wake = threading.Event(), threading.Event()
        self.rung: list[str] = []
        self.swept: list[bool] = []
        self._thread = threading.Thread(
            target=sweep_forever,
            args=(world.app().store, queue, []),
            kwargs={
                "keyring": world.settings.keyring,
                "ring": self.rung.append,
                "deployment": "x",
                "timers": Timers(sweep_s=sweep_s, ring_again_s=0.1),
                "stopping": self.stopping,
                "wake": self.wake,
                "report": self.swept.append,
                "kept": Kept(days=0, megabytes=0),
            },
        )

    def __enter__(self) -> Sweeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


def test_a_tick_wakes_the_sweeper_long_before_it_would_look_by_itself(world: World) -> None:
    store = world.app().store
    schedule = scheduled(store, keyring=world.settings.keyring)
    with Sweeper(world, world.app().queue, sweep_s=600) as sweeper:
        due_now(store, schedule.schedule_id)
        until(lambda: sweeper.wake.set() or sweeper.rung, "the schedule is fired")
    assert len(sweeper.rung) == 1


def test_a_schedule_is_fired_without_a_tick_while_redis_is_dead(world: World) -> None:
    store = world.app().store
    schedule = scheduled(store, keyring=world.settings.keyring)
    waiting = store.tasks.add(LOCAL_ACCOUNT, schedule.task)  # for which the sweeper rings in vain
    queue = TaskQueue("redis://127.0.0.1:1/0")
    with Sweeper(world, queue, sweep_s=0.2) as sweeper:
        started = time.monotonic()
        due_now(store, schedule.schedule_id)
        until(lambda: sweeper.rung, "the schedule is fired")
    assert time.monotonic() - started < 30
    assert store.tasks.get(LOCAL_ACCOUNT, waiting.task_id).status == "queued"
    queue.close()
