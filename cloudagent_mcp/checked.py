"""What was checked of a result, and what was not, in a sentence: the same wherever a task is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloudagent_mcp.untrusted import clean

COMMAND_MAX = 60
UNCHECKED = "Nothing has checked this result: all there is is the agent's word."


def what_was_checked(verdict: str | None, verify: Mapping[str, Any] | None) -> str:
    """`verify` is as REST answers it, perhaps a server's of another version; its output is not looked at."""
    if verify is None or verdict not in ("passed", "failed"):
        return UNCHECKED
    # It may come from the repository: one line that cannot leave its quotes.
    command = " ".join(clean(str(verify["command"])).replace("`", "'").split())
    command = command if len(command) <= COMMAND_MAX else f"{command[:COMMAND_MAX]}…"
    tries = verify.get("tries") or 1
    if verdict == "passed":
        how = "passed in a clean checkout"
    elif verify["exit_code"] is None:
        how = "did not end in time in a clean checkout"
    else:
        how = f"failed in a clean checkout with exit code {verify['exit_code']}"
    return f"`{command}` {how}{f', on try {tries}' if tries > 1 else ''}."
