"""Bad input, each kind by its number: refused with a code and what to do next, and nothing is kept of it.

The numbers are those of the catalogue of bad inputs that this product was designed with; `ELSEWHERE` says where those
are tested that need more than one call to say.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from mcp import Client
from mcp.types import CallToolResult
from starlette.testclient import TestClient

from cloudagent_mcp.app import App
from cloudagent_mcp.server import http_app, mcp_server
from tests.support.worlds import World

pytestmark = pytest.mark.anyio

KEY = "a-key-for-the-tests"
HOST = "127.0.0.1:8420"
ANSWER_S = 20
"""Far more than any refusal takes; a busy machine is no failure."""

Case = tuple[int, str, dict[str, Any], str]
REPOSITORY = "https://example.com/x.git"


def submit(number: int, code: str, **given: Any) -> Case:
    return (number, "submit_task", {"prompt": "x", **given}, code)


def cron(number: int, line: str, code: str, **given: Any) -> Case:
    asked = {"name": "n", "cron": line, "task": {"prompt": "x", "repository": "none"}, **given}
    return (number, "create_schedule", asked, code)


NO_TASK = ("task_" + "a" * 26, "<other>", "<OTHER>", "task_x", "../../etc/passwd", "' OR 1=1 --", "")

TABLE: list[Case] = [
    (7, "submit_task", {"promt": "x"}, "unknown_argument"),
    (7, "get_task", {"task_id": "<queued>", "wait": "canary"}, "unknown_argument"),
    (7, "list_tasks", {"stauts": "queued"}, "unknown_argument"),
    (10, "submit_task", {}, "missing_argument"),
    submit(10, "prompt_empty", prompt=""),
    submit(10, "prompt_empty", prompt=" \n\t"),
    submit(10, "prompt_empty", prompt="\u200b\u200d\ufeff \u00ad"),
    submit(11, "prompt_too_long", prompt="x" * 100_001),
    submit(12, "invalid_character", prompt="a\0b"),
    submit(12, "invalid_character", tags=["a\0b"]),
    submit(15, "wrong_type", prompt=5),
    submit(15, "wrong_type", prompt=True),
    submit(15, "wrong_type", prompt={"canary": "x"}),
    submit(15, "wrong_type", prompt=None),
    *(
        submit(16, "repository_not_allowed", repository=address)
        for address in ("ext::sh -c id", "-oProxyCommand=canary", "--upload-pack=canary", "http://example.com/canary")
    ),
    submit(20, "credentials_in_url", repository="https://me:canary@example.com/x.git"),
    *(
        submit(21, "invalid_ref", repository=REPOSITORY, base_ref=ref)
        for ref in ("-canary", "canary..b", "canary@{1}", "c" * 300, "a b", "a\\b", "")
    ),
    submit(21, "invalid_input", repository="none", base_ref="main"),
    submit(22, "repository_not_found", repository="/canary/is/not/there"),
    *(submit(24, "out_of_range", timeout_minutes=value) for value in (-1, 0, 1441, 1e9)),
    submit(24, "wrong_type", timeout_minutes="canary"),
    submit(24, "wrong_type", timeout_minutes=True),
    *(submit(25, "out_of_range", max_budget_usd=value) for value in (-5, 0, 1e308)),
    submit(25, "out_of_range", max_turns=0),
    submit(25, "wrong_type", max_turns=1.5),
    submit(26, "out_of_range", model=""),
    submit(26, "out_of_range", model="m" * 101),
    *(submit(26, "out_of_range", best_of=value) for value in (0, -1, 9)),
    submit(26, "wrong_type", best_of="3"),
    submit(26, "wrong_type", best_of=1.5),
    submit(26, "out_of_range", models=["m"] * 9),
    submit(26, "out_of_range", models=["canary", " "]),
    submit(26, "out_of_range", models=["m" * 101]),
    submit(26, "wrong_type", models="canary"),
    submit(26, "out_of_range", best_of=2, models=["canary", "b", "c"]),
    submit(26, "invalid_input", model="canary", models=["a", "b"]),
    submit(26, "invalid_input", provider="local", providers=["local"]),
    submit(26, "unknown_provider", providers=["canary"]),
    submit(26, "invalid_input", cancel_losers=True, verify="true"),
    submit(26, "invalid_input", cancel_losers=True, best_of=2, repository="none"),
    submit(30, "idempotency_mismatch", prompt="other", idempotency_key="taken"),
    submit(31, "out_of_range", idempotency_key=""),
    submit(31, "out_of_range", idempotency_key="k" * 300),
    *((34, "get_task", {"task_id": name}, "task_not_found") for name in NO_TASK),
    *((34, "get_task_logs", {"task_id": name}, "task_not_found") for name in NO_TASK),
    *((34, "get_task_diff", {"task_id": name}, "task_not_found") for name in NO_TASK),
    *((34, "cancel_task", {"task_id": name}, "task_not_found") for name in NO_TASK),
    *((34, "apply_task", {"task_id": name}, "task_not_found") for name in NO_TASK),
    *((34, "retry_task", {"task_id": name}, "task_not_found") for name in NO_TASK),
    *(
        (34, "comment_task", {"task_id": name, "comments": [{"file": "x", "text": "y"}]}, "task_not_found")
        for name in NO_TASK
    ),
    *((34, "wait_tasks", {"task_ids": [name]}, "task_not_found") for name in NO_TASK),
    (34, "get_task", {"task_id": "canary" * 2000}, "out_of_range"),
    (34, "get_schedule", {"schedule_id": "sch_" + "a" * 26}, "schedule_not_found"),
    (34, "run_schedule", {"schedule_id": "../canary"}, "schedule_not_found"),
    (34, "delete_schedule", {"schedule_id": "task_x"}, "schedule_not_found"),
    *((36, "get_task", {"task_id": "<queued>", "wait_seconds": value}, "out_of_range") for value in (100_000, 51, -1)),
    (36, "wait_tasks", {"task_ids": ["<queued>"], "timeout_seconds": 51}, "out_of_range"),
    (36, "wait_tasks", {"task_ids": []}, "out_of_range"),
    (36, "wait_tasks", {"task_ids": ["<queued>"], "mode": "canary"}, "out_of_range"),
    *((40, "get_task_logs", {"task_id": "<queued>", "limit": value}, "out_of_range") for value in (-1, 0, 2**63)),
    (40, "get_task_logs", {"task_id": "<queued>", "limit": "10"}, "wrong_type"),
    *((40, "list_tasks", {"limit": value}, "out_of_range") for value in (-1, 0, 101)),
    *((41, "get_task_logs", {"task_id": "<queued>", "after": value}, "out_of_range") for value in (-1, 2**63)),
    (41, "list_tasks", {"cursor": "canary"}, "invalid_cursor"),
    (44, "get_task_logs", {"task_id": "<queued>", "filter": "(a+)+$"}, "unknown_argument"),
    (44, "get_task_logs", {"task_id": "<queued>", "kinds": ["canary"]}, "out_of_range"),
    (44, "list_tasks", {"status": "canary"}, "out_of_range"),
    (45, "apply_task", {"task_id": "<queued>"}, "not_ready"),
    (45, "get_task_diff", {"task_id": "<queued>"}, "not_ready"),
    (45, "apply_task", {"task_id": "<cancelled>"}, "no_changes"),
    (45, "retry_task", {"task_id": "<queued>"}, "not_ready"),
    (45, "comment_task", {"task_id": "<cancelled>", "comments": [{"file": "canary", "text": "x"}]}, "no_changes"),
    (10, "comment_task", {"task_id": "<queued>", "comments": [{"file": "x"}]}, "missing_argument"),
    (7, "comment_task", {"task_id": "<queued>", "comments": [{"file": "x", "canary": "y"}]}, "missing_argument"),
    *(
        (34, tool, {"task_id": "<queued>", "candidate": value}, code)
        for tool in ("get_task_diff", "apply_task")
        for value, code in ((0, "out_of_range"), (9, "out_of_range"), ("1", "wrong_type"), (1, "invalid_input"))
    ),
    *(cron(53, line, "invalid_cron") for line in ("", "60 * * * *", "* * * *", "*/0 * * * *", "canary", "* " * 2500)),
    cron(54, "0 0 30 2 *", "never_fires"),
    cron(54, "@hourly", "invalid_cron"),
    cron(54, "0 0 1 1 * *", "invalid_cron"),
    cron(55, "* * * * *", "too_frequent"),
    cron(55, "0 3 * * *", "unknown_timezone", timezone="Mars/X"),
    cron(55, "0 3 * * *", "unknown_argument", task={"promt": "x"}),
    cron(55, "0 3 * * *", "out_of_range", name=""),
    submit(56, "unknown_argument", webhook_url="http://169.254.169.254/canary"),
    # Beyond the catalogue: what this product takes and others do not.
    submit(0, "out_of_range", tags=["", "a"]),
    submit(0, "unknown_provider", provider="canary"),
    submit(0, "unknown_provider", provider="unsafe-process"),
    submit(0, "invalid_egress", egress=["http://canary.example/"]),
    submit(0, "invalid_egress", egress=["127.0.0.1:5432"]),
    submit(0, "out_of_range", on_interrupt="canary"),
    submit(0, "out_of_range", priority="canary"),
]

ELSEWHERE = {
    1: "test_an_unknown_method_is_answered_and_not_crashed_on",
    2: "test_garbage_on_the_mcp_route_is_refused_and_the_server_lives",
    3: "test_garbage_on_the_mcp_route_is_refused_and_the_server_lives",
    4: "test_an_unknown_tool_is_refused_and_no_other_is_called",
    5: "test_whatever_is_wrong_with_a_key_the_answer_is_the_same",
    6: "test_the_queue_is_for_operators_only",
    8: "test_a_body_that_is_no_json_object_is_refused",
    9: "test_arguments_that_are_no_object_are_refused",
    13: "test_half_a_surrogate_pair_is_refused",
    14: "test_text_that_hides_or_turns_is_taken_and_shown_without_it",
    17: "test_from_elsewhere_no_host_of_this_machines_own_network_can_be_named",
    18: "test_the_reason_is_told_when_a_remote_cannot_be_reached",
    19: "test_an_empty_remote_is_refused",
    23: "test_too_much_is_refused",
    27: "test_without_a_credential_submit_is_refused_and_nothing_is_kept",
    28: "test_a_rejected_credential_fails_at_once_with_the_remedy",
    29: "test_a_submit_that_is_repeated_with_its_key_is_the_same_task",
    32: "test_a_worker_runs_no_more_of_an_account_than_it_may",
    33: "test_a_tasks_secrets_are_found_nowhere",
    35: "test_rest_says_that_the_material_of_an_expired_task_is_gone",
    37: "test_cancelling_twice_says_that_nothing_changed",
    38: "test_fifty_cancels_at_once_change_one_thing",
    39: "test_a_cancel_leads_to_one_end_while_workers_are_killed",
    42: "test_the_log_of_a_task_that_waits_is_its_beginning",
    43: "test_what_a_database_cannot_keep_is_replaced",
    46: "test_a_result_that_is_there_already_is_not_applied_again",
    47: "test_a_dirty_file_is_a_conflict_even_where_a_merge_would_work",
    48: "test_only_the_repository_that_the_task_started_from_will_do",
    49: "test_of_a_hostile_result",
    50: "test_sensitive_files_are_written_only_when_each_is_named",
    52: "test_two_applies_to_one_directory_do_not_meet",
}
NOT_OURS = {
    51: "a preview has no token: each sensitive file is named anew",
    57: "there are no webhooks that come in",
    58: "no session is taken from a caller",
}


def test_every_number_of_the_catalogue_is_tested_somewhere() -> None:
    here = {number for number, *_ in TABLE}
    assert here - {0} | ELSEWHERE.keys() | NOT_OURS.keys() == set(range(1, 59))
    root = Path(__file__).parents[1]
    written = "\n".join(path.read_text() for path in root.rglob("test_*.py"))
    assert [name for name in ELSEWHERE.values() if f"def {name}(" not in written] == []


class Door:
    """An installation with a few tasks, and the way in."""

    def __init__(self, app: App, home: Path, mcp: Client, ids: dict[str, str]) -> None:
        self.app = app
        self.mcp = mcp
        self._home = home
        self.ids = ids

    async def call(self, tool: str, arguments: dict[str, Any]) -> CallToolResult:
        with anyio.fail_after(ANSWER_S):
            return await self.mcp.call_tool(tool, self._filled(arguments))

    def _filled(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._filled(item) for key, item in cast("dict[str, Any]", value).items()}
        if isinstance(value, list):
            return [self._filled(item) for item in cast("list[Any]", value)]
        return self.ids.get(value, value) if isinstance(value, str) else value

    def everything(self) -> list[str]:
        """All that the database holds."""
        with sqlite3.connect(self._home / "cloudagent.db") as database:
            return list(database.iterdump())

    async def assert_refused(self, tool: str, arguments: dict[str, Any], code: str) -> None:
        before = self.everything()
        result = await self.call(tool, arguments)
        asked = (tool, arguments)
        assert result.is_error, asked
        error = structured(result)
        assert error["code"] == code, asked
        assert error["detail"].endswith(".") and error["remedy"], asked
        text = result.model_dump_json()
        for told in ("Traceback", str(self._home), "canary", "etc/passwd", "OR 1=1", "169.254"):
            assert told.lower() not in text.lower(), asked
        assert self.everything() == before, asked


def structured(result: CallToolResult) -> dict[str, Any]:
    return cast("dict[str, Any]", result.structured_content)


@pytest.fixture
async def door(world: World) -> AsyncGenerator[Door]:
    app = world.app()
    async with Client(mcp_server(app, remote=False)) as mcp:

        async def submit(**given: Any) -> str:
            result = await mcp.call_tool("submit_task", {"prompt": "Do it.", "repository": "none", **given})
            return structured(result)["task_id"]

        ids = {"<queued>": await submit(idempotency_key="taken"), "<cancelled>": await submit()}
        await mcp.call_tool("cancel_task", {"task_id": ids["<cancelled>"]})
        app.store.accounts.ensure("other")
        other = app.operations["submit_task"]
        theirs = await other.call(app.remote_caller("other"), {"prompt": "Theirs.", "repository": "none"})
        ids |= {"<other>": theirs.task_id, "<OTHER>": theirs.task_id.upper()}
        yield Door(app, world.home, mcp, ids)


@pytest.mark.parametrize("number", sorted({number for number, *_ in TABLE}))
async def test_bad_input_over_mcp_is_a_result_that_the_model_can_mend(door: Door, number: int) -> None:
    for _, tool, arguments, code in (case for case in TABLE if case[0] == number):
        await door.assert_refused(tool, arguments, code)


@pytest.fixture
def rest(world: World) -> Generator[TestClient]:
    app = http_app(world.app(), key=KEY, host="127.0.0.1", port=8420)
    headers = {"Authorization": f"Bearer {KEY}", "Host": HOST}
    with TestClient(app, base_url=f"http://{HOST}", headers=headers) as client:
        yield client


async def test_bad_input_over_rest_is_refused_with_the_same_code(rest: TestClient) -> None:
    for _, tool, arguments, code in TABLE:
        if tool != "submit_task" or arguments.get("idempotency_key") == "taken":
            continue
        # From elsewhere, no folder of this machine may be named at all.
        expected = "repository_not_allowed" if code == "repository_not_found" else code
        response = rest.post("/api/v1/tasks", json=arguments)
        assert response.headers["content-type"] == "application/problem+json", arguments
        assert (response.json()["code"], response.status_code) == (expected, 422), arguments
    assert rest.get("/api/v1/tasks").json()["total"] == 0


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b'{"prompt": "x", "prompt": "y"}', "invalid_json"),
        (b'{"prompt": "x", "max_budget_usd": NaN}', "invalid_json"),
        (b'{"prompt": "x", "max_turns": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"[" * 50_000, "invalid_json"),
        (b"[]", "wrong_type"),
        (b"\xff", "invalid_json"),
        (b'{"prompt": "' + b"x" * 4_200_000 + b'"}', "out_of_range"),
    ],
)
async def test_a_body_that_is_no_json_object_is_refused(rest: TestClient, body: bytes, code: str) -> None:
    response = rest.post("/api/v1/tasks", content=body)
    assert response.json()["code"] == code
    assert rest.get("/health").status_code == 200


ERAS = ("2026-07-28", "2025-11-25")


def message(era: str, method: str, params: Any) -> dict[str, Any]:
    """A request as a client of that era sends it."""
    if era == ERAS[0] and isinstance(params, dict):
        about: dict[str, Any] = {"protocolVersion": era, "clientInfo": {"name": "x", "version": "1"}}
        about["clientCapabilities"] = {}
        params = {
            **cast("dict[str, Any]", params),
            "_meta": {f"io.modelcontextprotocol/{name}": value for name, value in about.items()},
        }
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


def send(rest: TestClient, era: str, method: str, params: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    """The status, and the answer's JSON-RPC message."""
    names: dict[str, str] = {"Mcp-Method": method}
    if isinstance(params, dict) and isinstance(name := cast("dict[str, Any]", params).get("name"), str):
        names["Mcp-Name"] = name
    accepts = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": era, **names, **headers}
    response = rest.post("/mcp", json=message(era, method, params), headers=accepts)
    assert "Traceback" not in response.text
    data = response.text.partition("data: ")[2] or response.text
    return response.status_code, json.loads(data)


