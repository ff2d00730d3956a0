"""A conversation of Claude Code's, with nothing in it but what was said: for a machine that does not trust its origin.

Claude Code's transcript is a file of JSON lines. Beside the messages it holds what makes a program act when the
conversation is resumed: the permission mode, queued prompts, a deferred tool call, the worktree and the folder that it
moved to, file backups, the system prompt of earlier requests. None of this comes along. A record is taken over only if
its type is known, and of it only the fields that are named here; each gets the folder in which it is to go on.

Read from what Claude Code 2.1.330 writes, and from the table of record types in its program.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

from cloudagent_storage.errors import SessionMalformed, SessionTooLarge

LARGEST = 50_000_000
"""Bytes of a transcript; the runner collects no more."""
_LARGEST_WHOLE = 4 * LARGEST
"""Bytes of what is read at all: transcripts, in the longer form that they have within JSON."""
LARGEST_RECORD = 20_000_000
"""An image of the largest size that the API takes is 7 MB."""
MOST_RECORDS = 100_000

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")
_VERSION = re.compile(r"\d{1,5}\.\d{1,5}\.\d{1,5}")
_ID = re.compile(r"[\w.:-]{1,200}")
_BLOCKS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "thinking": ("thinking", "signature"),
    "redacted_thinking": ("data",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id", "content", "is_error"),
    "server_tool_use": ("id", "name", "input"),
    "web_search_tool_result": ("tool_use_id", "content"),
    "web_fetch_tool_result": ("tool_use_id", "content"),
    "tool_reference": ("tool_name",),
    "image": ("source",),
    "document": ("source", "title", "context"),
}
"""The parts that a message of the Messages API is made of."""
_COUNTS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
_OF_A_SUMMARY = ("trigger", "preTokens", "postTokens", "preservedSegment", "preservedMessages")


@dataclass(frozen=True)
class Conversation:
    """What was said, as a transcript that Claude Code resumes."""

    session_id: str
    data: bytes
    turns: int
    """How many messages it holds, of either side."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def read_conversation(session: bytes, *, folder: str, new_id: str | None = None) -> Conversation:
    """The conversation in what `Agent.session` collected, to go on in `folder`. The same input gives the same bytes.

    With a `new_id` it becomes a session of its own, which parts from the one that it was until now.
    Every message of its main thread is in it. What subagents said among themselves, and files beside the transcript,
    stay away: the main thread has their results. Raises `SessionMalformed` and `SessionTooLarge`.
    """
    session_id, text = _main_file(session)
    session_id = new_id or session_id
    lines: list[str] = []
    turns = 0
    stands_for: dict[str, str | None] = {}
    """For each record that was seen: the last one on the way to it that is kept."""
    last: str | None = None
    for record in _records(text):
        if record.get("isSidechain") is True:
            continue
        uuid, parent = record.get("uuid"), record.get("parentUuid")
        above = None if parent is None else stands_for.get(str(parent), last)
        try:
            kept = _KNOWN[str(record["type"])](record) if str(record.get("type")) in _KNOWN else None
        except RecursionError:
            raise SessionMalformed("A message of the session is nested too deeply.") from None
        if not _is(uuid, _UUID):
            if kept is not None:
                raise SessionMalformed("A message of the session has no id.")
            continue
        if kept is None:
            stands_for.setdefault(uuid, above)
            continue
        if uuid in stands_for:
            raise SessionMalformed("Two messages of the session have the same id.")
        if not _is(record.get("timestamp"), _TIME):
            raise SessionMalformed("A message of the session has no time.")
        written = {
            "parentUuid": above,
            "isSidechain": False,
            "userType": "external",
            "entrypoint": "cli",
            "cwd": folder,
            "sessionId": session_id,
            "version": record["version"] if _is(record.get("version"), _VERSION) else "0.0.0",
            "type": record["type"],
            **kept,
            "uuid": uuid,
            "timestamp": record["timestamp"],
        }
        stands_for[uuid] = last = uuid
        turns += record["type"] in ("user", "assistant")
        lines.append(_line(written))
    if not turns:
        raise SessionMalformed("The session holds no message.")
    return Conversation(session_id, "".join(lines).encode(), turns)


