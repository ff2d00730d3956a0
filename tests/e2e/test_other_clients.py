"""Clients that other people wrote, before the server: the TypeScript SDK in both eras, the Inspector, curl."""

from __future__ import annotations

import json
import re
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
TYPESCRIPT_1 = "@modelcontextprotocol/sdk@1.32.2"
"""What most clients are made with that were written before 2026-07-28."""
INSPECTOR = "@modelcontextprotocol/inspector@2.12.0"
STDIO = [sys.executable, "-m", "cloudagent_mcp", "mcp"]
VERSIONS = {"auto": "2026-07-28", "legacy": "2025-11-25", "v1": "2025-11-25"}


def node(script: Path, *words: str, env: Mapping[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([NODE, script, *words], env=env, cwd=cwd, capture_output=True, text=True, timeout=110)


def beside_its_packages(script: Path, folder: Path, modules: Path) -> Path:
    """A copy of a script where Node finds these packages: it looks beside the script."""
    folder.mkdir()
    (folder / "node_modules").symlink_to(modules)
    return Path(shutil.copy(script, folder))


@pytest.mark.parametrize("era", VERSIONS)
@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_the_typescript_sdk_submits_waits_reads_and_cancels(
    world: World, era: str, transport: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    modules = npm_package(pytestconfig, TYPESCRIPT_1 if era == "v1" else TYPESCRIPT)
    script = beside_its_packages(ROOT / "tests" / "support" / "client.mjs", tmp_path / "js", modules)

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
    assert found.pop("version") == ("untold" if (era, transport) == ("v1", "stdio") else VERSIONS[era])
    assert found == {
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

    def inspect(where: Sequence[str], *words: str, exits: int = 0) -> dict[str, Any]:
        done = node(program, "--cli", *where, *words, env=world.environment, cwd=tmp_path)
        assert done.returncode == exits, done.stdout + done.stderr
        return json.loads(done.stdout)

    def look(where: Sequence[str]) -> None:
        names = {tool["name"] for tool in inspect(where, "--method", "tools/list")["tools"]}
        assert {"submit_task", "get_task", "apply_task"} <= names
        given = ("--tool-arg", "prompt=Say hello", "--tool-arg", "repository=none")
        answer = inspect(where, "--method", "tools/call", "--tool-name", "submit_task", *given)
        assert answer["structuredContent"]["status"] == "queued" and not answer.get("isError")
        unknown = ("--tool-name", "get_task", "--tool-arg", "task_id=task_x")
        refused = inspect(where, "--method", "tools/call", *unknown, exits=5)
        assert refused["structuredContent"]["code"] == "task_not_found" and refused["isError"]

    if transport == "http":
        with served(world) as url:
            look([f"{url}/mcp", "--transport", "http", "--header", f"Authorization: Bearer {KEY}"])
    else:
        with only_worker(world.home, version=__version__):
            # It hands on nothing of its environment by itself.
            look([*STDIO, *(word for item in world.environment.items() for word in ("-e", "=".join(item)))])


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_line_for_curl_works_as_it_is_written(world: World) -> None:
    (line,) = re.findall(r"^curl (?:.+\\\n)+.+$", (ROOT / "docs" / "clients.md").read_text(), re.MULTILINE)
    with served(world) as url:
        line = line.replace("http://127.0.0.1:8420", url).replace("KEY", KEY)
        done = subprocess.run(["sh", "-c", line], env=world.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (event,) = [text.removeprefix("data: ") for text in done.stdout.splitlines() if text.startswith("data: ")]
    assert json.loads(event)["result"]["structuredContent"]["tasks"] == []


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
