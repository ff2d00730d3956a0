"""The bundle for Claude Desktop: packed with its own tool, unpacked, and started as its manifest says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters

from cloudagent_mcp import __version__
from tests.support.npm import NODE, npm_package
from tests.support.worlds import World

ROOT = Path(__file__).parents[2]
PACKER = "@anthropic-ai/mcpb@2.1.2"


@pytest.mark.anyio
async def test_the_bundle_is_valid_whole_and_starts(world: World, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    program = npm_package(pytestconfig, PACKER) / "@anthropic-ai" / "mcpb" / "dist" / "cli" / "cli.js"

    def mcpb(*words: str | Path) -> None:
        done = subprocess.run([NODE, program, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

    mcpb("validate", ROOT / "manifest.json")
    mcpb("pack", ROOT, tmp_path / "cloudagent.mcpb")
    mcpb("unpack", tmp_path / "cloudagent.mcpb", tmp_path / "bundle")
    bundle = tmp_path / "bundle"
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    assert manifest["version"] == __version__
    assert (bundle / manifest["server"]["entry_point"]).exists()
    assert not any((bundle / left_out).exists() for left_out in ("tests", ".git", ".venv", "docs", "uv.lock"))

    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on the PATH")
    config = manifest["server"]["mcp_config"]
    assert config["command"] == "uv"
    arguments = [word.replace("${__dirname}", str(bundle)) for word in config["args"]]
    defaults = {f"${{user_config.{name}}}": option["default"] for name, option in manifest["user_config"].items()}
    settings = {name: defaults[value] for name, value in config["env"].items()}
    # uv is to find its settings and what it has downloaded already where it does for whoever runs the tests.
    environment = {**os.environ, **world.environment, **settings, "HOME": os.environ["HOME"]}
    async with Client(StdioServerParameters(command=uv, args=arguments, env=environment, cwd=tmp_path)) as client:
        assert "submit_task" in {tool.name for tool in (await client.list_tools()).tools}
        # With nothing filled in, it says what is missing.
        refused = await client.call_tool("submit_task", {"prompt": "x", "repository": "none"})
        assert (refused.structured_content or {})["code"] == "credential_missing"
