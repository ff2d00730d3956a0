"""The tasks extension, over HTTP with two server processes, and for those who do not declare it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, cast

import anyio
import httpx2
import jsonschema
import pytest
from mcp import Client
from mcp.client.extension import ClaimContext, ClientExtension, ResultClaim, advertise
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, Request, Result
from pydantic import ConfigDict
from pydantic.alias_generators import to_camel

from cloudagent_mcp.agent_tasks import DECLINED
from cloudagent_mcp.api_keys import create_key
from cloudagent_mcp.server import mcp_server
from cloudagent_mcp.settings import Settings
from cloudagent_storage.records import Question, TaskError, TaskStatus
from cloudagent_storage.store import Store
from tests.support.installation import ADMIN_KEY, Installation
from tests.support.stored import ask as ask_as
from tests.support.stored import claimed
from tests.support.wire import TASKS, Wire, next_of
from tests.support.worlds import World, until

pytestmark = pytest.mark.anyio

ASKED = {"prompt": "x", "repository": "none"}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("tasks/get", {}),
    ("tasks/update", {"inputResponses": {}}),
    ("tasks/cancel", {}),
]
FAILED = TaskError(code="agent_error", message="It broke.", remedy="Try again.")


class Handle(Result):
    result_type: Literal["task"] = "task"
    task_id: str
    status: str


class Get(Request[Any, Literal["tasks/get"]]):
    """As the SDK wants a request of an extension's."""

    method: Literal["tasks/get"] = "tasks/get"
    params: dict[str, Any]
    name_param: ClassVar[str | None] = "taskId"


class Got(Result):
    model_config = ConfigDict(extra="allow", alias_generator=to_camel, populate_by_name=True)

    status: str
    result: dict[str, Any] | None = None


class HoldsTasks(ClientExtension):
    """A client that polls, as the specification asks of it."""

    identifier = TASKS

    def __init__(self) -> None:
        self.held: list[str] = []

    def claims(self) -> Sequence[ResultClaim[Any]]:
        return [ResultClaim(result_type="task", model=Handle, resolve=self._resolve)]

    async def _resolve(self, handle: Handle, ctx: ClaimContext) -> CallToolResult:
        self.held.append(handle.task_id)
        while (got := await ctx.session.send_request(Get(params={"taskId": handle.task_id}), Got)).result is None:
            assert got.status == "working"
            await anyio.sleep(0.2)
        return CallToolResult.model_validate(got.result)


def end(installation: Installation, task_id: str, status: TaskStatus, error: TaskError | None = None) -> None:
    claim = claimed(installation.store, task_id)
    installation.store.tasks.finish(task_id, claim.attempt, status=status, error=error)


@pytest.mark.parametrize("tool", ["submit_task", "delegate"])
async def test_a_call_answers_with_a_handle_that_every_server_knows(installation: Installation, tool: str) -> None:
    (first, one), (_, two) = installation.start_server(), installation.start_server()
    made = await Wire(one, ADMIN_KEY).call(tool, ASKED)
    assert made["resultType"] == "task" and made["status"] == "working"
    assert made["ttlMs"] is None and made["pollIntervalMs"] == 5000 and made["createdAt"] and made["lastUpdatedAt"]
    assert not {"result", "error", "inputRequests", "task", "requestState", "content"} & made.keys()
    task_id = made["taskId"]
    first.kill()
    wire = Wire(two, ADMIN_KEY)
    seen = (await wire.ask("tasks/get", {"taskId": task_id}))["result"]
    assert seen["resultType"] == "complete" and seen["status"] == "working"
    end(installation, task_id, TaskStatus.COMPLETED)
    _, three = installation.start_server()
    over = (await Wire(three, ADMIN_KEY).ask("tasks/get", {"taskId": task_id}))["result"]
    assert over["status"] == "completed" and "error" not in over
    assert over["result"]["isError"] is False
    assert over["result"]["structuredContent"]["status"] == "completed"


@pytest.mark.parametrize("tool", ["submit_task", "delegate"])
async def test_the_inlined_result_fits_the_output_schema_of_the_tool(installation: Installation, tool: str) -> None:
    _, url = installation.start_server()
    wire = Wire(url, ADMIN_KEY)
    tools = (await wire.ask("tools/list", {}))["result"]["tools"]
    (schema,) = [found["outputSchema"] for found in tools if found["name"] == tool]
    task_id = (await wire.call(tool, ASKED))["taskId"]
    end(installation, task_id, TaskStatus.FAILED, FAILED)
    task = (await wire.ask("tasks/get", {"taskId": task_id}))["result"]
    jsonschema.validate(task["result"]["structuredContent"], schema)


