"""What runs in a sandbox. An agent is one file here and one line in `AGENTS`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from cloudagent_queue.sandboxes import Sandbox
from cloudagent_storage.records import TaskSpec, Usage, VerifyResult

UNUSED = Usage()
RUN_FOLDER = "run"
"""The folder, under a sandbox's root, where worker and runner meet: request.json, events.jsonl, inbox/, result.json."""
REPOSITORY_FOLDER = "repository"
"""The folder, under a sandbox's root, where the agent works."""
EVENTS = f"{RUN_FOLDER}/events.jsonl"
RESULT = f"{RUN_FOLDER}/result.json"


def result_of(number: int) -> str:
    """The file in which the runner says how it ended that was the `number`-th to be started for a task, from 1."""
    return RESULT if number == 1 else f"{RUN_FOLDER}/result_{number}.json"


class Agent(Protocol):
    """Starts one kind of agent in a sandbox; what it does there arrives through the files in `RUN_FOLDER`."""

    name: str
    environment: Sequence[str]
    """The variables of its user's environment that it can use, credentials among them."""

    def check_credential(self, env: Mapping[str, str]) -> None:
        """Raises `CredentialMissing` when nothing in `env` lets the agent reach a model."""
        ...

    def with_key(self, env: Mapping[str, str], key: str) -> dict[str, str]:
        """What of `env` is no credential, and this key for the model."""
        ...

    def secrets(self, env: Mapping[str, str]) -> Sequence[str]:
        """The values in `env` that must never be seen in a log."""
        ...

    def hosts(self, env: Mapping[str, str]) -> Sequence[str]:
        """Where its model is, as entries of an allow-list: the hosts without which it cannot work."""
        ...

    def install(
        self,
        sandbox: Sandbox,
        spec: TaskSpec,
        *,
        session: bytes | None = None,
        interrupted: bool = False,
        goes_on: bool = False,
        used: Usage = UNUSED,
        number: int = 1,
        failed: VerifyResult | None = None,
    ) -> None:
        """Put the runner and its request.json into the sandbox.

        `goes_on` says that an agent has worked on this task in an earlier sandbox; what is left of its work is in the
        repository. `session` is what was said, as `session` answered, and `used` what it has cost. The task's own agent
        has said it where it was `interrupted`; else an earlier task's, and this task's prompt is the next word.
        With a `number` above 1 the agent had been done before, and goes on since what it had done `failed`, which it is
        told.
        """
        ...

    def start(self, sandbox: Sandbox, *, env: Mapping[str, str], number: int = 1) -> None:
        """Start it, detached; see `Sandbox.start`."""
        ...

    def tell(self, sandbox: Sandbox, message_id: str, message: Mapping[str, Any]) -> None:
        """Put a message into the running agent's inbox."""
        ...

    def session(self, sandbox: Sandbox, number: int = 1) -> bytes | None:
        """The conversation's files, as far as it has come, as one JSON document, so that it can go on elsewhere.

        `number` is the last that was started.
        """
        ...


AGENTS: Mapping[str, tuple[str, str]] = {
    "claude": ("cloudagent_queue.agents.claude", "Claude"),
    "none": ("cloudagent_queue.agents.none", "NoAgent"),
}


def open_agent(name: str) -> Agent:
    """The agent of that name; its module is only imported now. Raises KeyError for an unknown one."""
    module, attribute = AGENTS[name]
    return cast(Agent, getattr(importlib.import_module(module), attribute)())
