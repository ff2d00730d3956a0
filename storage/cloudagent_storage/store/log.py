"""How a line of a log becomes a row, and a row a line."""

# pyright: basic
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from peewee import chunked

from cloudagent_storage.records import Event, EventDraft, EventKind, Level
from cloudagent_storage.store.database import Database
from cloudagent_storage.tables import EventRow, storable_json

ROWS_PER_INSERT = 500


def write_lines(db: Database, task_id: str, last_seq: int, drafts: Sequence[EventDraft]) -> None:
    """Write lines of which the last has the number `last_seq`, which the task's row handed out in this transaction."""
    rows = [
        {
            "task_id": task_id,
            "seq": seq,
            "timestamp": db.now if draft.timestamp is None else draft.timestamp,
            "level": draft.level,
            "kind": draft.kind,
            "message": draft.message,
            "raw_json": _raw_text(draft.raw),
        }
        for seq, draft in enumerate(drafts, start=last_seq - len(drafts) + 1)
    ]
    for batch in chunked(rows, ROWS_PER_INSERT):
        db.tables.events.insert_many(batch).execute()


def line_of(row: EventRow, *, raw: bool) -> Event:
    """The record that users see."""
    return Event(
        seq=row.seq,
        timestamp=row.timestamp,
        level=Level(row.level),
        kind=cast(EventKind, row.kind),
        message=row.message,
        raw=json.loads(row.raw_json) if raw and row.raw_json is not None else None,
    )


def _raw_text(raw: Mapping[str, Any] | None) -> str | None:
    if raw is None:
        return None
    try:
        return json.dumps(storable_json(dict(raw)), separators=(",", ":"))
    except RecursionError:
        return None  # nested so deeply that nobody could read it either; the line itself is kept
