"""Two secrets go through a task whose agent tells all that it knows; afterwards they are looked for everywhere."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from mcp import Client
from starlette.testclient import TestClient

from cloudagent_mcp.operations.credentials import Credentials
from cloudagent_mcp.scripted_model import Rule, ScriptedModel, Text, ToolUse, Turn
from cloudagent_mcp.server import http_app, mcp_server
from cloudagent_storage.records import LOCAL_ACCOUNT
from tests.support.git_server import git_server
from tests.support.worlds import World, git, make_repository, until

KEY = "sk-ant-canary/0123+4567=89%AB"
TOKEN = "ghp_canary/9876+5432=10%CD"
ADMIN = "a-key-for-the-tests"
HOST = "127.0.0.1:8420"

TELL = """python3 - <<'END'
import base64, os, urllib.parse
key = os.environ["ANTHROPIC_API_KEY"]
told = [key, base64.b64encode(key.encode()).decode(), key.encode().hex(), urllib.parse.quote(key, safe="")]
print("told:", *told)
open("told.txt", "w").write("\\n".join(told))
open("environment.bin", "w").write(repr(dict(os.environ)))
END
env; cat .git/config; git config --list; cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'"""


def forms(secret: str) -> list[bytes]:
    """A secret as tools write it."""
    raw = secret.encode()
    encoded = base64.b64encode(raw).decode().rstrip("=")
    return [form.encode() for form in (secret, quote(secret, safe=""), raw.hex(), encoded[:-1])]


FORMS = [*forms(KEY), *forms(TOKEN), *forms(f"x-access-token:{TOKEN}")]


def assert_nowhere(where: str, data: bytes | str) -> None:
    data = data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape")
    assert not [form for form in FORMS if form in data], where


