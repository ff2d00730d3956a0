"""A server built by the product's own factory passes every scenario that there is."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.conformance import REVISIONS, proven, run_scenarios, unmet
from tests.support.worlds import World

SKIPPED_BY_THE_HARNESS = {"tasks-status-notifications"}


@pytest.mark.parametrize("revision", REVISIONS)
def test_the_fixture_server_passes_every_scenario(
    world: World, revision: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.support.conformance_server"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=root, env=world.environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert server.stdout is not None
    try:
        with server.stdout as printed:
            address = printed.readline().strip()
        found = run_scenarios(address, revision, tmp_path / "results", pytestconfig)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(15)
    assert len(found) >= {"2026-07-28": 50, "2025-11-25": 33}[revision]
    for scenario, checks in sorted(found.items()):
        assert unmet(checks) == [], scenario
        assert proven(checks) or scenario in SKIPPED_BY_THE_HARNESS, (scenario, checks)
