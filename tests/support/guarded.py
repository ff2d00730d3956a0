"""Runs a server for exactly as long as its starter lives: `guarded.py FOLDER USER_ID COMMAND...`.

Its standard input is a pipe from the starter. When that ends, however the starter may have died, the server is stopped
and its folder is deleted. A USER_ID of `-` leaves the user as it is. A line in the pipe is an order: the number of a
signal that the server is to end of, or `start` for another start of one that has ended.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

STOP_S = 5.0


def start(folder: Path, command: list[str], *, user_id: int | None = None) -> subprocess.Popen[bytes]:
    """Start a server whose folder is `folder`; what it prints goes to `log` there. It ends when this process does."""
    with (folder / "log").open("wb") as output:
        return subprocess.Popen(
            # -I -S: no site-packages are needed, and it starts in a few milliseconds
            [sys.executable, "-I", "-S", __file__, str(folder), "-" if user_id is None else str(user_id), *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
            # Its own session: a Ctrl-C, or a kill of the starter's whole process group, is not for it.
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End what `start` started, and wait until its folder is gone."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def order(process: subprocess.Popen[bytes], what: int | str) -> None:
    """Have the server ended with a signal of that number, or started again with `start`; does not wait for either."""
    assert process.stdin is not None
    process.stdin.write(f"{what}\n".encode())
    process.stdin.flush()


def main() -> None:
    folder, user_id, *command = sys.argv[1:]
    user = None if user_id == "-" else int(user_id)
    groups = None if user is None else ()

    def launch() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, user=user, group=user, extra_groups=groups
        )

    server = launch()
    for line in sys.stdin.buffer:
        if line.strip() == b"start":
            server = launch()
        else:
            server.send_signal(int(line))
            server.wait()
    server.send_signal(signal.SIGINT)  # to Postgres it means: do not wait for clients
    try:
        server.wait(STOP_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
