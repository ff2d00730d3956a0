"""Local sandboxes work for every user and with every kind of interpreter."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

IMPORT_FROM = os.pathsep.join(
    [sysconfig.get_path("purelib"), *(str(Path(__file__).parents[2] / part) for part in ("", "queue", "storage"))]
)

IN_A_SANDBOX = """
import os, pathlib, sys, time
from cloudagent_queue.sandboxes import SandboxSpec
from cloudagent_queue.sandboxes.local import LocalProvider
folder = pathlib.Path(sys.argv[1]) / "sandboxes"
provider = LocalProvider(folder)
sandbox = provider.create(metadata={})
done = sandbox.run([sandbox.python, "-c", "import claude_agent_sdk, os; print(os.getuid())"], timeout_s=60)
assert (done.exit_code, done.output) == (0, f"{os.getuid()}\\n"), done
done = sandbox.run(["sh", "-c", "git init -q r && git -C r add . && id -un && ls -ld /sandbox"], timeout_s=60)
assert done.exit_code == 0, done
sandbox.start(["sh", "-c", "trap 'exit 0' TERM; echo > ready; while :; do sleep 0.02; done"], env={})
while not sandbox.read("ready", max_bytes=1):
    assert sandbox.alive(), sandbox.output()
    time.sleep(0.01)
sandbox = LocalProvider(folder).connect(sandbox.id)
assert sandbox.alive()
record = folder / sandbox.id / "started.jsonl"
record.write_text("".join(line for line in record.open() if "start-time" not in line))
assert sandbox.alive(), "not recognised by its marker"
sandbox.stop()
while sandbox.alive():
    time.sleep(0.01)
lock = "mkdir -p a/b && touch a/b/file && chmod 500 a/b && chmod 0 a ."
assert sandbox.run(["sh", "-c", lock], timeout_s=20).exit_code == 0
assert sandbox.read("ready", max_bytes=1) == b"" or os.getuid() == 0
sandbox.kill()
closed = provider.create(SandboxSpec(egress=["example.com"]), metadata={})
ask = "import urllib.request; urllib.request.urlopen('http://unlisted.test/')"
done = closed.run([closed.python, "-c", ask], timeout_s=60)
assert "HTTP Error 403" in done.output and closed.blocked() == ["unlisted.test:80"], done
closed.kill()
assert list(folder.iterdir()) == []
print("well done")
"""


def interpreter_for(user: int) -> str | None:
    """A Python of this version that a user may execute; the one that runs the tests may lie in root's home."""
    for python in (sys.executable, "/usr/bin/python3", f"/usr/bin/python3.{sys.version_info.minor}"):
        try:
            check = f"import pydantic, sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
            env = {"PYTHONPATH": IMPORT_FROM}
            if subprocess.run([python, "-c", check], user=user, env=env, cwd="/", capture_output=True).returncode == 0:
                return python
        except OSError:
            continue
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="Only root can become another user.")
def test_everything_works_for_an_unprivileged_user(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    python = interpreter_for(nobody.pw_uid)
    if python is None:
        pytest.skip("There is no Python that the user nobody may execute.")
    folder = Path("/tmp") / f"cloudagent-{os.urandom(8).hex()}"
    folder.mkdir(mode=0o700)
    try:
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        done = subprocess.run(
            [python, "-c", IN_A_SANDBOX, str(folder)],
            user=nobody.pw_uid,
            group=nobody.pw_gid,
            extra_groups=[],
            cwd="/",
            env={"PYTHONPATH": IMPORT_FROM},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    finally:
        shutil.rmtree(folder)
    assert done.stdout == "well done\n", done.stderr


def test_an_interpreter_behind_links_and_outside_of_the_librarys_prefix_works(
    tmp_path: Path,
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(tmp_path / "bin/second")
    (tmp_path / "bin/second").symlink_to(os.path.realpath(sys.executable))
    venv = [str(tmp_path / "bin/python3"), "-m", "venv", "--symlinks", "--without-pip", str(tmp_path / "venv")]
    subprocess.run(venv, env={}, check=True, capture_output=True, timeout=60)
    done = subprocess.run(
        [str(tmp_path / "venv/bin/python3"), "-c", IN_A_SANDBOX, str(tmp_path)],
        env={"PYTHONPATH": IMPORT_FROM},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout == "well done\n", done.stderr