def count_turns(transcript: str) -> int:
    """How many messages of the main thread a transcript holds, whatever else is in it. Raises `SessionMalformed`."""
    return sum(
        record.get("type") in ("user", "assistant") and record.get("isSidechain") is not True
        for record in _records(transcript)
    )


def count_turns_of_session(session: bytes) -> int:
    """The same for what `Agent.session` collected. Raises `SessionMalformed` and `SessionTooLarge`."""
    return count_turns(_main_file(session)[1])


def as_session(session_id: str, transcript: str) -> bytes:
    """A transcript as `Agent.session` would have collected it."""
    whole = {"session_id": session_id, "files": {f"-session/{session_id}.jsonl": transcript}}
    return json.dumps(whole, ensure_ascii=False).encode("utf-8", "replace")


def without_costs(session: bytes) -> bytes:
    """The same session for another task, which pays for itself alone: Claude Code counts over a session's whole life.

    Raises `SessionMalformed` and `SessionTooLarge`.
    """
    session_id, _ = _main_file(session)
    found: dict[str, Any] = json.loads(session)
    main = f"/{session_id}.jsonl"
    files: dict[str, str] = {
        name: "\n".join(line for line in text.split("\n") if not line.startswith('{"type":"cost-state"'))
        if name.endswith(main)
        else text
        for name, text in found["files"].items()
    }
    return json.dumps({"session_id": session_id, "files": files}, ensure_ascii=False).encode("utf-8", "replace")


def _main_file(session: bytes) -> tuple[str, str]:
    """The session's id and its main transcript."""
    if len(session) > _LARGEST_WHOLE:
        raise SessionTooLarge()
    try:
        found = json.loads(session)
    except (ValueError, RecursionError):
        raise SessionMalformed() from None
    if not isinstance(found, dict):
        raise SessionMalformed()
    whole = cast("dict[str, Any]", found)
    session_id, files = whole.get("session_id"), whole.get("files")
    if not _is(session_id, _UUID) or not isinstance(files, dict):
        raise SessionMalformed("The session has no id that could be one.")
    named = cast("dict[str, Any]", files)
    main = [text for name, text in named.items() if re.fullmatch(rf"[\w-]+/{session_id}\.jsonl", name)]
    if len(main) != 1 or not isinstance(main[0], str):
        raise SessionMalformed("The session has no transcript, or several.")
    return session_id, main[0]


def _records(text: str) -> list[dict[str, Any]]:
    lines = text.split("\n")
    if len(lines) > MOST_RECORDS or len(text) > LARGEST or any(len(line) > LARGEST_RECORD for line in lines):
        raise SessionTooLarge()
    try:
        records = [json.loads(line) for line in lines if line.strip()]
    except (ValueError, RecursionError):
        raise SessionMalformed("A line of the session is no JSON.") from None
    if not all(isinstance(record, dict) for record in records):
        raise SessionMalformed("A line of the session is no record.")
    return cast("list[dict[str, Any]]", records)


def _line(record: Mapping[str, Any]) -> str:
    try:
        return json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"
    except (ValueError, RecursionError):
        raise SessionMalformed("A message of the session cannot be written down.") from None


def _is(value: object, pattern: re.Pattern[str]) -> TypeGuard[str]:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


# -- the types of records that are known: of each, what is kept, or None --------------------------------------------


