"""The real Claude Code on one machine, a server with its worker on another: through the bridge, and home again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest

from cloudagent_mcp.scripted_model import Rule
from tests.e2e.test_one_task import FIX, MENDED, MISTAKE, TEST
from tests.support.claude_code import Talk, calls, claude, converse, says
from tests.support.git_server import GitServer, git_server
from tests.support.served import served
from tests.support.worlds import World, git

TYPED = "/mcp__cloudagent__fix-issue 12 and verify it with unittest"
TALK = Rule(
    # What the slash command became: the text of the prompt, with the whole line in it.
    prompt="bring the fix home: 12 and verify it with unittest\n",
    turns=(
        calls(("submit_task", {"prompt": "Fix add", "title": "mend", "verify": TEST})),
        calls(("get_task", {"task_id": "<mend>", "wait_seconds": 50})),
        calls(("get_task", {"task_id": "<mend>", "wait_seconds": 50})),
        calls(("get_task_diff", {"task_id": "<mend>"})),
        calls(("apply_task", {"task_id": "<mend>"})),
        says("Applied."),
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
    with Talk([TALK, FIX], world) as model:
        made = [sys.executable, "-m", "cloudagent_mcp", "key", "create", "laptop"]
        key = subprocess.run(made, env=world.environment, capture_output=True, text=True, check=True).stdout.strip()
        with served(world.with_model(model.environment())) as url:
            world.start_worker()
            (tmp_path / "elsewhere").mkdir()
            user = replace(
                world,
                environment={
                    "PATH": world.environment["PATH"],
                    "HOME": str(tmp_path / "elsewhere"),
                    "CLOUDAGENT_HOME": str(tmp_path / "elsewhere" / "data"),
                    "CLOUDAGENT_URL": url,
                    "CLOUDAGENT_API_KEY": key,
                    **model.environment(),
                },
            )
            claude(user, repo, "mcp", "add", "cloudagent", "--", sys.executable, "-m", "cloudagent_mcp", "mcp")
            messages = converse(user, repo, TYPED)
            assert messages[-1]["result"] == "Applied.", messages
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
                [sys.executable, "-m", "cloudagent_mcp", "task", "undo", task["task_id"]],
                cwd=repo,
                env=user.environment,
            )
            assert undone.returncode == 0 and MISTAKE in (repo / "calc.py").read_text()
