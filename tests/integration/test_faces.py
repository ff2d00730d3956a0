"""The same operations over MCP and REST: what comes in is checked alike, and what goes out is the same."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any, cast

import anyio
import pytest
from mcp import Client
from mcp.types import CallToolResult
from starlette.testclient import TestClient

from cloudagent_mcp.server import http_app, mcp_server
from tests.support.worlds import World, until

pytestmark = pytest.mark.anyio

KEY = "a-key-for-the-tests"
HOST = "127.0.0.1:8420"
HEADERS = {"Authorization": f"Bearer {KEY}", "Host": HOST}


@pytest.fixture
async def mcp(world: World) -> AsyncGenerator[Client]:
    async with Client(mcp_server(world.app(), remote=False)) as client:
        yield client


@pytest.fixture
def rest(world: World) -> Generator[TestClient]:
    app = http_app(world.app(), key=KEY, host="127.0.0.1", port=8420)
    with TestClient(app, base_url=f"http://{HOST}", headers=HEADERS) as client:
        yield client


def structured(result: CallToolResult) -> dict[str, Any]:
    return cast("dict[str, Any]", result.structured_content)


async def submit(mcp: Client, **arguments: Any) -> str:
    result = await mcp.call_tool("submit_task", {"prompt": "Do it.", "repository": "none", **arguments})
    assert not result.is_error, result.content
    return structured(result)["task_id"]


async def test_a_task_looks_the_same_over_mcp_and_rest(mcp: Client, rest: TestClient) -> None:
    task_id = await submit(mcp, title="Same", tags=["a", "b"])
    over_mcp = structured(await mcp.call_tool("get_task", {"task_id": task_id}))
    over_rest = rest.get(f"/api/v1/tasks/{task_id}").json()
    assert over_mcp == over_rest
    assert over_rest["status"] == "queued" and over_rest["result"] is None and over_rest["tags"] == ["a", "b"]
    assert over_rest["next_action"].startswith("Wait with get_task")


async def test_submit_over_rest_answers_202_and_takes_repository_url(rest: TestClient) -> None:
    response = rest.post("/api/v1/tasks", json={"prompt": "x", "repository_url": "https://example.com/x.git"})
    assert response.status_code == 202
    assert response.json()["repository"] == "https://example.com/x.git"


async def test_a_remote_client_may_name_no_folder_of_the_server(rest: TestClient, repo: Any) -> None:
    for name in (str(repo), "file:///etc", "/etc", "."):
        response = rest.post("/api/v1/tasks", json={"prompt": "x", "repository": name})
        assert response.json()["code"] == "repository_not_allowed"


async def test_without_a_credential_submit_is_refused_and_nothing_is_kept(world: World) -> None:
    bare = world.without_credential()
    async with Client(mcp_server(bare.app(), remote=False)) as client:
        result = await client.call_tool("submit_task", {"prompt": "x", "repository": "none"})
        assert structured(result)["code"] == "credential_missing"
        assert "claude setup-token" in structured(result)["remedy"]
        assert structured(await client.call_tool("list_tasks", {}))["total"] == 0


async def test_a_submit_that_is_repeated_with_its_key_is_the_same_task(mcp: Client, rest: TestClient) -> None:
    asked = {"prompt": "Do it.", "repository": "none", "idempotency_key": "k1"}
    first = structured(await mcp.call_tool("submit_task", asked))
    again = rest.post("/api/v1/tasks", json=asked).json()
    assert (first["replayed"], again["replayed"]) == (False, True)
    assert again["task_id"] == first["task_id"]
    other = rest.post("/api/v1/tasks", json={**asked, "prompt": "Do something else."})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    empty = rest.post("/api/v1/tasks", json={**asked, "idempotency_key": ""})
    assert empty.json()["code"] == "out_of_range"


async def test_cancelling_twice_says_that_nothing_changed(mcp: Client) -> None:
    task_id = await submit(mcp)
    first = structured(await mcp.call_tool("cancel_task", {"task_id": task_id}))
    second = structured(await mcp.call_tool("cancel_task", {"task_id": task_id}))
    assert (first["status"], first["changed"], second["status"], second["changed"]) == (
        "cancelled", True, "cancelled", False,
    )  # fmt: skip


async def test_what_is_not_ready_says_how_to_wait(mcp: Client, tmp_path: Any) -> None:
    task_id = await submit(mcp)
    for tool in ("get_task_diff", "apply_task"):
        error = structured(await mcp.call_tool(tool, {"task_id": task_id}))
        assert error["code"] == "not_ready" and "wait_seconds" in error["remedy"]


async def test_a_waiting_call_returns_when_the_status_changes_and_not_before(mcp: Client) -> None:
    task_id = await submit(mcp)
    answers: list[dict[str, Any]] = []
    async with anyio.create_task_group() as group:

        async def wait() -> None:
            result = await mcp.call_tool("get_task", {"task_id": task_id, "wait_seconds": 30})
            answers.append(structured(result))

        group.start_soon(wait)
        await anyio.sleep(0.3)
        assert not answers
        with anyio.fail_after(10):
            await mcp.call_tool("cancel_task", {"task_id": task_id})
            while not answers:
                await anyio.sleep(0.02)
    assert answers[0]["status"] == "cancelled"


async def test_wait_tasks_ends_with_any_or_all(mcp: Client) -> None:
    one, two = await submit(mcp), await submit(mcp)
    await mcp.call_tool("cancel_task", {"task_id": one})
    any_ = structured(await mcp.call_tool("wait_tasks", {"task_ids": [one, two], "mode": "any"}))
    all_ = structured(await mcp.call_tool("wait_tasks", {"task_ids": [one, two], "timeout_seconds": 0}))
    assert (any_["finished"], all_["finished"]) == (True, False)
    assert [task["task_id"] for task in all_["tasks"]] == [one, two]


async def test_a_list_is_cut_so_that_it_fits_and_its_cursor_goes_on(mcp: Client) -> None:
    wanted = [await submit(mcp, title="t" * 200, prompt="p" * 500, tags=["x" * 90] * 10) for _ in range(30)]
    found: list[str] = []
    cursor = None
    while True:
        result = await mcp.call_tool("list_tasks", {"limit": 100} | ({"cursor": cursor} if cursor else {}))
        assert len(result.content[0].text) <= 30_000  # pyright: ignore
        page = structured(result)
        found += [task["task_id"] for task in page["tasks"]]
        if (cursor := page["next_cursor"]) is None:
            break
    assert found == wanted[::-1]


async def test_every_route_but_health_wants_the_key(rest: TestClient) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
        for path in ("/api/v1/tasks", "/mcp", "/", "/api/v1/nothing"):
            response = rest.get(path, headers=headers)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            assert KEY not in response.text
    assert rest.get("/health", headers={"Authorization": ""}).json()["status"] == "ok"


async def test_over_http_apply_writes_nothing_and_says_what_to_type(rest: TestClient, world: World) -> None:
    task_id = rest.post("/api/v1/tasks", json={"prompt": "x"}).json()["task_id"]
    assert rest.post(f"/api/v1/tasks/{task_id}/apply", json={}).json()["code"] == "not_ready"
    rest.post(f"/api/v1/tasks/{task_id}/cancel")
    until(lambda: rest.get(f"/api/v1/tasks/{task_id}").json()["completed_at"], "the task ends")
    answer = rest.post(f"/api/v1/tasks/{task_id}/apply", json={"directory": str(world.home)}).json()
    assert answer["outcome"] == "instructions" and answer["command"] == f"ca task apply {task_id}"
