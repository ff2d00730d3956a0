"""Huey as it comes, beside which the product's own queue is measured: neither JSON nor waking is in it."""

# pyright: basic
from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from huey import RedisHuey, SqliteHuey
from huey.consumer import Consumer

from tests.support.worlds import until

ROOT = Path(__file__).parents[2]
THREADS = 4


def latencies(kind: str, where: str, out: Path, *, submits: int, gap_s: float) -> list[float]:
    """From each enqueue to the start of the task in another process, in seconds; `kind` is "redis" or "sqlite"."""

    def noted() -> dict[int, float]:
        lines = out.read_text().splitlines() if out.exists() else []
        return {int(number): float(at) for number, at in (line.split() for line in lines)}

    huey, note = _huey(kind, where, out)
    consume = "from tests.support.bare_huey import consume; consume()"
    consumer = subprocess.Popen(
        [sys.executable, "-c", consume, kind, where, str(out)],
        env={"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    try:
        note(-1)
        until(lambda: -1 in noted(), "huey's consumer is up")
        sent: list[float] = []
        for number in range(submits):
            sent.append(time.monotonic())
            note(number)
            time.sleep(gap_s)
        until(lambda: len(noted()) == submits + 1, "huey has run all")
    finally:
        consumer.terminate()
        consumer.wait(20)
        storage: Any = huey.storage
        if kind == "sqlite":
            storage.close()
        else:
            storage.pool.disconnect()
    at = noted()
    return [at[number] - sent[number] for number in range(submits)]


def consume() -> None:
    kind, where, out = sys.argv[1:]
    huey, _ = _huey(kind, where, Path(out))
    Consumer(huey, workers=THREADS, periodic=False).run()


def _huey(kind: str, where: str, out: Path):
    if kind == "redis":
        huey = RedisHuey("bare", url=where, results=False)
    else:
        huey = SqliteHuey("bare", filename=where, results=False)

    @huey.task(name="note")
    def note(number: int) -> None:
        now = time.monotonic()
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(file, f"{number} {now}\n".encode())
        os.close(file)

    return huey, note
