"""The harness of the protocol's own people, against a server's address."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.npm import NODE, npm_package

HARNESS = "@modelcontextprotocol/conformance@0.2.0-alpha.12"
REVISIONS = ("2026-07-28", "2025-11-25")
"""One of each era."""
WITH_KEY = Path(__file__).parent / "conformance_key.mjs"


class Check(NamedTuple):
    """What one check of a scenario found."""

    name: str
    status: str
    said: str


def run_scenarios(
    url: str, revision: str, output: Path, config: pytest.Config, *, key: str = ""
) -> dict[str, list[Check]]:
    """The checks of every scenario that the harness knows for a revision, extensions and optional ones included."""
    program = npm_package(config, HARNESS) / "@modelcontextprotocol" / "conformance" / "dist" / "index.js"
    command = [NODE, "--import", WITH_KEY, program, "server", "--url", url, "--requirements", revision, "-o", output]
    done = subprocess.run(command, env={"SERVER_KEY": key}, capture_output=True, text=True, timeout=100)
    assert "=== SUMMARY ===" in done.stdout, done.stdout + done.stderr
    found: dict[str, list[Check]] = {}
    for folder in output.iterdir():
        scenario = re.fullmatch(r"server-(.+)-\d{4}-\d\d-\d\dT[\dZ-]+", folder.name)
        assert scenario is not None, folder.name
        checks = json.loads((folder / "checks.json").read_text())
        found[scenario[1]] = [Check(c["id"], c["status"], c.get("errorMessage") or "") for c in checks]
    return found


def unmet(checks: list[Check]) -> list[Check]:
    """What a server did not do of what it must or should."""
    return [check for check in checks if check.status in ("FAILURE", "WARNING")]


def proven(checks: list[Check]) -> bool:
    """Did the server do anything that was asked of it? Only a well-formed answer proves nothing."""
    return any(check.status == "SUCCESS" and check.name != "wire-schema-valid" for check in checks)