@pytest.mark.parametrize("era", ERAS)
async def test_an_unknown_method_is_answered_and_not_crashed_on(rest: TestClient, era: str) -> None:
    _, answer = send(rest, era, "nonsense/method", {})
    assert answer["error"]["code"] == -32601


@pytest.mark.parametrize("era", ERAS)
async def test_an_unknown_tool_is_refused_and_no_other_is_called(rest: TestClient, era: str) -> None:
    _, answer = send(rest, era, "tools/call", {"name": "submit_tusk", "arguments": {"prompt": "x"}})
    assert answer.get("error", {}).get("code") == -32602 or answer["result"]["isError"]
    assert rest.get("/api/v1/tasks").json()["total"] == 0


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("arguments", [[], ["x"], "canary", 5, True])
async def test_arguments_that_are_no_object_are_refused(rest: TestClient, era: str, arguments: Any) -> None:
    _, answer = send(rest, era, "tools/call", {"name": "submit_task", "arguments": arguments})
    assert answer.get("error", {}).get("code") == -32602 or answer["result"]["isError"]
    assert "canary" not in json.dumps(answer)
    assert rest.get("/api/v1/tasks").json()["total"] == 0


@pytest.mark.parametrize("era", ERAS)
async def test_half_a_surrogate_pair_is_refused(rest: TestClient, era: str) -> None:
    body = json.dumps(message(era, "tools/call", {"name": "submit_task", "arguments": {"prompt": "SURROGATE"}}))
    headers = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": era}
    headers |= {"Mcp-Method": "tools/call", "Mcp-Name": "submit_task", "Content-Type": "application/json"}
    response = rest.post("/mcp", content=body.replace("SURROGATE", "a\\ud800b"), headers=headers)
    assert response.status_code == 400 or "invalid_unicode" in response.text, response.text
    assert "Traceback" not in response.text
    assert rest.get("/api/v1/tasks").json()["total"] == 0


