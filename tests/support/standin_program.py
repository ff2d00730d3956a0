"""What the stand-in starts in a sandbox: an agent that takes steps and leaves a trace. Standard library only.

The prompt is a JSON object; all of it may be left out:

    steps, step_s       how many steps (10), and how long each takes (0.1). A step is what would be a call of the model:
                        one line in the journal, then one file in the repository, then one event
    events              how many events a step writes (1)
    pad                 how many more characters each event has (0)
    gate                before the last step, wait until a file of this name is in the journal's folder
    die_at              the step at which it kills itself, without a result
    ask_at              the step before which it asks its user a question, and waits for the answer
    hang_at             the step at which it says nothing more, though it obeys a stop
    ignore_stop         it does not obey, SIGTERM neither
    mend                what each retry does in place of that: a list of objects like this one, the last one for all
                        that follow; the files of a retry are named `retry_N_step_M.txt`
    undo                it begins with deleting all files that are there
    fail_with           a code: it ends with this error, after its steps
    die_worker          the step from which on it kills every worker that follows it, and says nothing more; on this
                        machine only, as a sandbox elsewhere has no such processes

The journal is `<folder>/<task>.jsonl`. Each line has `what`, `pid`, `sandbox`, `number` (of the run) and `at`, the
machine's monotonic time: `start` (with `failed`, what the verify printed that it is to mend), `call` (with `step`),
`asked`, `told` (with what came in, and `late` for what was no answer to it), `killed_worker`, `stop`, `end` (with
`outcome` and `events`), and `overlap` instead of `start` where another agent of the same task lives, which is known by
a lock that an agent holds for its life.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

OVERLAP = 75


class Agent:
    def __init__(self, request: dict[str, Any]) -> None:
        self.prompt: dict[str, Any] = json.loads(request["prompt"])
        self.request, self.number = request, int(request["number"])
        self.prefix = "" if self.number == 1 else f"retry_{self.number - 1}_"
        if self.number > 1 and (mend := self.prompt.get("mend")):
            self.prompt = mend[min(self.number - 2, len(mend) - 1)]
        self.folder = Path(request["journal"])
        self.task: str = request["task"]
        self.sandbox: str = request["sandbox"]
        self.repository = Path(request["cwd"])
        self.journal = os.open(self.folder / f"{self.task}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.log = os.open("run/events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        # Where an earlier run of this sandbox wrote, its numbers go on.
        self.events = Path("run/events.jsonl").read_bytes().count(b"\n")
        self.stopped = False
        self.question: str | None = None

    def note(self, what: str, **more: Any) -> None:
        line = {"what": what, "pid": os.getpid(), "sandbox": self.sandbox, "number": self.number}
        line |= {"at": time.monotonic(), **more}
        os.write(self.journal, json.dumps(line).encode() + b"\n")

    def run(self) -> None:
        # Kept open until the process is gone, and so the lock.
        lock = os.open(self.folder / f"{self.task}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.note("overlap")
            os._exit(OVERLAP)
        if self.prompt.get("ignore_stop"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.note("start", failed=self.request["failed"])
        steps = int(self.prompt.get("steps", 10))
        for file in self.repository.glob("*.txt") if self.prompt.get("undo") else ():
            file.unlink()
        for step in range(steps):
            if step == steps - 1 and (gate := self.prompt.get("gate")):
                while not (self.folder / gate).exists() and not self.stopped:
                    self.rest(0.02)
            if self.stopped:
                break
            self.take(step)
        code = self.prompt.get("fail_with")
        outcome = "stopped" if self.stopped else "failed" if code else "completed"
        self.note("end", outcome=outcome, events=self.events)
        result: dict[str, Any] = {
            "outcome": outcome,
            "error": {"code": code, "message": "It was to fail."} if code else None,
            "summary": f"{steps} steps",
            "model": "stand-in",
            "usage": self.prompt.get("usage", {}),
        }
        fresh = Path(f"{self.request['result']}.new")
        fresh.write_text(json.dumps(result))
        fresh.replace(self.request["result"])

    def take(self, step: int) -> None:
        if step == self.prompt.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.prompt.get("ask_at"):
            self.ask()
            if self.stopped:
                return
        while step == self.prompt.get("hang_at") and not self.stopped:
            self.rest(0.05)
        if step == self.prompt.get("die_worker"):
            self.kill_workers()
        self.note("call", step=step)
        (self.repository / f"{self.prefix}step_{step}.txt").write_text(f"step {step}\n")
        for _ in range(int(self.prompt.get("events", 1))):
            self.say(f"step {step}" + "." * int(self.prompt.get("pad", 0)))
        self.rest(float(self.prompt.get("step_s", 0.1)))

    def ask(self) -> None:
        self.question = f"q_{os.urandom(6).hex()}"
        self.note("asked", question_id=self.question)
        self.say("Which one?", kind="question", question_id=self.question, choices=["this", "that"])
        while self.asks() and not self.stopped:
            self.rest(0.05)

    def asks(self) -> bool:
        return self.question is not None

    def say(self, message: str, *, kind: str = "text", **raw: Any) -> None:
        event = {
            "seq": self.events + 1,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "kind": kind,
            "level": "info",
            "message": message,
            "raw": {"number": self.events, **raw},
        }
        self.events += 1
        line = json.dumps(event).encode() + b"\n"
        while line:
            line = line[os.write(self.log, line) :]

    def rest(self, seconds: float) -> None:
        """Wait, and obey the inbox meanwhile."""
        deadline = time.monotonic() + seconds
        while True:
            self.look()
            left = deadline - time.monotonic()
            if left <= 0 or self.stopped:
                return
            time.sleep(min(0.05, left))

    def look(self) -> None:
        for file in sorted(Path("run/inbox").glob("*.json")):
            message = json.loads(file.read_bytes())
            if message["kind"] != "stop":
                self.take_in(file, message)
            elif message["number"] == self.number and not self.prompt.get("ignore_stop"):
                if not self.stopped:
                    self.note("stop")
                self.stopped = True

    def take_in(self, file: Path, message: dict[str, Any]) -> None:
        """What the user says, once for each name of a file, as the runner does it."""
        done = file.with_suffix(".json.read")
        again = done.exists()
        file.replace(done)
        if again:
            return
        answers = message["kind"] == "answer" and message["question_id"] == self.question
        self.note("told", file=file.stem, late=not answers, **message)
        self.say(message["text"], kind="answer" if answers else "user")
        if answers:
            self.question = None

    def kill_workers(self) -> None:
        """Kill whoever begins to follow this task, one second later: by then it has read all that there is."""
        notice = self.folder / f"{self.task}.follower"
        while not self.stopped:
            self.rest(0.05)
            try:
                pid = int(notice.read_text())
                notice.unlink()
            except (FileNotFoundError, ValueError):
                continue
            self.rest(1.0)
            self.note("killed_worker", worker=pid)
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    Agent(json.loads(Path("run/request.json").read_bytes())).run()
