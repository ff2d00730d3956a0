"""No agent at all: for a task of which only the set-up and the `verify` command are wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cloudagent_queue.agents import RESULT, RUN_FOLDER, UNUSED
from cloudagent_queue.sandboxes import Sandbox
from cloudagent_storage.records import TaskSpec, Usage, VerifyResult

_PROGRAM = f"{RUN_FOLDER}/nothing.py"
_DONE = f"""\
import json, os
with open("{RESULT}.new", "w") as file:
    json.dump({{"outcome": "completed"}}, file)
os.replace("{RESULT}.new", "{RESULT}")
"""


class NoAgent:
    """Does nothing, and says so where an agent's result is looked for."""

    name = "none"
    environment: Sequence[str] = ()

    def check_credential(self, env: Mapping[str, str]) -> None:
        """It needs none."""

    def with_key(self, env: Mapping[str, str], key: str) -> dict[str, str]:
        """Without the key."""
        return dict(env)

    def secrets(self, env: Mapping[str, str]) -> Sequence[str]:
        return ()

    def hosts(self, env: Mapping[str, str]) -> Sequence[str]:
        return ()

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
        sandbox.write(_PROGRAM, _DONE.encode())

    def start(self, sandbox: Sandbox, *, env: Mapping[str, str], number: int = 1) -> None:
        sandbox.start([sandbox.python, "-I", _PROGRAM], env=env, number=number)

    def tell(self, sandbox: Sandbox, message_id: str, message: Mapping[str, Any]) -> None:
        """Nobody listens, and it ends at once."""

    def session(self, sandbox: Sandbox, number: int = 1) -> bytes | None:
        return None