@contextmanager
def watched_processes(seen: set[str]) -> Generator[None]:
    """Every command line of this machine, as anybody on it sees them, for as long as the block lasts."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            for process in psutil.process_iter():
                try:
                    seen.add(" ".join(process.cmdline()))
                except psutil.Error:
                    continue

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


STARTS_TASKS = (
    "submit_task", "delegate", "retry_task", "verify_task", "comment_task", "create_schedule", "run_schedule",
)  # fmt: skip


@pytest.mark.anyio
async def test_a_tasks_secrets_are_found_nowhere(world: World, tmp_path: Path) -> None:
    private = tmp_path / "private"
    work = make_repository(private / "work")
    git(private, "clone", "-q", "--bare", str(work), "shop.git")
    said = " ".join(form.decode() for form in FORMS)
    tell = Rule(
        prompt="Tell all",
        turns=(
            Turn(blocks=(ToolUse(name="Bash", input={"command": TELL, "description": "Tell"}),)),
            Turn(blocks=(ToolUse(name="Write", input={"file_path": "{{cwd}}/said.txt", "content": said}),)),
            Turn(blocks=(Text(text=f"All that I know: {said}"),)),
        ),
    )
    commands: set[str] = set()
    with (
        ScriptedModel([tell]) as model,
        git_server(tmp_path / "tls", {TOKEN: private}) as server,
        watched_processes(commands),
    ):
        world = world.with_model(model.environment())
        server.trusted_by(Path(world.environment["HOME"]))
        app = world.app()
        app.__dict__["credentials"] = Credentials(github_host=server.host)
        rest_app = http_app(app, key=ADMIN, host="127.0.0.1", port=8420)
        with TestClient(rest_app, base_url=f"http://{HOST}", headers={"Authorization": f"Bearer {ADMIN}"}) as rest:
            asked: dict[str, Any] = {"prompt": "Tell all", "repository": server.address("shop.git"), "verify": "env"}
            asked |= {"anthropic_api_key": KEY, "github_token": TOKEN, "idempotency_key": "once"}
            # From this machine: somebody elsewhere may not name a host on loopback; but repeat it, they may.
            async with Client(mcp_server(app, remote=False)) as mcp:
                submitted = await mcp.call_tool("submit_task", asked)
                assert not submitted.is_error, submitted.content
                assert_nowhere("submit_task", submitted.model_dump_json())
            answers = [rest.post("/api/v1/tasks", json=asked)]
            task_id = answers[0].json()["task_id"]
            world.start_worker()
            task = until(
                lambda: (found := rest.get(f"/api/v1/tasks/{task_id}")).json()["completed_at"] and found.json(),
                "the task ends",
                60,
            )
            assert (task["status"], task["verdict"]) == ("completed", "passed"), task
            assert {request.key for request in model.requests if request.key} == {KEY}
            kept_for_later = {"prompt": "Tell all", "anthropic_api_key": KEY, "github_token": TOKEN}
            schedule = {"name": "yearly", "cron": "0 0 1 1 *", "task": kept_for_later}
            answers.append(rest.post("/api/v1/schedules", json=schedule))
            arguments: dict[str, Any] = {"task_id": task_id, "schedule_id": answers[-1].json()["schedule_id"]}
            for operation in app.operations.values():
                if operation.name in (*STARTS_TASKS, "send_message", "apply_tasks"):  # its task has ended
                    continue
                path = operation.marked.path.format(**arguments)
                given = {"task_ids": [task_id]} if operation.name == "wait_tasks" else {}
                if operation.marked.method == "GET":
                    answers.append(rest.get(f"/api/v1{path}", params={"raw": True} if path.endswith("logs") else {}))
                elif operation.name != "delete_schedule":
                    answers.append(rest.request(operation.marked.method, f"/api/v1{path}", json=given))
        for answer in answers:
            assert answer.is_success, answer.text
            assert_nowhere(str(answer.url), answer.text)
        assert "[redacted]" in answers[-1].text or any("[redacted]" in answer.text for answer in answers)
        async with Client(mcp_server(app, remote=False)) as mcp:
            for operation in app.operations.values():
                named = {name: arguments[name] for name in arguments if name in operation.schema.get("required", ())}
                given = {"task_ids": [task_id]} if operation.name in ("wait_tasks", "apply_tasks") else named
                if operation.name not in STARTS_TASKS:
                    answer = await mcp.call_tool(operation.name, given)
                    # Nothing is written: where this test runs is no working tree of the task's.
                    refused = operation.name in ("apply_task", "apply_tasks", "send_message")
                    assert answer.is_error == refused, (operation.name, answer.content)
                    assert_nowhere(operation.name, answer.model_dump_json())

        # What the agent told is there, but for the secrets; git's token it never had.
        log = json.dumps([line.message for line in app.store.events.list(LOCAL_ACCOUNT, task_id, limit=1000).lines])
        assert log.count("[redacted]") >= 6 and "told:" in log
        result = app.store.blobs.get(LOCAL_ACCOUNT, task_id, "result")
        assert result is not None
        (work / "result.bundle").write_bytes(result)
        git(work, "fetch", "-q", "result.bundle", f"{task['branch']}:told")
        environment = git(work, "show", "told:environment.bin")
        assert KEY in environment  # so that what follows is no accident
        assert not [form for form in [*forms(TOKEN), *forms(f"x-access-token:{TOKEN}")] if form.decode() in environment]
        for kind in ("diff", "session"):
            kept = app.store.blobs.get(LOCAL_ACCOUNT, task_id, kind)
            assert kept is not None and b"[redacted]" in kept
            assert_nowhere(kind, kept)
        until(lambda: not list((world.home / "sandboxes").glob("sbx_*")), "the sandbox is gone")
    # The data folder, byte by byte: database and its log of writes, queue, fetched repositories, the worker's log.
    for file in world.home.rglob("*"):
        if file.is_file():
            assert_nowhere(str(file), file.read_bytes())
    assert {"cloudagent.db", "cloudagent.db-wal", "worker-0.log"} <= {file.name for file in world.home.iterdir()}
    assert any("git" in command for command in commands)
    for command in commands:
        assert_nowhere("a command line", command)
