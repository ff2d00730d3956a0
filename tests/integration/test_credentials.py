"""Which credentials a task gets, and that they are sealed where they belong."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cloudagent_mcp import __version__
from cloudagent_mcp.app import App
from cloudagent_mcp.client import LocalClient
from cloudagent_mcp.embedded import only_worker
from cloudagent_mcp.scripted_model import ScriptedModel
from cloudagent_mcp.server import http_app
from cloudagent_storage.records import bound_for_git
from tests.support.worlds import World

ADMIN = "a-key-for-the-tests"
HOST = "127.0.0.1:8420"
OWN, SYSTEM, AROUND = "sk-the-tasks-own", "sk-the-operators", "sk-of-the-environment"
EVERYTHING = {
    "ANTHROPIC_API_KEY": AROUND,
    "ANTHROPIC_AUTH_TOKEN": "another-token",
    "CLAUDE_CODE_OAUTH_TOKEN": "a-third-token",
    "CLAUDE_CODE_USE_BEDROCK": "1",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-amazon",
    "ANTHROPIC_CUSTOM_HEADERS": "Authorization: Bearer of-the-gateway",
    "ANTHROPIC_BASE_URL": "http://127.0.0.1:9",
    "ANTHROPIC_MODEL": "some-model",
}


def with_(world: World, **variables: str) -> World:
    kept = {name: value for name, value in world.environment.items() if name != "ANTHROPIC_API_KEY"}
    return replace(world, environment={**kept, **variables})


def submit(app: App, *, local: bool, **arguments: Any) -> dict[str, Any]:
    """Over stdio's way in, or over REST as somebody else."""
    if local:
        client = LocalClient(app)
        try:
            return client.call("submit_task", prompt="x", repository="none", **arguments)
        finally:
            client.close()
    server = http_app(app, key=ADMIN, host="127.0.0.1", port=8420)
    with TestClient(server, base_url=f"http://{HOST}", headers={"Authorization": f"Bearer {ADMIN}"}) as client:
        return client.post("/api/v1/tasks", json={"prompt": "x", **arguments}).json()


def sealed(app: App, task_id: str) -> tuple[dict[str, str], dict[str, str] | None]:
    """What the worker will open: the agent's variables, as the version before kept them too, and git's tokens."""
    claim = app.store.tasks.claim(task_id, worker="w", lease_s=60)
    assert claim is not None and claim.credentials is not None
    agents = json.loads(app.settings.keyring.open(claim.credentials, bound_to=task_id))
    if claim.git_credentials is None:
        return agents, None
    return agents, json.loads(app.settings.keyring.open(claim.git_credentials, bound_to=bound_for_git(task_id)))


@pytest.mark.parametrize("local", [True, False], ids=["local", "remote"])
@pytest.mark.parametrize(
    ("own", "system", "around", "of_local", "of_remote"),
    [
        (True, True, True, OWN, OWN),
        (True, False, False, OWN, OWN),
        (False, True, True, AROUND, SYSTEM),
        (False, True, False, SYSTEM, SYSTEM),
        (False, False, True, AROUND, AROUND),
        (False, False, False, None, None),
    ],
)
def test_the_models_key_is_the_tasks_then_its_users_then_the_operators_then_the_servers(
    world: World, local: bool, own: bool, system: bool, around: bool, of_local: str | None, of_remote: str | None
) -> None:
    variables = ({"SYSTEM_ANTHROPIC_API_KEY": SYSTEM} if system else {}) | (
        {"ANTHROPIC_API_KEY": AROUND} if around else {}
    )
    app = with_(world, **variables).app()
    expected = of_local if local else of_remote
    if expected is None:
        if local:
            with pytest.raises(Exception, match="no credential"):
                submit(app, local=True)
        else:
            assert submit(app, local=False)["code"] == "credential_missing"
        return
    task = submit(app, local=local, **({"anthropic_api_key": OWN} if own else {}))
    assert sealed(app, task["task_id"])[0] == {"ANTHROPIC_API_KEY": expected}


@pytest.mark.parametrize("local", [True, False], ids=["local", "remote"])
def test_a_tasks_own_key_comes_without_any_other_credential(world: World, local: bool) -> None:
    app = with_(world, **EVERYTHING, SYSTEM_ANTHROPIC_API_KEY=SYSTEM).app()
    task = submit(app, local=local, anthropic_api_key=OWN)
    assert sealed(app, task["task_id"])[0] == {
        "ANTHROPIC_API_KEY": OWN,
        "ANTHROPIC_BASE_URL": EVERYTHING["ANTHROPIC_BASE_URL"],
        "ANTHROPIC_MODEL": EVERYTHING["ANTHROPIC_MODEL"],
    }