async def test_a_failed_agent_is_a_completed_call_that_says_that_it_failed(installation: Installation) -> None:
    _, url = installation.start_server()
    wire = Wire(url, ADMIN_KEY)
    task_id = (await wire.call("delegate", ASKED))["taskId"]
    end(installation, task_id, TaskStatus.FAILED, FAILED)
    task = (await wire.ask("tasks/get", {"taskId": task_id}))["result"]
    assert task["status"] == "completed" and "error" not in task
    assert task["result"]["isError"] is True
    assert task["result"]["structuredContent"]["error"]["code"] == "agent_error"
    assert "agent_error" in task["statusMessage"]


async def test_a_task_is_cancelled_and_cancelling_what_has_ended_says_nothing_else(installation: Installation) -> None:
    _, url = installation.start_server()
    wire = Wire(url, ADMIN_KEY)
    task_id = (await wire.call("submit_task", ASKED))["taskId"]
    for _ in range(2):
        said = (await wire.ask("tasks/cancel", {"taskId": task_id}))["result"]
        assert said.pop("_meta") and said == {"resultType": "complete"}
    task = (await wire.ask("tasks/get", {"taskId": task_id}))["result"]
    assert task["status"] == "cancelled" and "result" not in task


async def test_anothers_task_is_as_unknown_as_one_that_never_was(installation: Installation) -> None:
    _, url = installation.start_server()
    keyring = Settings.read(installation.environment()).keyring
    _, token = create_key(installation.store, keyring, account_id="other", name="test")
    mine = (await Wire(url, ADMIN_KEY).call("submit_task", ASKED))["taskId"]
    theirs = Wire(url, token)
    unknown = "task_" + "a" * 26
    for method, more in METHODS:
        said = [(await theirs.ask(method, {"taskId": found, **more}))["error"] for found in (mine, unknown)]
        assert said[0] == said[1] and said[0]["code"] == -32602 and said[0]["data"]["code"] == "task_not_found"
    assert installation.task(mine).status is TaskStatus.QUEUED


async def test_who_does_not_declare_the_extension_notices_nothing(installation: Installation) -> None:
    _, url = installation.start_server()
    wire = Wire(url, ADMIN_KEY, tasks=False)
    listed = [await wire.ask("tools/list", {}, tasks=tasks) for tasks in (False, True)]
    assert json.dumps(listed[0]) == json.dumps(listed[1])
    made = await wire.call("submit_task", ASKED)
    assert made["resultType"] == "complete" and made["structuredContent"]["status"] == "queued"
    assert made["structuredContent"]["next_action"].startswith("Wait with get_task")
    task_id = made["structuredContent"]["task_id"]
    for method, more in METHODS:
        refused = (await wire.ask(method, {"taskId": task_id, **more}))["error"]
        assert refused["code"] == -32021
        assert refused["data"] == {"requiredCapabilities": {"extensions": {TASKS: {}}}}
    assert installation.task(task_id).status is TaskStatus.QUEUED
    # Declared for one request, it holds for that one.
    assert (await wire.call("submit_task", ASKED, tasks=True))["resultType"] == "task"
    assert (await wire.call("get_task", {"task_id": task_id}, tasks=True))["resultType"] == "complete"


async def test_the_older_protocol_has_no_such_methods_and_no_handles(installation: Installation) -> None:
    _, url = installation.start_server()
    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60) as http:
        transport = streamable_http_client(f"{url}/mcp", http_client=http)
        async with Client(transport, mode="legacy", extensions=[HoldsTasks()]) as client:
            made = await client.call_tool("submit_task", ASKED)
            assert cast("dict[str, Any]", made.structured_content)["status"] == "queued"
        headers = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-11-25"}
        body = {"jsonrpc": "2.0", "id": 1, "method": "tasks/get", "params": {"taskId": "x"}}
        assert '"code":-32601' in (await http.post(f"{url}/mcp", json=body, headers=headers)).text


async def test_an_older_client_that_declares_the_extension_all_the_same_is_given_no_handle(world: World) -> None:
    """The result type is unknown to its protocol."""
    async with Client(mcp_server(world.app(), remote=False), mode="legacy", extensions=[advertise(TASKS)]) as client:
        made = await client.call_tool("submit_task", ASKED)
        assert cast("dict[str, Any]", made.structured_content)["status"] == "queued"