async def test_text_that_hides_or_turns_is_taken_and_shown_without_it(door: Door) -> None:
    hidden = "Fix \u202egnp.exe\u2066 now\U000e0041\u200b\x1b[31m"
    submitted = await door.call("submit_task", {"prompt": hidden, "title": hidden, "repository": "none"})
    assert not submitted.is_error
    task_id = structured(submitted)["task_id"]
    for tool, given in (
        ("get_task", {"task_id": task_id}),
        ("list_tasks", {}),
        ("get_task_logs", {"task_id": task_id}),
    ):
        shown = (await door.call(tool, given)).model_dump_json()
        assert not any(json.dumps(c)[1:-1] in shown or c in shown for c in "\u202e\u2066\U000e0041\u200b\x1b"), tool


async def test_fifty_cancels_at_once_change_one_thing(door: Door) -> None:
    changed: list[bool] = []

    async def cancel() -> None:
        result = await door.call("cancel_task", {"task_id": door.ids["<queued>"]})
        assert structured(result)["status"] == "cancelled"
        changed.append(structured(result)["changed"])

    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(cancel)
    assert sorted(changed) == [False] * 49 + [True]


async def test_the_log_of_a_task_that_waits_is_its_beginning(door: Door) -> None:
    given = {"task_id": door.ids["<queued>"]}
    first = await door.call("get_task_logs", given)
    assert not first.is_error and "more=false" in first.content[0].text  # pyright: ignore
    past = await door.call("get_task_logs", {**given, "after": 1000})
    assert past.content[0].text == f"task_id={given['task_id']} next_after=1000 more=false\nNo lines."  # pyright: ignore