@pytest.mark.parametrize(
    ("local", "own", "variables", "expected"),
    [
        (True, "own-token", {"GH_TOKEN": "gh", "SYSTEM_GITHUB_TOKEN": "system"}, "own-token"),
        (True, None, {"GH_TOKEN": "gh", "GITHUB_TOKEN": "github", "SYSTEM_GITHUB_TOKEN": "system"}, "gh"),
        (True, None, {"GITHUB_TOKEN": " github\n", "SYSTEM_GITHUB_TOKEN": "system"}, "github"),
        (True, None, {"GH_TOKEN": " ", "SYSTEM_GITHUB_TOKEN": "system"}, "system"),
        (True, None, {}, None),
        (False, "own-token", {"GH_TOKEN": "gh", "SYSTEM_GITHUB_TOKEN": "system"}, "own-token"),
        (False, None, {"GH_TOKEN": "gh", "SYSTEM_GITHUB_TOKEN": "system"}, "system"),
        (False, None, {"GH_TOKEN": "gh", "GITHUB_TOKEN": "github"}, None),
    ],
)
def test_githubs_token_is_for_git_alone_and_never_the_servers_own(
    world: World, local: bool, own: str | None, variables: dict[str, str], expected: str | None
) -> None:
    app = with_(world, ANTHROPIC_API_KEY=AROUND, **variables).app()
    task = submit(app, local=local, **({} if own is None else {"github_token": own}))
    agents, gits = sealed(app, task["task_id"])
    assert agents == {"ANTHROPIC_API_KEY": AROUND}
    assert gits == (None if expected is None else {"github.com": expected})


def test_the_worker_is_started_without_the_operators_credentials(world: World) -> None:
    settings = with_(
        world, SYSTEM_ANTHROPIC_API_KEY=SYSTEM, SYSTEM_GITHUB_TOKEN="ghp", GH_TOKEN="gh", CLOUDAGENT_API_KEY="cag"
    ).settings
    assert set(settings.worker_environment) == {"HOME", "PATH", "CLOUDAGENT_HOME"}
    assert SYSTEM not in repr(settings) and "ghp" not in repr(settings)


def test_both_are_forgotten_when_the_task_has_ended(world: World) -> None:
    app = world.app()
    task_id = submit(app, local=False, github_token="ghp_canary")["task_id"]
    app.store.tasks.request_cancel("local", task_id)
    with sqlite3.connect(world.home / "cloudagent.db") as database:
        row = database.execute("SELECT credentials, git_credentials FROM tasks").fetchone()
    database.close()
    assert row == (None, None)


Row = tuple[bytes, bytes | None]
SWAPS: dict[str, Callable[[Row, Row], Row]] = {
    "two tasks' credentials": lambda mine, other: (other[0], mine[1]),
    "two tasks' git credentials": lambda mine, other: (mine[0], other[1]),
    "the agent's and git's": lambda mine, other: (mine[1] or b"", mine[0]),
    "git's to the agent": lambda mine, other: (mine[1] or b"", None),
}
"""What somebody who can write to the database makes of a task's sealed columns."""


@pytest.mark.parametrize("swap", SWAPS)
def test_sealed_values_that_were_moved_in_the_database_open_nowhere(world: World, swap: str) -> None:
    with ScriptedModel([]) as model:
        world = world.with_model(model.environment())
        app = world.app()
        made = [submit(app, local=False, github_token=f"ghp_canary-{n}")["task_id"] for n in range(2)]
        with sqlite3.connect(world.home / "cloudagent.db") as database:
            rows = database.execute("SELECT credentials, git_credentials, task_id FROM tasks").fetchall()
            for mine, other in (rows, rows[::-1]):
                moved = SWAPS[swap](mine[:2], other[:2])
                database.execute(
                    "UPDATE tasks SET credentials = ?, git_credentials = ? WHERE task_id = ?", (*moved, mine[2])
                )
        database.close()
        world.start_worker()
        with world.client() as client:
            for task_id in made:
                task = world.wait(client, task_id)
                assert (task["status"], task["error"]["code"]) == ("failed", "internal")
        assert not model.requests
        assert not list((world.home / "sandboxes").glob("sbx_*"))


def ca(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cloudagent_mcp", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_ca_takes_no_secret_on_its_command_line(world: World) -> None:
    said = ca(world.environment, "task", "create", "--help").stdout
    assert "--send-credentials" in said and "--github-token" not in said and "--anthropic-api-key" not in said


def test_ca_sends_a_server_the_credentials_around_it_only_when_told_to(world: World, tmp_path: Path) -> None:
    app = with_(world, ANTHROPIC_API_KEY=AROUND).app()
    with only_worker(world.home, version=__version__):
        server = subprocess.Popen(
            [sys.executable, "-m", "cloudagent_mcp", "serve", "--port", "0"],
            env={**app.settings.environment, "ADMIN_API_KEY": ADMIN},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert server.stdout is not None
            with server.stdout as printed:
                url = printed.readline().split("MCP at ")[1].split("/mcp ")[0]
            users = {"HOME": str(tmp_path), "PATH": world.environment["PATH"], "CLOUDAGENT_HOME": str(tmp_path / "far")}
            users |= {"CLOUDAGENT_URL": url, "CLOUDAGENT_API_KEY": ADMIN}
            users |= {"ANTHROPIC_API_KEY": "sk-the-users", "GITHUB_TOKEN": "ghp_the-users"}
            given: list[tuple[dict[str, str], dict[str, str] | None]] = []
            for words in ([], ["--send-credentials"]):
                done = ca(users, "task", "create", "x", "--repository", "none", "--json", *words)
                assert done.returncode == 0, done.stderr
                given.append(sealed(app, json.loads(done.stdout)["task_id"]))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(15)
    assert given == [
        ({"ANTHROPIC_API_KEY": AROUND}, None),
        ({"ANTHROPIC_API_KEY": "sk-the-users"}, {"github.com": "ghp_the-users"}),
    ]
