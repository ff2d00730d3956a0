"""Accounts on one running server: what is another's looks like what is not there; a revoked key is out in seconds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cloudagent_mcp import __version__
from cloudagent_mcp.api_keys import create_key
from cloudagent_mcp.app import App
from cloudagent_mcp.embedded import only_worker
from cloudagent_mcp.operations import Operation
from cloudagent_storage.records import TaskSpec, new_id
from tests.support.worlds import World, until

ADMIN = "a-key-for-the-tests"
CANARY = "sk-ant-canary/0123+4567=89%AB"


@dataclass
class Server:
    """A running server, and where it writes what it has to say."""

    url: str
    log: Path
    pid: int

    def rest(self, token: str, method: str, path: str, **more: Any) -> httpx2.Response:
        return httpx2.request(method, f"{self.url}/api/v1{path}", headers=bearer(token), timeout=30, **more)

    def tool(self, token: str, name: str, arguments: Any) -> str:
        """What a tool answers over streamable HTTP, as it goes over the wire."""
        headers = bearer(token) | {
            "Accept": "application/json, text/event-stream",
            "MCP-Protocol-Version": "2025-06-18",
        }
        call: dict[str, Any] = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
        call["params"] = {"name": name, "arguments": arguments}
        return httpx2.post(f"{self.url}/mcp", json=call, headers=headers, timeout=30).text


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def server(world: World) -> Generator[Server]:
    """It looks as if a worker ran, so that tasks stay queued."""
    log = world.home / "server.log"
    with only_worker(world.home, version=__version__), log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "cloudagent_mcp", "serve", "--port", "0"],
            env={**world.environment, "ADMIN_API_KEY": ADMIN},
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        assert process.stdout is not None
        with process.stdout as printed:
            yield Server(printed.readline().split("MCP at ")[1].split("/mcp ")[0], log, process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) in (0, -signal.SIGTERM)


def key(app: App, account_id: str) -> str:
    return create_key(app.store, app.settings.keyring, name="x", account_id=account_id)[1]


def required(operation: Operation) -> dict[str, Any]:
    """A value for every argument without which the operation is not called, but its ids."""

    def value(schema: dict[str, Any]) -> Any:
        match schema.get("type", "string"):
            case "array":
                return [value(schema["items"])]
            case "object":
                return {name: value(schema["properties"][name]) for name in schema.get("required", ())}
            case kind:
                return {"string": "x", "integer": 1, "number": 1, "boolean": True}[kind]

    properties = operation.schema["properties"]
    return {name: value(properties[name]) for name in operation.schema.get("required", [])}


def ids(operation: Operation) -> list[str]:
    return [name for name in operation.arguments.model_fields if name.endswith(("_id", "_ids"))]


def test_another_accounts_id_is_answered_byte_by_byte_like_an_unknown_one(server: Server, world: World) -> None:
    app = world.app()
    mine, theirs = key(app, "team-a"), key(app, "team-b")
    owned = app.store.tasks.add("team-b", TaskSpec(prompt="Secret plan", title="Secret"), blobs={"input": b"x"}).task_id
    app.store.schedules.add(
        "team-b",
        schedule_id=(schedule := new_id("sch")),
        name="secret",
        cron="0 0 1 1 *",
        timezone="UTC",
        spec=TaskSpec(prompt="Secret plan", title="Secret"),
        credentials=None,
        next_due_at=datetime(2100, 1, 1, tzinfo=UTC),
    )
    tried = 0
    for operation in app.operations.values():
        for argument in ids(operation):
            whole = argument.endswith("_ids")
            answers: list[tuple[Any, ...]] = []
            of_schedule = argument == "schedule_id"
            for found in (schedule, new_id("sch")) if of_schedule else (owned, new_id("task")):
                arguments = required(operation) | {argument: [found] if whole else found}
                path = operation.marked.path.format(**arguments)
                rest = {name: value for name, value in arguments.items() if f"{{{name}}}" not in operation.marked.path}
                sent: dict[str, Any] = {"params" if operation.marked.method == "GET" else "json": rest}
                over_rest = server.rest(mine, operation.marked.method, path, **sent)
                over_mcp = server.tool(mine, operation.name, arguments) if operation.marked.tool else None
                assert over_mcp is None or '"result"' in over_mcp, over_mcp
                if argument in operation.schema.get("required", []):
                    assert over_rest.status_code == 404, (operation.name, over_rest.text)
                    refused = over_mcp or '"isError":true, not_found'
                    assert '"isError":true' in refused.replace(" ", "") and "not_found" in refused, over_mcp
                headers = {name: value for name, value in over_rest.headers.items() if name != "date"}
                answers.append((over_rest.content, headers, over_mcp))
            assert answers[0] == answers[1], (operation.name, argument)
            assert "Secret" not in str(answers)
            tried += 1
    assert tried >= 6
    bundles = {
        server.rest(mine, "GET", f"/tasks/{found}/bundle?kind=input").content for found in (owned, new_id("task"))
    }
    assert len(bundles) == 1 and b"task_not_found" in bundles.pop()
    assert server.rest(theirs, "GET", f"/tasks/{owned}").json()["title"] == "Secret"
    assert not app.store.tasks.get("team-b", owned).status.terminal


def test_an_account_sees_its_own_tasks_alone_in_every_list(server: Server, world: World) -> None:
    app = world.app()
    tokens = {"team-a": key(app, "team-a"), "team-b": key(app, "team-b"), "local": ADMIN}
    made = {
        name: server.rest(token, "POST", "/tasks", json={"prompt": "x", "tags": ["same"]}).json()["task_id"]
        for name, token in tokens.items()
    }
    for name, token in tokens.items():
        for query in ("", "?tag=same", "?status=queued", "?limit=100&offset=0"):
            page = server.rest(token, "GET", f"/tasks{query}").json()
            assert ([task["task_id"] for task in page["tasks"]], page["total"]) == ([made[name]], 1)
        assert [other for other in made.values() if other in server.tool(token, "list_tasks", {})] == [made[name]]
    foreign = server.rest(tokens["team-a"], "GET", "/tasks?limit=1").json()["next_cursor"]
    assert foreign is None


def test_an_idempotency_key_is_an_accounts_own(server: Server, world: World) -> None:
    app = world.app()
    asked = {"prompt": "x", "idempotency_key": "same"}
    answers = [server.rest(key(app, name), "POST", "/tasks", json=asked).json() for name in ("team-a", "team-b")]
    assert [answer["replayed"] for answer in answers] == [False, False]
    assert answers[0]["task_id"] != answers[1]["task_id"]


def test_a_revoked_key_is_out_within_five_seconds_on_a_running_server(server: Server, world: World) -> None:
    def ca(*words: str) -> Any:
        command = [sys.executable, "-m", "cloudagent_mcp", "key", *words, "--json"]
        done = subprocess.run(command, env=world.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    made = ca("create", "laptop", "--account", "team-a")
    token = made["token"]
    assert server.rest(token, "GET", "/tasks").status_code == 200
    assert ca("list")["keys"][0]["last_used_at"]
    ca("revoke", made["key_id"][:10])
    revoked = time.monotonic()
    until(lambda: server.rest(token, "GET", "/tasks").status_code == 401, "the key is refused", 10)
    assert time.monotonic() - revoked < 5
    secret = token.split("_", 2)[2].encode()
    for file in (server.log, *world.home.glob("cloudagent.db*")):
        assert secret not in file.read_bytes()


def test_an_idle_server_asks_the_database_nothing(server: Server, world: World) -> None:
    token = key(world.app(), "team-a")
    assert server.rest(token, "GET", "/tasks").status_code == 200
    database = world.home / "cloudagent.db"

    def quiet() -> bool:
        def touched() -> tuple[int, int, str]:
            files = (database.stat().st_mtime_ns, Path(f"{database}-wal").stat().st_mtime_ns)
            return *files, Path(f"/proc/{server.pid}/io").read_text()

        before = touched()
        time.sleep(2.5)  # longer than a key is remembered: it is silence that is looked at
        return touched() == before

    until(quiet, "the server neither reads nor writes", 20)


@pytest.mark.parametrize("argument", ["anthropic_api_key", "github_token"])
def test_a_credential_that_cannot_be_one_is_refused_and_not_echoed(server: Server, argument: str) -> None:
    bad: list[Any] = [
        [CANARY],
        {"key": CANARY},
        CANARY + "\n",
        CANARY + " x",
        CANARY * 100,
        CANARY + "\0",
        CANARY + "ä",
    ]
    for value in [*bad, CANARY + "\ud800", 12345678987654321, ""]:
        body = json.dumps({"prompt": "x", argument: value}).encode()
        over_rest = server.rest(ADMIN, "POST", "/tasks", content=body)
        assert over_rest.status_code == 422 and over_rest.json()["field"] == argument, over_rest.text
        if "\ud800" not in str(value):
            over_mcp = server.tool(ADMIN, "submit_task", {"prompt": "x", argument: value})
            assert "isError" in over_mcp
            assert CANARY not in over_mcp and "12345678987654321" not in over_mcp
        assert CANARY not in over_rest.text and "12345678987654321" not in over_rest.text
    near = server.rest(ADMIN, "POST", "/tasks", json={"prompt": "x", f"{argument}s": CANARY})
    assert near.json()["code"] == "unknown_argument" and CANARY not in near.text
    for broken in (CANARY, [CANARY]):
        answer = server.tool(ADMIN, "submit_task", broken)
        assert "error" in answer
    assert CANARY not in server.log.read_text()
    assert server.rest(ADMIN, "GET", "/tasks").json()["total"] == 0


def test_a_changed_credential_is_no_other_submit(server: Server, world: World) -> None:
    asked = {"prompt": "x", "idempotency_key": "once"}
    first = server.rest(ADMIN, "POST", "/tasks", json={**asked, "anthropic_api_key": CANARY}).json()
    for more in ({}, {"anthropic_api_key": "sk-another-one"}, {"github_token": "ghp_something"}):
        again = server.rest(ADMIN, "POST", "/tasks", json={**asked, **more}).json()
        assert (again["task_id"], again["replayed"]) == (first["task_id"], True)
    for file in (server.log, *world.home.glob("*.db*")):
        assert not any(secret in file.read_bytes() for secret in (CANARY.encode(), b"sk-another-one", b"ghp_something"))
