"""Whatever is sent to a tool, made from its own schema: an answer of ours, and nothing kept where it is a refusal."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator
from typing import Any, cast

import anyio
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from mcp import Client
from mcp.types import CallToolResult

from cloudagent_mcp.app import App
from cloudagent_mcp.server import mcp_server
from cloudagent_storage import errors
from tests.support.worlds import World

ANSWER_S = 20
"""Far more than any answer takes; a busy machine is no failure."""
CANARY = "c4n4ry"
WAITS = ("wait_seconds", "timeout_seconds")

CODES = {
    kind.code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CloudAgentError)
}

HOSTILE = st.sampled_from(
    [
        "",
        " ",
        f"{CANARY}\0",
        f"{CANARY}\u202e\u200b\U000e0041",
        f"../../{CANARY}",
        f"'; DROP TABLE tasks; -- {CANARY}",
        f"$(touch {CANARY})",
        f"-{CANARY}",
        f"ext::sh -c {CANARY}",
        f"https://me:{CANARY}@example.com/x",
        f"%s%n{{{CANARY}}}{{0.__class__}}",
        CANARY * 5000,
        "task_" + "a" * 26,
    ]
)
NAMES = st.sampled_from(["", "prompt", "promt", "__class__", "a\0", "\u202e", "x" * 5000, "task_id", "raw"])
"""Of arguments; unlike a value, a name is said again, as far as it can be shown."""
NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2**31, 2**63, -(2**63), 10**400, 1e308, -0.0, 0.5, 1e-300]),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
)
ANYTHING: SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | HOSTILE | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)


def fitting(schema: dict[str, Any]) -> SearchStrategy[Any]:
    """Values that a property's schema allows for, or nearly."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of(*(fitting(option) for option in schema["anyOf"]))
    match schema.get("type"):
        case "string":
            return HOSTILE | st.text(min_size=1, max_size=30)
        case "integer":
            return st.integers(schema.get("minimum", -5), schema.get("maximum", 10_000))
        case "number":
            return st.floats(schema.get("minimum", 0), schema.get("maximum", 100), allow_nan=False)
        case "boolean":
            return st.booleans()
        case "array":
            return st.lists(fitting(schema.get("items", {})), max_size=4)
        case "object" if "properties" in schema:
            return st.fixed_dictionaries({name: fitting(inner) for name, inner in schema["properties"].items()})
        case "object":
            return st.dictionaries(NAMES, HOSTILE, max_size=3)
        case _:
            return ANYTHING


@st.composite
def arguments_of(draw: st.DrawFn, schema: dict[str, Any], ids: list[str]) -> dict[str, Any]:
    """Arguments of which each is left out, or fits, or is anything; and seldom one that there is not."""
    made: dict[str, Any] = {}
    for name, of_property in schema["properties"].items():
        how = draw(st.sampled_from(["fits", "fits", "left out", "text", "anything"]))
        if name in WAITS:
            how = "fits" if how == "left out" else how
        if (how == "fits" and name.endswith("_id")) or name.endswith("_ids"):
            one = st.sampled_from(ids) | HOSTILE
            made[name] = draw(one if name.endswith("_id") else st.lists(one, max_size=4))
        elif how == "fits" and name in WAITS:
            made[name] = 0
        elif how != "left out" or (name in schema.get("required", []) and draw(st.integers(0, 9))):
            made[name] = draw({"fits": fitting(of_property), "text": HOSTILE}.get(how, ANYTHING))
        if name in WAITS and made[name] not in (0, None) and isinstance(made[name], int | float):
            made[name] = -1 if made[name] < 0 else made[name] + 51  # nobody waits here
    if draw(st.integers(0, 9)) == 0:
        made[draw(NAMES)] = draw(ANYTHING)
    return made


class Session:
    """One client of one server, for as many calls as are wanted."""

    def __init__(self, world: World, app: App, portal: BlockingPortal, mcp: Client) -> None:
        self._home = world.home
        self.app = app
        self._portal = portal
        self._mcp = mcp
        self.ids: list[str] = []

    def call(self, tool: str, arguments: dict[str, Any]) -> CallToolResult:
        async def call() -> CallToolResult:
            with anyio.fail_after(ANSWER_S):
                return await self._mcp.call_tool(tool, arguments)

        return self._portal.call(call)

    def everything(self) -> list[str]:
        """All that the database holds."""
        with sqlite3.connect(self._home / "cloudagent.db") as database:
            return list(database.iterdump())

    def check(self, tool: str, arguments: dict[str, Any]) -> bool:
        """Call, hold the answer against what every answer is, and tell whether it is a refusal."""
        before = self.everything()
        result = self.call(tool, arguments)
        text = result.model_dump_json()
        assert "Traceback" not in text and str(self._home) not in text
        assert len("".join(getattr(block, "text", "") for block in result.content)) <= 30_000
        if not result.is_error:
            return False
        error = cast("dict[str, Any]", result.structured_content)
        assert error["code"] in CODES - {"internal"}, error
        assert error["detail"] and error["remedy"]
        assert CANARY not in text, text
        assert self.everything() == before
        return True


@pytest.fixture
def session(world: World) -> Generator[Session]:
    app = world.app()
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(Client(mcp_server(app, remote=False))) as mcp,
    ):
        session = Session(world, app, portal, mcp)
        for _ in range(2):
            result = session.call("submit_task", {"prompt": "Do it.", "repository": "none"})
            session.ids.append(cast("dict[str, Any]", result.structured_content)["task_id"])
        session.call("cancel_task", {"task_id": session.ids[0]})
        schedule = {"name": "n", "cron": "0 0 1 1 *", "task": {"prompt": "x", "repository": "none"}}
        made = session.call("create_schedule", schedule)
        session.ids.append(cast("dict[str, Any]", made.structured_content)["schedule_id"])
        yield session


def waits_for_the_end(tool: str) -> bool:
    """Such a call is answered only when its task has ended, and there is no worker here."""
    return tool == "delegate"


TOOLS = [
    "submit_task", "get_task", "wait_tasks", "list_tasks", "cancel_task", "retry_task", "get_task_logs",
    "get_task_diff", "apply_task", "get_queue", "create_schedule", "list_schedules", "get_schedule", "update_schedule",
    "delete_schedule", "run_schedule", "delegate", "send_message", "list_pending_questions", "apply_tasks",
    "comment_task",
]  # fmt: skip


def test_the_tools_are_all_there_are(session: Session) -> None:
    assert {name for name, found in session.app.operations.items() if found.marked.tool} == set(TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_no_input_breaks_a_tool_or_leaves_anything_behind_when_it_is_refused(session: Session, tool: str) -> None:
    schema = session.app.operations[tool].schema
    refused: list[bool] = []

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(arguments_of(schema, session.ids))
    def tried(arguments: dict[str, Any]) -> None:
        if waits_for_the_end(tool):
            arguments["prompt"] = " "
        refused.append(session.check(tool, arguments))

    tried()
    assert any(refused) or not schema["properties"]