def _user(record: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {"message": {"role": "user", "content": _content(_message(record, "user"))}}
    for name in ("promptId", "sourceToolAssistantUUID"):
        if _is(record.get(name), _UUID):
            kept[name] = record[name]
    if record.get("isCompactSummary") is True:
        # Only there: else a message could be seen by the model and not by its user.
        kept |= {"isCompactSummary": True, "isVisibleInTranscriptOnly": True}
    return kept


def _assistant(record: Mapping[str, Any]) -> dict[str, Any]:
    message = _message(record, "assistant")
    kept: dict[str, Any] = {"type": "message", "role": "assistant", "content": _content(message)}
    for name in ("id", "model", "stop_reason", "stop_sequence"):
        value = message.get(name)
        if value is None or _is(value, _ID):
            kept[name] = value
    usage = message.get("usage")
    counts = cast("dict[str, Any]", usage) if isinstance(usage, dict) else {}
    kept["usage"] = {name: _count(counts.get(name)) for name in _COUNTS}
    failed = {"isApiErrorMessage": True} if record.get("isApiErrorMessage") is True else {}
    return {"message": kept, **failed}


def _attachment(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of all that is attached, what the user said while the agent worked; the rest tells of the sandbox."""
    attached = record.get("attachment")
    said = cast("dict[str, Any]", attached) if isinstance(attached, dict) else {}
    if said.get("type") != "queued_command":
        return None
    return {
        "attachment": {
            "type": "queued_command",
            "prompt": _content({"content": said.get("prompt")}),
            "commandMode": "prompt",
        }
    }


def _system(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The place up to which a summary stands for what was said."""
    if record.get("subtype") != "compact_boundary":
        return None
    about = record.get("compactMetadata")
    metadata = cast("dict[str, Any]", about) if isinstance(about, dict) else {}
    kept = {name: metadata[name] for name in _OF_A_SUMMARY if _is_plain(metadata.get(name))}
    return {
        "subtype": "compact_boundary",
        "content": "Conversation compacted",
        "level": "info",
        "compactMetadata": kept,
    }


_KNOWN: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any] | None]] = {
    "user": _user,
    "assistant": _assistant,
    "attachment": _attachment,
    "system": _system,
}


def _message(record: Mapping[str, Any], role: str) -> dict[str, Any]:
    message = record.get("message")
    if not isinstance(message, dict) or cast("dict[str, Any]", message).get("role") != role:
        raise SessionMalformed("A message of the session is not of the side that it says.")
    return cast("dict[str, Any]", message)


def _content(message: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise SessionMalformed("A message of the session has no content.")
    return [_block(block) for block in cast("list[Any]", content)]


def _block(block: Any) -> dict[str, Any]:
    """A part of a message; one of an unknown type leaves a note, so that nothing is missed unnoticed."""
    if not isinstance(block, dict):
        raise SessionMalformed("A part of a message of the session is none.")
    found = cast("dict[str, Any]", block)
    kind = found.get("type")
    if (
        not isinstance(kind, str)
        or kind not in _BLOCKS
        or (kind in ("image", "document") and not _is_inline(found.get("source")))
    ):
        named = kind if _is(kind, _ID) else "unknown"
        return {"type": "text", "text": f"[Left out by cloudagent, which does not bring home such a part: {named}]"}
    kept = {name: found[name] for name in _BLOCKS[kind] if name in found}
    if kind == "tool_result" and isinstance(kept.get("content"), list):
        kept["content"] = [_block(inner) for inner in kept["content"]]
    return {"type": kind, **kept}


def _is_inline(source: Any) -> bool:
    """Does it hold the data itself, so that nothing is fetched from anywhere?"""
    return isinstance(source, dict) and cast("dict[str, Any]", source).get("type") in ("base64", "text")


def _is_plain(value: Any) -> bool:
    """A number, a word, or ids of messages by name."""
    if isinstance(value, dict):
        named = cast("dict[str, Any]", value)
        return all(_is(name, _ID) and (_is(ids, _UUID) or _are_ids(ids)) for name, ids in named.items())
    return isinstance(value, int) or _is(value, _ID)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(_is(one, _UUID) for one in cast("list[Any]", value))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0
