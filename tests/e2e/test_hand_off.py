"""Work that is not committed goes to a server, is gone on with by the real Claude Code there, and comes home."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.test_one_task import FIX, MENDED, MISTAKE, TEST
from tests.support.claude_code import Talk
from tests.support.served import KEY, served
from tests.support.worlds import World, git


def test_uncommitted_work_goes_to_a_server_and_its_result_comes_back_into_it(
    world: World, repo: Path, tmp_path: Path
) -> None:
    # Only the working tree has the mistake, and the file by which the task verifies itself: neither was committed.
    (repo / "calc.py").write_text(f"# mine\ndef add(a, b):\n    {MISTAKE}\n")
    (repo / ".cloudagent.toml").write_text(f"verify = '{TEST}'\n")
    (repo / "notes.txt").write_text("not committed\n")
    with Talk([FIX], world) as model, served(world.with_model(model.environment())) as url:
        world.start_worker()
        user = {
            "PATH": world.environment["PATH"],
            "HOME": str(tmp_path / "elsewhere"),
            "CLOUDAGENT_HOME": str(tmp_path / "elsewhere" / "data"),
            "CLOUDAGENT_URL": url,
            "CLOUDAGENT_API_KEY": KEY,
        }

        def ca(*words: str) -> Any:
            command = [sys.executable, "-m", "cloudagent_mcp", "task", *words, "--json"]
            done = subprocess.run(command, cwd=repo, env=user, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout.splitlines()[-1])

        task_id = ca("create", "Fix add")["task_id"]
        ca("wait", task_id)
        task = ca("show", task_id)
        assert (task["status"], task["verdict"]) == ("completed", "passed"), task
        (file,) = ca("diff", task_id)["files"]
        assert file["path"] == "calc.py"
        assert ca("apply", task_id)["outcome"] == "applied"
    assert (repo / "calc.py").read_text() == f"# mine\ndef add(a, b):\n    {MENDED}\n"
    assert (repo / "notes.txt").read_text() == "not committed\n"
    assert git(repo, "log", "--format=%s", "HEAD") == "first"
