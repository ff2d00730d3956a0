"""An independent check of the test server: E2B's JavaScript SDK, another implementation of the same protocols."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.e2b_server.client import e2b_server
from tests.support.npm import NODE, npm_package

JS_SDK = "2.51.0"


def test_the_javascript_sdk_finds_the_same_server(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    modules = npm_package(pytestconfig, f"e2b@{JS_SDK}")
    script = Path(__file__).parents[1] / "support" / "e2b_server" / "check.js"
    with e2b_server(tmp_path / "server") as server:
        found = {"E2B_API_URL": server.url, "E2B_SANDBOX_URL": server.url, "E2B_API_KEY": server.api_key}
        command = [NODE, script, modules / "e2b"]
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
