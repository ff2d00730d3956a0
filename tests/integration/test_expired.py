"""An expired task and a full disk, as REST and the operations tell of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from mcp import Client
from mcp.shared.exceptions import MCPError
from starlette.testclient import TestClient

from cloudagent_mcp.server import http_app, mcp_server
from cloudagent_storage.errors import TaskExpired
from cloudagent_storage.records import LOCAL_ACCOUNT, TaskSpec, TaskStatus
from cloudagent_storage.store import Store
from tests.support.stored import line
from tests.support.worlds import World

HEADERS = {"Authorization": "Bearer a-key", "Host": "127.0.0.1:8420"}


def expired_task(store: Store) -> str:
    spec = TaskSpec(prompt="x", title="x")
    task_id = store.tasks.add(LOCAL_ACCOUNT, spec, blobs={"input": b"bundle"}, lines=[line()]).task_id
    store.tasks.claim(task_id, worker="w", lease_s=60)
    store.blobs.put(task_id, "result", b"bundle", attempt=1)
    store.blobs.put(task_id, "diff", b"diff", attempt=1)
    store.tasks.finish(task_id, 1, status=TaskStatus.COMPLETED)
    assert store.retention.prune(max_age_s=0, max_bytes=None) == 1
    return task_id


@pytest.mark.parametrize("route", ["logs", "diff", "bundle", "bundle?kind=input", "apply"])
def test_rest_says_that_the_material_of_an_expired_task_is_gone(world: World, route: str) -> None:
    app = world.app()
    task_id = expired_task(app.store)
    with TestClient(http_app(app, key="a-key", host="127.0.0.1", port=8420), headers=HEADERS) as http:
        shown = http.get(f"/api/v1/tasks/{task_id}").json()
        assert shown["status"] == "completed" and shown["expired_at"] and shown["log"] == []
        assert "pruned" in shown["next_action"]
        url = f"/api/v1/tasks/{task_id}/{route}"
        answer = http.post(url) if route == "apply" else http.get(url)
        assert (answer.status_code, answer.json()["code"]) == (410, "task_expired")
        assert "RETENTION_DAYS" in answer.json()["remedy"]


@pytest.mark.anyio
@pytest.mark.parametrize("part", ["log", "diff"])
async def test_a_resource_of_an_expired_task_says_that_it_is_gone(world: World, part: str) -> None:
    app = world.app()
    task_id = expired_task(app.store)
    async with Client(mcp_server(app, remote=False)) as client:
        with pytest.raises(MCPError) as refused:
            await client.read_resource(f"task://{task_id}/{part}")
        assert refused.value.error.data["code"] == "task_expired" and "RETENTION_DAYS" in refused.value.message
        assert "pruned" in str((await client.read_resource(f"task://{task_id}")).contents)


def test_a_result_that_has_expired_is_not_applied(world: World, repo: Path) -> None:
    with world.client(repo) as client:
        task_id = expired_task(world.app().store)
        with pytest.raises(TaskExpired):
            client.apply(task_id)


def test_rest_refuses_a_submit_while_the_reserve_is_given_up_and_there_is_no_space(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloudagent_storage.store import reserve

    app = world.app()
    (world.home / "reserve").touch()  # empty: it was given up
    monkeypatch.setattr(reserve, "RESERVE_BYTES", 10**18)
    monkeypatch.setattr(reserve, "SHARE_OF_DISK", 1.0)
    with TestClient(http_app(app, key="a-key", host="127.0.0.1", port=8420), headers=HEADERS) as http:
        body = {"prompt": "x", "repository": "none"}
        answer = http.post("/api/v1/tasks", json=body)
        assert (answer.status_code, answer.json()["code"]) == (507, "storage_full")
        assert http.get("/api/v1/tasks").json()["total"] == 0
        monkeypatch.undo()
        assert http.post("/api/v1/tasks", json=body).status_code == 202
    assert (world.home / "reserve").stat().st_size
