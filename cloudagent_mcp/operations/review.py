"""Comments on lines of a diff, which go back to the agent that made it as one message."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from cloudagent_mcp.operations import Caller, Operation, in_thread, operation
from cloudagent_mcp.operations.diffs import DiffFile, DiffLine, files_of
from cloudagent_mcp.operations.messages import MESSAGE_MAX
from cloudagent_mcp.operations.submission import PROMPT_MAX
from cloudagent_mcp.operations.tasks import TaskId, advise
from cloudagent_mcp.untrusted import clean, cut, named
from cloudagent_storage.errors import InvalidInput, NoChanges, NotInDiff, OutOfRange, TaskEnded
from cloudagent_storage.records import Task, TaskSpec

if TYPE_CHECKING:
    from cloudagent_storage.store import Store

COMMENTS_MAX = 50
TEXT_MAX = 4000
LINE_MAX = 10_000_000
BEFORE, AFTER = 3, 2
"""How many lines of the diff are quoted before and after the one that is meant."""
QUOTED_MAX = 300
"""Characters of each of them."""
NEAR = 3
"""How many files, or lines, are named where there is no such one."""
STAYS = ("on_interrupt", "timeout_minutes", "max_turns", "max_budget_usd", "tags", "priority")
"""Of a task that is gone on from, beside what stays with every such task."""


class Comment(BaseModel):
    """What its user says of a file, or of a line of it."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    file: str = Field(min_length=1, max_length=4096)
    line: int | None = Field(default=None, ge=-LINE_MAX, le=LINE_MAX)
    text: str = Field(min_length=1, max_length=TEXT_MAX)


TOLD = {
    "type": "object",
    "properties": {
        "file": {"type": "string"},
        "line": {"type": "integer", "description": "-N: deleted"},
        "text": {"type": "string"},
    },
    "required": ["file", "text"],
}


class Commented(Task):
    """The task whose agent reads the comments: the one that was commented on, or another that goes on from it."""

    outcome: Literal["told", "answered", "follow_up"]
    """`told` at its next turn; `answered` its question with them; or a new task, as the old one had ended."""


class Placed(NamedTuple):
    """A comment, and what of the diff it is about."""

    comment: Comment
    quoted: Sequence[DiffLine]


class Review:
    """Comments on what tasks have changed."""

    def __init__(self, store: Callable[[], Store], submit_task: Operation) -> None:
        """`store` is opened when it is first needed."""
        self._store = store
        self._submit_task = submit_task

    @operation("POST", "/tasks/{task_id}/comments", title="Review a diff", open_world=True)
    async def comment_task(
        self,
        caller: Caller,
        *,
        task_id: TaskId,
        comments: Annotated[
            list[Annotated[Comment, WithJsonSchema(TOLD)]], Field(min_length=1, max_length=COMMENTS_MAX)
        ],
        message: Annotated[str | None, Field(max_length=TEXT_MAX)] = None,
    ) -> Commented:
        """Have an agent mend its diff; after its end, in a follow-up task.

        All or nothing: what is not in the diff is refused. Of a task that has not ended there is no diff yet: files and
        lines are passed on as they are. Raises `NotInDiff`, `NoChanges`, and what send_message and submit_task raise.
        """
        for number, comment in enumerate(comments, 1):
            if comment.line == 0:
                raise OutOfRange(f"Comment {number}: lines count from 1.", field="comments")
            if not clean(comment.text).strip():
                raise InvalidInput(f"Comment {number} is empty.", remedy="Say something.", field="comments")
        task = await in_thread(lambda: self._store().tasks.get(caller.account_id, task_id))
        if not task.status.terminal:
            try:
                return await in_thread(lambda: self._tell(caller, task_id, comments, message))
            except TaskEnded:  # in this moment
                pass
        task, spec, placed = await in_thread(lambda: self._place(caller, task_id, comments))
        asked = {
            "prompt": _within(composed(placed, message, ended=True), PROMPT_MAX),
            "title": cut(f"Review: {task.title}", 150),
            "continue_task_id": task_id,
            **spec.model_dump(mode="json", include=set(STAYS)),
        }
        submitted: Task = await self._submit_task.call(caller, asked)
        step = f"The task had ended: {submitted.task_id} goes on from it with the comments. {submitted.next_action}"
        return Commented.model_validate({**dict(submitted), "next_action": step, "outcome": "follow_up"})

    def _tell(self, caller: Caller, task_id: str, comments: Sequence[Comment], message: str | None) -> Commented:
        text = _within(composed([Placed(each, ()) for each in comments], message, ended=False), MESSAGE_MAX)
        store = self._store()
        said = store.messages.add(caller.account_id, task_id, text)
        task = advise(store.tasks.get(caller.account_id, task_id))
        outcome = "told" if said.answers is None else "answered"
        return Commented.model_validate({**dict(task), "outcome": outcome})

    def _place(
        self, caller: Caller, task_id: str, comments: Sequence[Comment]
    ) -> tuple[Task, TaskSpec, Sequence[Placed]]:
        store, account_id = self._store(), caller.account_id
        task = store.candidates.choose(account_id, task_id)
        diff = store.blobs.get(account_id, task.task_id, "diff")
        if diff is None:
            raise NoChanges()
        return task, store.tasks.spec(account_id, task_id), place(diff.decode("utf-8", "replace"), comments)


