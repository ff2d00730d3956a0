"""A stand-in for Claude Code that costs one small process, and writes down what it does where a test can read it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar

from cloudagent_queue import talk
from cloudagent_queue.agents import REPOSITORY_FOLDER, RUN_FOLDER, result_of
from cloudagent_queue.sandboxes import Sandbox
from cloudagent_storage.records import TaskSpec, VerifyResult

PROGRAM = Path(__file__).with_name("standin_program.py")
TASK: ContextVar[str] = ContextVar("TASK")
"""The task whose agent is about to be started: set by the program that starts a worker, as no agent is told that."""


class StandIn:
    """The agent `claude` of a test's installation. Its prompt is JSON, see `standin_program.py`."""

    journal: ClassVar[Path]
    """The folder with a journal and a lock for each task; set by the program that starts a worker."""

    name = "claude"
    environment: Sequence[str] = ("ANTHROPIC_API_KEY",)

    def check_credential(self, env: Mapping[str, str]) -> None: ...

    def hosts(self, env: Mapping[str, str]) -> Sequence[str]:
        return ()

    def secrets(self, env: Mapping[str, str]) -> Sequence[str]:
        return ()

    def install(
        self, sandbox: Sandbox, spec: TaskSpec, *, number: int = 1, failed: VerifyResult | None = None, **_: Any
    ) -> None:
        whole = {
            "prompt": spec.prompt,
            "cwd": REPOSITORY_FOLDER,
            "journal": str(self.journal),
            "task": TASK.get(),
            "sandbox": sandbox.id,
            "number": number,
            "result": result_of(number),
            "failed": None if failed is None else failed.output,
        }
        sandbox.write(f"{RUN_FOLDER}/agent.py", PROGRAM.read_bytes())
        sandbox.write(f"{RUN_FOLDER}/request.json", json.dumps(whole).encode())

    def start(self, sandbox: Sandbox, *, env: Mapping[str, str], number: int = 1) -> None:
        # The journal's folder is in its environment, so that a process that is left over can be told from others'.
        marked = {"STANDIN_JOURNAL": str(self.journal)}
        sandbox.start([sandbox.python, "-I", "-S", f"{RUN_FOLDER}/agent.py"], env=marked, number=number)

    def tell(self, sandbox: Sandbox, message_id: str, message: Mapping[str, Any]) -> None:
        sandbox.write(f"{RUN_FOLDER}/inbox/{message_id}.json", json.dumps(message).encode())

    def session(self, sandbox: Sandbox, number: int = 1) -> bytes | None:
        return None


def who_asks_has_no_time_for_it(_: Mapping[str, Any]) -> None:
    """A hook: in this process a task's first question is one too many."""
    talk.QUESTIONS_MAX = 0
