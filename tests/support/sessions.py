"""Sessions as Claude Code leaves them behind, and as somebody hostile would."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

SESSION_ID = "6f1c0d3a-0000-4000-8000-0000000000aa"
NAME = f"-sandbox-repository/{SESSION_ID}.jsonl"
COMMON = {
    "isSidechain": False,
    "userType": "external",
    "entrypoint": "sdk-py",
    "cwd": "/sandbox/repository",
    "sessionId": SESSION_ID,
    "version": "2.1.330",
    "gitBranch": "task/abcdefgh",
}


def uuid(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def record(number: int, kind: str, parent: int | None = None, **more: Any) -> dict[str, Any]:
    """A record with what all have; its id is its number."""
    above = None if parent is None else uuid(parent)
    at = f"2026-11-25T10:00:{number % 60:02d}.000Z"
    return {"parentUuid": above, **COMMON, "type": kind, "uuid": uuid(number), "timestamp": at, **more}


def user(number: int, content: Any, parent: int | None = None, **more: Any) -> dict[str, Any]:
    return record(number, "user", parent, message={"role": "user", "content": content}, **more)


def assistant(number: int, *blocks: Mapping[str, Any], parent: int | None = None, **more: Any) -> dict[str, Any]:
    message = {
        "id": f"msg_{number}",
        "type": "message",
        "role": "assistant",
        "model": "claude-opus-5-5",
        "content": list(blocks),
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 10, "output_tokens": 5},
    }
    return record(number, "assistant", parent, message=message, **more)


def told(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def attached(number: int, parent: int, **attachment: Any) -> dict[str, Any]:
    return record(number, "attachment", parent, attachment=attachment)


HONEST: Sequence[dict[str, Any]] = (
    user(1, "Fix add", permissionMode="bypassPermissions"),
    assistant(2, {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": "ls"}}, parent=1),
    user(
        3,
        [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "calc.py"}],
        2,
        permissionDecision={"decision": "accept", "source": "config"},
        toolUseResult={"stdout": "calc.py"},
    ),
    assistant(4, told("Fixed."), parent=3),
)


def session(
    records: Sequence[Any] = HONEST, *, session_id: Any = SESSION_ID, files: Mapping[str, Any] | None = None
) -> bytes:
    """What a runner collects."""
    lines = "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in records)
    named = {NAME: lines} if files is None else files
    return json.dumps({"session_id": session_id, "files": named}).encode()
