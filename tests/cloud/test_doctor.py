"""`ca doctor --provider` tries a provider with the account that is configured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cloudagent_queue.sandboxes import PROVIDERS
from cloudagent_queue.sandboxes.contract import until
from tests.support.e2b_server.client import E2bServer


def doctor(server: E2bServer, tmp_path: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cloudagent_mcp", "doctor", *arguments],
        env={"PATH": os.environ["PATH"], "CLOUDAGENT_HOME": str(tmp_path), **server.environment, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_doctor_tries_a_provider_tells_each_step_and_leaves_nothing(server: E2bServer, tmp_path: Path) -> None:
    out, err = (process := doctor(server, tmp_path, "--provider", "e2b", "--json")).communicate(timeout=110)
    findings = json.loads(out)
    assert process.returncode == 0, (err, [finding for finding in findings if not finding["ok"]])
    assert len(findings) > 20 and all(finding["seconds"] is not None for finding in findings[1:])
    assert server.stats()["living"] == 0


def test_the_doctor_says_what_to_change(server: E2bServer, tmp_path: Path) -> None:
    out, _ = (process := doctor(server, tmp_path, "--provider", "e2b", E2B_API_KEY="nvta_secret")).communicate(
        timeout=60
    )
    assert process.returncode == 1
    assert "E2B_API_KEY" in out and "nvta_secret" not in out
    _, err = (process := doctor(server, tmp_path, "--provider", "nowhere")).communicate(timeout=60)
    assert process.returncode == 2
    assert all(name in err for name in PROVIDERS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_doctor_kills_what_it_made_when_it_is_interrupted(
    server: E2bServer, tmp_path: Path, number: signal.Signals
) -> None:
    before = server.stats()["created"]
    process = doctor(server, tmp_path, "--provider", "e2b")
    until(lambda: server.stats()["created"] > before, "it did not happen")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert server.stats()["living"] == 0
