"""`ca demo`, as a newcomer types it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.worlds import World, until


@pytest.fixture
def environment(world: World, tmp_path: Path) -> dict[str, str]:
    """A newcomer's: no credential, an empty home, and a place for temporary folders that can be looked at."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    return {"PATH": os.environ["PATH"], "HOME": world.environment["HOME"], "TMPDIR": str(temporary)}


def left_behind(environment: dict[str, str]) -> list[str]:
    temporary = environment["TMPDIR"]
    processes: list[str] = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and temporary in " ".join(process.cmdline()):
                processes.append(" ".join(process.cmdline()))
            elif f"CLOUDAGENT_HOME={temporary}" in Path(f"/proc/{process.pid}/environ").read_text(errors="replace"):
                processes.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return processes + os.listdir(temporary)


@pytest.mark.parametrize("words", [[], ["--unsafe-process"]])
def test_the_demo_ends_with_an_applied_task_and_nothing_left_behind(
    environment: dict[str, str], words: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cloudagent_mcp", "demo", *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the model's words are scripted" in done.stdout
    assert "status completed, verdict passed" in done.stdout
    assert "+    return sum(prices) * (1 - discount)" in done.stdout
    assert "1 file written" in done.stdout and "OK" in done.stdout
    assert "claude mcp add cloudagent" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not left_behind(environment)
    assert not os.listdir(environment["HOME"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_the_middle_leaves_nothing_behind(environment: dict[str, str], number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "cloudagent_mcp", "demo"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "tool_use" in line:
            break
    assert left_behind(environment)
    # As a terminal does it: to the whole foreground group.
    os.killpg(process.pid, number)
    rest, _ = process.communicate(timeout=40)
    assert process.returncode == 130
    assert "Traceback" not in rest
    until(lambda: not left_behind(environment), "everything is gone")
