"""Asking the person at the client, in both eras of the protocol.

Since 2026-07-28 a call answers with what it wants to ask, and is made once more with the answers (an
`InputRequiredResult`, whose state the SDK seals and binds to the call); before, the server asks in the middle of the
call, which takes a connection on which it can. Where neither is possible nothing is asked, and the answer or the
refusal says what the model can do instead.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mcp.server.mcpserver import Context
from mcp.shared.exceptions import MCPError
from mcp.types import ElicitRequest, ElicitRequestFormParams, ElicitResult, InputRequiredResult
from mcp_types.version import is_version_at_least

from cloudagent_mcp.operations import Caller, Operation, check_arguments
from cloudagent_mcp.untrusted import clean, cut
from cloudagent_storage.errors import ConfirmationNeeded, InvalidInput, NotFound, NotNow, SecretsFound
from cloudagent_storage.records import Task

Asking = Callable[[Operation, Caller, dict[str, Any], Context[Any, Any]], Awaitable[Any]]
"""How an operation is called by somebody who can be asked: its answer, or the `InputRequiredResult` to return."""

IN_ANSWERS = "2026-07-28"
"""Since this version a call asks by its answer."""
ASKED_AT_ONCE = 5
FILES_SHOWN = 50
"""Nobody agrees to what was not shown."""
WAITS = {"get_task": "wait_seconds", "wait_tasks": "timeout_seconds"}


def asking(operation: Operation, operations: Mapping[str, Operation]) -> Asking:
    """How a tool calls its operation."""
    if operation.name in WAITS:
        return QuestionRelay(operations["send_message"])
    return CONFIRMED[operation.name] if operation.name in CONFIRMED else call_plainly


async def call_plainly(operation: Operation, caller: Caller, arguments: dict[str, Any], _: Context[Any, Any]) -> Any:
    return await operation.call(caller, arguments)


class QuestionRelay:
    """Puts the questions of the agents that a call waits for to the person, and sends the answers on."""

    def __init__(self, send_message: Operation) -> None:
        self._send = send_message

    async def __call__(
        self, operation: Operation, caller: Caller, arguments: dict[str, Any], context: Context[Any, Any]
    ) -> Any:
        """The operation's answer; once anybody was asked, without any further waiting.

        A question that the person does not answer stays open, and is not asked again by the same call.
        """
        if not can_ask(context):
            return await operation.call(caller, arguments)
        check_arguments(operation.arguments, arguments)
        at_once = {**arguments, WAITS[operation.name]: 0}
        asked, said = _earlier_round(context)
        if asked is None:
            answer = await operation.call(caller, at_once)
            if not (forms := _questions(answer)) and at_once != arguments:
                answer = await operation.call(caller, arguments)
                forms = _questions(answer)
            if not forms:
                return answer
            asked = {form.key: form.about for form in forms}
            said = await _ask(context, forms)
            if isinstance(said, InputRequiredResult):
                return said
        for key, result in said.items():
            answered = (result.content or {}).get("answer") if result.action == "accept" else None
            if key in asked and isinstance(answered, str):
                task_id, question_id = asked[key]
                message = {"task_id": task_id, "question_id": question_id, "message": answered}
                # Somebody else may have been quicker, and a text may be empty: the answer below says how it stands.
                with contextlib.suppress(NotNow, NotFound, InvalidInput):
                    await self._send.call(caller, message)
        return await operation.call(caller, at_once)


@dataclass(frozen=True)
class Confirmation:
    """An operation for which the person agrees to each file that it is refused for.

    Where a person can be asked, what the model names in `argument` is not enough.
    """

    refusal: type[ConfirmationNeeded] | type[SecretsFound]
    argument: str
    question: str
    agree: str
    refused: str
    by_hand: str

    async def __call__(
        self, operation: Operation, caller: Caller, arguments: dict[str, Any], context: Context[Any, Any]
    ) -> Any:
        """Raises `refusal` when the person does not agree."""
        if not can_ask(context) or not caller.local:
            return await operation.call(caller, arguments)
        if check_arguments(operation.arguments, arguments).get("dry_run"):
            return await operation.call(caller, arguments)
        asked, said = _earlier_round(context)
        if asked is None:
            try:
                return await operation.call(caller, {**arguments, self.argument: []})
            except self.refusal as refusal:
                if not 0 < len(refusal.files) <= FILES_SHOWN:
                    refusal.remedy = self.by_hand
                    raise
                form = self._form(refusal)
            asked = {form.key: form.about}
            said = await _ask(context, [form])
            if isinstance(said, InputRequiredResult):
                return said
        ((key, files),) = asked.items()
        result = said.get(key)
        if result is None or result.action != "accept" or (result.content or {}).get("agree") is not True:
            raise self.refusal(f"Your user was asked and did not agree. {self.refused}", remedy=self.by_hand)
        return await operation.call(caller, {**arguments, self.argument: list(files)})

    def _form(self, refusal: ConfirmationNeeded | SecretsFound) -> Form:
        files = [file if isinstance(file, str) else file[0] for file in refusal.files]
        message = f"{self.question}\n{_listed(refusal.files)}"
        dangers = refusal.dangers if isinstance(refusal, ConfirmationNeeded) else ()
        others = dangers[: FILES_SHOWN - len(files)]
        if others:
            message += f"\nYou should know of these, too:\n{_listed(others)}"
        if len(others) < len(dangers):
            message += f"\n  … and {len(dangers) - len(others)} more, which dry_run lists."
        field = {"type": "boolean", "title": self.agree, "description": "I have looked at them.", "default": False}
        return Form(
            key=self.argument,
            message=message,
            schema={"type": "object", "properties": {"agree": field}, "required": ["agree"]},
            about=files,
        )


CONFIRMED = {
    "apply_task": Confirmation(
        refusal=ConfirmationNeeded,
        argument="allow_sensitive",
        question="The task's result has files that can make this machine execute things by themselves:",
        agree="Write them",
        refused="Nothing was written.",
        by_hand="Leave it to your user, who can look at the diff and type `ca task apply TASK --allow-sensitive FILE`.",
    ),
    "submit_task": Confirmation(
        refusal=SecretsFound,
        argument="allow_secrets",
        question="These files are not committed and look like secrets. The task's agent would get them:",
        agree="Take them along",
        refused="Nothing was submitted.",
        by_hand="Name them in .gitignore, and they stay at home.",
    ),
}


@dataclass(frozen=True)
class Form:
    """What is asked."""

    key: str
    message: str
    schema: dict[str, Any]
    about: Sequence[str]
    """What the answer will be about, kept by the state of the call."""


def can_ask(context: Context[Any, Any]) -> bool:
    """Does the client show forms to a person, and is there a way to ask for one?"""
    capabilities = context.client_capabilities
    elicitation = capabilities.elicitation if capabilities is not None else None
    # A bare `{}` is from the time before there was anything but forms.
    if elicitation is None or (elicitation.form is None and elicitation.url is not None):
        return False
    return _asks_in_answers(context) or context.session.can_send_request


def _asks_in_answers(context: Context[Any, Any]) -> bool:
    version = context.protocol_version
    return version is not None and is_version_at_least(version, IN_ANSWERS)


async def _ask(context: Context[Any, Any], forms: Sequence[Form]) -> InputRequiredResult | dict[str, ElicitResult]:
    """What the person says to each, or the result that makes the client ask and call again."""
    if _asks_in_answers(context):
        return InputRequiredResult(
            input_requests={
                form.key: ElicitRequest(
                    params=ElicitRequestFormParams(message=form.message, requested_schema=form.schema)
                )
                for form in forms
            },
            request_state=json.dumps({form.key: form.about for form in forms}),
        )
    said: dict[str, ElicitResult] = {}
    for form in forms:
        with contextlib.suppress(MCPError):  # a client that cannot after all has not answered
            said[form.key] = await context.session.elicit_form(
                form.message, form.schema, related_request_id=context.request_id
            )
    return said


def _earlier_round(context: Context[Any, Any]) -> tuple[dict[str, Sequence[str]] | None, dict[str, ElicitResult]]:
    """What this very call has asked before, by the state that only this server can have made, and what was said."""
    if not _asks_in_answers(context) or context.request_state is None:
        return None, {}
    said = {key: result for key, result in (context.input_responses or {}).items() if isinstance(result, ElicitResult)}
    return json.loads(context.request_state), said


def _questions(answer: Any) -> list[Form]:
    """The open questions of the tasks in an answer."""
    tasks: Sequence[Task] = answer.tasks if hasattr(answer, "tasks") else [answer]
    return [question_form(task) for task in tasks if task.asked is not None and task.question is not None][
        :ASKED_AT_ONCE
    ]


def question_form(task: Task) -> Form:
    """What a person is shown of a task that asks something."""
    assert task.asked is not None
    field: dict[str, Any] = {"type": "string", "title": "Your answer"}
    if task.asked.choices:
        field["enum"] = [clean(choice) for choice in task.asked.choices]
    title, question = cut(" ".join(clean(task.title).split()), 100), cut(clean(task.question or ""), 4000)
    return Form(
        key=f"{task.task_id}.{task.asked.question_id}",
        message=f'The agent that works on "{title}" asks you:\n\n{question}',
        schema={"type": "object", "properties": {"answer": field}, "required": ["answer"]},
        about=(task.task_id, task.asked.question_id),
    )


def _listed(files: Sequence[str | tuple[str, str]]) -> str:
    """Paths, with why where that is said."""
    return "\n".join(f"  {clean(file if isinstance(file, str) else ': '.join(file))}" for file in files)