async def test_a_client_that_holds_tasks_gets_the_finished_task_from_an_ordinary_call(
    installation: Installation,
) -> None:
    _, url = installation.start_server()
    installation.start_worker()
    holds = HoldsTasks()
    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60) as http:
        async with Client(streamable_http_client(f"{url}/mcp", http_client=http), extensions=[holds]) as client:
            with anyio.fail_after(90):
                done = await client.call_tool("submit_task", installation.arguments({"steps": 3}, {}))
    task = cast("dict[str, Any]", done.structured_content)
    assert not done.is_error and task["status"] == "completed" and holds.held == [task["task_id"]]


async def test_a_refused_submit_is_a_result_and_leaves_no_task(installation: Installation) -> None:
    _, url = installation.start_server()
    wire = Wire(url, ADMIN_KEY)
    for tool, arguments, code in (
        ("submit_task", {"prompt": ""}, "prompt_empty"),
        ("delegate", {"promt": "x"}, "unknown_argument"),
        ("delegate", {**ASKED, "tags": ["x"]}, "unknown_argument"),
        ("delegate", {}, "missing_argument"),
    ):
        refused = await wire.call(tool, arguments)
        assert refused["resultType"] == "complete" and refused["isError"]
        assert refused["structuredContent"]["code"] == code
    assert not installation.tasks()


async def test_the_routing_headers_say_what_the_body_says(installation: Installation) -> None:
    _, url = installation.start_server()
    wire = Wire(url, ADMIN_KEY)
    one, two = [(await wire.call("submit_task", ASKED))["taskId"] for _ in range(2)]
    for headers in ({"Mcp-Name": two}, {"Mcp-Name": None}, {"Mcp-Method": "tasks/cancel"}, {"Mcp-Method": None}):
        for method in ("tasks/get", "tasks/cancel"):
            if headers.get("Mcp-Method") != method:
                refused = await wire.ask(method, {"taskId": one}, headers=headers)
                assert refused["error"]["code"] == -32020, (method, headers)
    assert {task.status for task in installation.tasks().values()} == {TaskStatus.QUEUED}


# -- questions ---------------------------------------------------------------------------------------------------------


async def test_a_question_is_an_input_request_under_its_own_id_and_answered_once(installation: Installation) -> None:
    (_, one), (_, two) = installation.start_server(), installation.start_server()
    store, first, second = installation.store, Wire(one, ADMIN_KEY), Wire(two, ADMIN_KEY)
    task_id = (await first.call("submit_task", ASKED))["taskId"]
    attempt = claimed(store, task_id).attempt

    def ask(number: int) -> None:
        # The same words twice are two questions.
        question = Question(question_id=f"q_{number}", text="Which\x1b colour?", choices=("red", "blue"))
        store.tasks.follow(task_id, attempt, [], log_offset=number, lease_s=60, question=question)

    async def answer(key: str, action: str, **content: str) -> None:
        responses = {key: {"action": action, "content": content}}
        said = (await second.ask("tasks/update", {"taskId": task_id, "inputResponses": responses}))["result"]
        assert said.pop("_meta") and said == {"resultType": "complete"}

    def told() -> list[tuple[str, str | None]]:
        return [(message.text, message.answers) for message in store.tasks.signals(task_id, attempt).messages]

    async with second.listen(taskIds=[task_id]) as messages:
        await next_of(messages)
        ask(1)
        asked = (await next_of(messages))["params"]
    task = (await first.ask("tasks/get", {"taskId": task_id}))["result"]
    assert task["status"] == asked["status"] == "input_required" and task["inputRequests"] == asked["inputRequests"]
    ((key, request),) = task["inputRequests"].items()
    assert key == "q_1" and request["method"] == "elicitation/create" and request["params"]["mode"] == "form"
    assert "Which colour?" in request["params"]["message"]
    assert request["params"]["requestedSchema"]["properties"]["answer"]["enum"] == ["red", "blue"]
    await answer("q_0", "accept", answer="no")
    await answer("q_1", "cancel")
    assert not told()
    await answer("q_1", "accept", answer="blue")
    assert (await first.ask("tasks/get", {"taskId": task_id}))["result"]["status"] == "working"
    await answer("q_1", "accept", answer="red")  # answered already
    ask(2)
    await answer("q_1", "accept", answer="late")
    await answer("q_2", "decline")
    assert told() == [("blue", "q_1"), (DECLINED, "q_2")]


# -- delegate, for those who hold no tasks -----------------------------------------------------------------------------