def place(diff: str, comments: Sequence[Comment]) -> list[Placed]:
    """What of a diff each comment is about. Raises `NotInDiff`, naming what is near."""
    files = {file.path: (file, lines) for file, lines in files_of(diff)}
    placed: list[Placed] = []
    for number, comment in enumerate(comments, 1):
        if comment.file not in files:
            raise NotInDiff(f"Comment {number}: the task changed no file of that name.", remedy=_near(comment, files))
        file, lines = files[comment.file]
        if comment.line is None:
            placed.append(Placed(comment, ()))
            continue
        at = next((index for index, line in enumerate(lines) if line.number == comment.line), None)
        if at is None:
            raise _no_such_line(number, comment.line, file, lines)
        placed.append(Placed(comment, _around(lines, at)))
    return placed


def composed(placed: Sequence[Placed], message: str | None, *, ended: bool) -> str:
    """The one message that an agent gets.

    What is quoted was written by whoever wrote these files: each of its lines has a mark before it that no line of a
    file can leave out, so that none passes for a comment.
    """
    what = "1 comment" if len(placed) == 1 else f"{len(placed)} comments"
    if ended:
        head = f"Your user has reviewed your changes and has {what}. See to each; your diff is quoted as it was."
    else:
        head = f"Your user has {what} on files that you work on. Their lines may have moved since they were looked at."
    parts = [head]
    if message is not None and message.strip():
        parts.append(message.strip())
    for number, (comment, quoted) in enumerate(placed, 1):
        lines = [f"{number}. {_place_of(comment)}:"]
        lines += [_quoted(line, meant=line.number == comment.line) for line in quoted]
        lines += [f"   {line}" for line in comment.text.strip().splitlines()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _place_of(comment: Comment) -> str:
    name = comment.file if comment.file.isprintable() else json.dumps(comment.file)
    if comment.line is None:
        return name
    return f"{name}, line {comment.line}" if comment.line > 0 else f"{name}, deleted line {-comment.line}"


def _quoted(line: DiffLine, *, meant: bool) -> str:
    text = cut(" ".join(clean(line.text).split("\n")), QUOTED_MAX)
    return f"   {'>' if meant else ' '} {line.number:>6} |{line.mark}{text}".rstrip()


def _around(lines: Sequence[DiffLine], at: int) -> Sequence[DiffLine]:
    """A line and those beside it, as far as none is left out between them."""
    first = last = at
    while first > 0 and at - first < BEFORE and _adjoin(lines[first - 1], lines[first]):
        first -= 1
    while last + 1 < len(lines) and last - at < AFTER and _adjoin(lines[last], lines[last + 1]):
        last += 1
    return lines[first : last + 1]


def _adjoin(one: DiffLine, other: DiffLine) -> bool:
    """Are two neighbours in a list neighbours in the files as well?"""
    if one.new is not None and other.new is not None:
        return other.new == one.new + 1
    if one.old is not None and other.old is not None:
        return other.old == one.old + 1
    return True  # one was added and the other deleted, which is within one hunk


def _near(comment: Comment, files: dict[str, tuple[DiffFile, list[DiffLine]]]) -> str:
    near = difflib.get_close_matches(comment.file, list(files), n=NEAR, cutoff=0.5) or list(files)
    return f"In the diff is {named(near, most=NEAR)}; get_task_diff(stat_only=true) lists all."


def _no_such_line(number: int, wanted: int, file: DiffFile, lines: Sequence[DiffLine]) -> NotInDiff:
    if not lines:
        why = "is binary" if file.binary else "has no lines in the diff"
        return NotInDiff(
            f"Comment {number}: the file {why}.", remedy="Leave the line out, to comment on it as a whole."
        )
    what = "deleted lines" if wanted < 0 else "lines of the new file"
    same = [line.number for line in lines if (line.number < 0) == (wanted < 0)]
    near = sorted(sorted(same, key=lambda each: abs(each - wanted))[:NEAR])
    remedy = (
        f"The nearest {what} that are in it: {', '.join(map(str, near))}."
        if near
        else f"It has no {what}; {'name one of the new file' if wanted < 0 else 'deleted ones are named -N'}."
    )
    return NotInDiff(
        f"Comment {number}: the diff of that file does not show that line.",
        remedy=f"{remedy} Or leave the line out, to comment on the file as a whole.",
    )


def _within(text: str, most: int) -> str:
    if len(text) > most:
        raise OutOfRange(
            f"The comments make a message of {len(text)} characters with what they quote; the limit is {most}.",
            remedy="Make fewer or shorter ones in one call.",
            field="comments",
        )
    return text