ROUTES = ("/", "/health", "/mcp", "/mcp/", "/api/v1", "/api/v1/tasks", "/api/v1/nothing", "/nothing")
FOREIGN = [
    ({"Host": "evil.example"}, 421),
    ({"Host": "evil.example:8420"}, 421),
    ({"Host": f"{HOST}.evil.example"}, 421),
    ({"Host": ""}, 421),
    ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": f"http://{HOST}.evil.example"}, 403),
    ({"Origin": f"http://{HOST}@evil.example"}, 403),
]


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS"])
async def test_a_foreign_host_or_origin_is_refused_on_every_route(rest: TestClient, method: str, era: str) -> None:
    given: dict[str, Any] = {"json": message(era, "tools/list", {})} if method == "POST" else {}
    for path in ROUTES:
        for headers, status in FOREIGN:
            sent = {"MCP-Protocol-Version": era, "Mcp-Method": "tools/list", **headers}
            response = rest.request(method, path, headers=sent, **given)
            assert response.status_code == status, (path, headers)
            assert "access-control-allow-origin" not in response.headers
            assert "evil" not in response.text


@pytest.mark.parametrize("era", ERAS)
async def test_its_own_origin_is_let_in(rest: TestClient, era: str) -> None:
    status, answer = send(rest, era, "tools/list", {}, Origin=f"http://{HOST}")
    assert status == 200 and answer["result"]["tools"]
    assert rest.get("/api/v1/tasks", headers={"Origin": f"http://{HOST}"}).status_code == 200
