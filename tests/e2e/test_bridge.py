"""The real Claude Code on one machine, a server with its worker on another: through the bridge, and home again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from cloudagent_mcp import __version__
from cloudagent_mcp.embedded import only_worker
from cloudagent_mcp.scripted_model import Rule, Text, ToolUse, Turn
from tests.e2e.test_clients import CLAUDE, TaskIdModel
from tests.e2e.test_one_task import FIX, MENDED, MISTAKE, TEST
from tests.support.git_server import GitServer, git_server
from tests.support.worlds import World, git

NAME = "mcp__cloudagent__"
TYPED = f"/{NAME}fix-issue 12 and verify it with unittest"
TALK = Rule(
    # What the slash command became: the text of the prompt, with the whole line in it.
    prompt="bring the fix home: 12 and verify it with unittest\n",
    turns=(
        Turn(blocks=(ToolUse(name=f"{NAME}submit_task", input={"prompt": "Fix add", "verify": TEST}),)),
        Turn(blocks=(ToolUse(name=f"{NAME}get_task", input={"task_id": "TASK", "wait_seconds": 50}),)),
        Turn(blocks=(ToolUse(name=f"{NAME}get_task", input={"task_id": "TASK", "wait_seconds": 50}),)),
        Turn(blocks=(ToolUse(name=f"{NAME}get_task_diff", input={"task_id": "TASK"}),)),
        Turn(blocks=(ToolUse(name=f"{NAME}apply_task", input={"task_id": "TASK"}),)),
        Turn(blocks=(Text(text="Applied."),)),
    ),
)


@pytest.fixture
def forge(world: World, repo: Path, tmp_path: Path) -> Generator[GitServer]:
    """Where the repository is pushed to; to the server's machine it has a public name."""
    (tmp_path / "public").mkdir()
    git(tmp_path / "public", "clone", "-q", "--bare", str(repo), "calc.git")
    git(repo, "remote", "add", "origin", "https://git.example.com/calc.git")
    git(repo, "update-ref", "refs/remotes/origin/main", "HEAD")
    with git_server(tmp_path / "tls", {"": tmp_path / "public"}) as found:
        home = found.trusted_by(Path(world.environment["HOME"]))
        with (home / ".gitconfig").open("a") as config:
            config.write(f'[url "{found.address("")}"]\n\tinsteadOf = https://git.example.com/\n')
        yield found


def test_a_slash_command_delegates_to_a_server_elsewhere_and_brings_the_result_home(
    world: World, repo: Path, tmp_path: Path, forge: GitServer
) -> None:
    with TaskIdModel([TALK, FIX], world) as model, only_worker(world.home, version=__version__):
        server_side = world.with_model(model.environment())
        made = [sys.executable, "-m", "cloudagent_mcp", "key", "create", "laptop"]
        key = subprocess.run(made, env=world.environment, capture_output=True, text=True, check=True).stdout.strip()
        server = subprocess.Popen(
            [sys.executable, "-m", "cloudagent_mcp", "serve", "--port", "0"],
            env={**server_side.environment, "ADMIN_API_KEY": "the-operators-own"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split("MCP at ")[1].split("/mcp ")[0]
            world.start_worker()
            user = {
                "PATH": world.environment["PATH"],
                "HOME": str(tmp_path / "elsewhere"),
                "CLOUDAGENT_HOME": str(tmp_path / "elsewhere" / "data"),
                "CLOUDAGENT_URL": url,
                "CLOUDAGENT_API_KEY": key,
                **model.environment(),
                "IS_SANDBOX": "1",
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                "DISABLE_AUTOUPDATER": "1",
                # On a busy machine it would begin without the server, whose command nobody then knows.
                "MCP_CONNECTION_NONBLOCKING": "0",
                "MCP_TIMEOUT": "60000",
            }
            (tmp_path / "elsewhere").mkdir()

            def claude(*words: str) -> str:
                done = subprocess.run([CLAUDE, *words], cwd=repo, env=user, capture_output=True, text=True, timeout=110)
                assert done.returncode == 0, done.stdout + done.stderr
                return done.stdout

            claude("mcp", "add", "cloudagent", "--", sys.executable, "-m", "cloudagent_mcp", "mcp")
            said = claude(
                *("-p", TYPED, "--output-format", "stream-json", "--verbose", "--dangerously-skip-permissions")
            )
            messages = [json.loads(line) for line in said.splitlines()]
            assert messages[-1]["result"] == "Applied.", said
            # On this machine: the fix, and neither a database nor a worker.
            assert MENDED in (repo / "calc.py").read_text()
            assert not list((tmp_path / "elsewhere" / "data").glob("*.db"))
            with world.client() as client:
                task = client.call("list_tasks")["tasks"][0]
                assert (task["status"], task["verdict"]) == ("completed", "passed")
                assert task["repository"] == "https://git.example.com/calc.git"
                assert task["base_ref"] == git(repo, "rev-parse", "HEAD") == task["base_sha"]
            assert any("calc.git" in path for path, _ in forge.seen)
            undone = subprocess.run(
                [sys.executable, "-m", "cloudagent_mcp", "task", "undo", task["task_id"]], cwd=repo, env=user
            )
            assert undone.returncode == 0 and MISTAKE in (repo / "calc.py").read_text()
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.stdout is not None
            server.stdout.close()
            assert server.wait(15) in (0, -signal.SIGTERM)
