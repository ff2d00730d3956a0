"""Clients that other people wrote, before the server: the TypeScript SDK in both eras, the Inspector, curl."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cloudagent_mcp import __version__
from cloudagent_mcp.embedded import only_worker
from cloudagent_mcp.scripted_model import ScriptedModel
from tests.e2e.test_one_task import FIX, MENDED, TEST
from tests.support.npm import NODE, npm_package
from tests.support.served import KEY, served
from tests.support.worlds import World

ROOT = Path(__file__).parents[2]
TYPESCRIPT = "@modelcontextprotocol/client@2.4.0"
INSPECTOR = "@modelcontextprotocol/inspector@2.12.0"
STDIO = [sys.executable, "-m", "cloudagent_mcp", "mcp"]
ERAS = {"auto": "2026-07-28", "legacy": "2025-11-25"}


def node(script: Path, *words: str, env: Mapping[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([NODE, script, *words], env=env, cwd=cwd, capture_output=True, text=True, timeout=110)


def beside_its_packages(script: Path, folder: Path, modules: Path) -> Path:
    """A copy of a script where Node finds these packages: it looks beside the script."""
    folder.mkdir()
    (folder / "node_modules").symlink_to(modules)
    return Path(shutil.copy(script, folder))


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_the_typescript_sdk_submits_waits_reads_and_cancels(
    world: World, era: str, transport: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    script = beside_its_packages(
        ROOT / "tests" / "support" / "client.mjs", tmp_path / "js", npm_package(pytestconfig, TYPESCRIPT)
    )

    def seen(where: dict[str, Any]) -> dict[str, Any]:
        done = node(script, era, json.dumps(where), env=world.environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    if transport == "http":
        with served(world) as url:
            found = seen({"url": f"{url}/mcp", "key": KEY})
    else:
        with only_worker(world.home, version=__version__):
            found = seen({"command": STDIO[0], "args": STDIO[1:]})
    assert found.pop("tools") >= 16
    assert found == {
        "version": ERAS[era],
        "server": "cloudagent",
        "waited": "queued",
        "progressed": True,
        "refused": [True, "unknown_argument"],
        "logs": True,
        "cancelled": ["cancelled", True],
    }


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_the_inspector_lists_the_tools_and_calls_one(
    world: World, transport: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    package = npm_package(pytestconfig, INSPECTOR) / "@modelcontextprotocol" / "inspector"
    program = package / "clients" / "launcher" / "build" / "index.js"

    def inspect(where: Sequence[str], *words: str) -> dict[str, Any]:
        done = node(program, "--cli", *where, *words, env=world.environment, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def look(where: Sequence[str]) -> None:
        names = {tool["name"] for tool in inspect(where, "--method", "tools/list")["tools"]}
        assert {"submit_task", "get_task", "apply_task"} <= names
        given = ("--tool-arg", "prompt=Say hello", "--tool-arg", "repository=none")
        answer = inspect(where, "--method", "tools/call", "--tool-name", "submit_task", *given)
        assert answer["structuredContent"]["status"] == "queued" and not answer.get("isError")

    if transport == "http":
        with served(world) as url:
            look([f"{url}/mcp", "--transport", "http", "--header", f"Authorization: Bearer {KEY}"])
    else:
        with only_worker(world.home, version=__version__):
            look(STDIO)


@pytest.mark.parametrize("example", ["delegate.py", "delegate.ts"])
def test_an_example_delegates_a_task_and_applies_it(
    world: World, repo: Path, example: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    with ScriptedModel([FIX]) as model:
        world = world.with_model(model.environment())
        environment = {**world.environment, "PATH": f"{Path(sys.executable).parent}:{world.environment['PATH']}"}
        if example.endswith(".py"):
            command = [sys.executable, ROOT / "examples" / example]
        else:
            modules = npm_package(pytestconfig, TYPESCRIPT)
            command = [NODE, beside_its_packages(ROOT / "examples" / example, tmp_path / "js", modules)]
        with only_worker(world.home, version=__version__):
            world.start_worker()
            done = subprocess.run(
                [*command, "Fix add", "--verify", TEST],
                cwd=repo,
                env=environment,
                capture_output=True,
                text=True,
                timeout=110,
            )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Fixed add." in done.stdout and "modified calc.py" in done.stdout
    assert MENDED in (repo / "calc.py").read_text()