@pytest.mark.full("sqlite-legacy", "postgres-auto")
@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_delegate_returns_at_the_end_and_tells_of_progress_meanwhile(
    installation: Installation, mode: Any
) -> None:
    _, url = installation.start_server()
    installation.start_worker()
    told: list[tuple[float, float | None, str | None]] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, total, message))

    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=120) as http:
        async with Client(streamable_http_client(f"{url}/mcp", http_client=http), mode=mode) as client:
            asked = installation.arguments({"steps": 30, "step_s": 0.2}, {})
            with anyio.fail_after(90):
                done = await client.call_tool("delegate", asked, progress_callback=note)
    task = cast("dict[str, Any]", done.structured_content)
    assert not done.is_error and task["status"] == "completed" and task["next_action"] and task["result"]
    assert told[0][2] == f"{task['task_id']} was submitted."
    assert [one[0] for one in told] == sorted({one[0] for one in told}), "progress only grows"
    assert any("running, agent" in (one[2] or "") for one in told)


async def test_the_progress_of_a_long_delegate_only_grows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudagent_mcp.operations.waiting.LOOK_EVERY_S", 2.5)
    app = world.app()
    told: list[float] = []

    async def note(progress: float, total: float | None, message: str | None) -> None:
        told.append(progress)

    async with Client(mcp_server(app, remote=False), mode="legacy") as client:
        with anyio.fail_after(60):
            async with anyio.create_task_group() as group:

                async def call() -> None:
                    await client.call_tool("delegate", ASKED, progress_callback=note)

                group.start_soon(call)
                while len(told) < 4:
                    await anyio.sleep(0.05)
                (task,) = app.store.tasks.list("local").tasks
                app.store.tasks.request_cancel("local", task.task_id)
    assert told == sorted(set(told))


async def delegated(client: Client, store: Store, then: Callable[[str, int], object]) -> CallToolResult:
    """The answer of a delegate whose task is claimed, and then has this happen to it: its id and attempt are told."""
    results: list[CallToolResult] = []

    async def call() -> None:
        results.append(await client.call_tool("delegate", ASKED))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(call)
            task_id = await anyio.to_thread.run_sync(lambda: until(lambda: store.tasks.due(waited_s=0), "queued")[0])
            then(task_id, claimed(store, task_id).attempt)
    return results[0]


@pytest.mark.parametrize("status", [TaskStatus.FAILED, TaskStatus.COMPLETED])
async def test_delegate_says_as_an_error_that_the_agent_failed(world: World, status: TaskStatus) -> None:
    app = world.app()
    async with Client(mcp_server(app, remote=False)) as client:

        def end(task_id: str, attempt: int) -> None:
            error = FAILED if status is TaskStatus.FAILED else None
            app.store.tasks.finish(task_id, attempt, status=status, error=error)

        result = await delegated(client, app.store, end)
        assert result.is_error is (status is TaskStatus.FAILED)
        assert cast("dict[str, Any]", result.structured_content)["status"] == status


async def test_a_delegate_that_is_cut_loses_nothing(installation: Installation) -> None:
    _, url = installation.start_server()
    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60) as http:
        async with Client(streamable_http_client(f"{url}/mcp", http_client=http)) as client:
            with anyio.move_on_after(3) as scope:
                await client.call_tool("delegate", ASKED)
    assert scope.cancelled_caught
    ((task_id, task),) = installation.tasks().items()
    assert task.status is TaskStatus.QUEUED
    installation.accepted.append(task_id)
    installation.start_worker()
    until(lambda: installation.task(task_id).status.terminal, "it ends", 60)


async def test_a_delegate_that_nears_the_clients_limit_says_how_to_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudagent_mcp.operations.delegation.WAIT_MAX_S", 1)
    async with Client(mcp_server(world.app(), remote=False), mode="legacy") as client:
        done = await client.call_tool("delegate", ASKED)
        task = cast("dict[str, Any]", done.structured_content)
        assert not done.is_error and task["status"] == "queued"
        assert task["next_action"] == f"Wait with get_task(task_id={task['task_id']!r}, wait_seconds=50)."


async def test_a_delegate_ends_when_the_agent_asks(world: World) -> None:
    app = world.app()
    async with Client(mcp_server(app, remote=False)) as client:
        result = await delegated(
            client, app.store, lambda task_id, attempt: ask_as(app.store, task_id, attempt, "Which?")
        )
        task = cast("dict[str, Any]", result.structured_content)
        assert task["status"] == "waiting" and task["question"] == "Which?" and "send_message" in task["next_action"]
