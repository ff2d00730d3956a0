import json
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from mcp.types import Tool

from cloudagent_mcp.server import INSTRUCTIONS, mcp_server
from tests.support.worlds import World

SNAPSHOTS = Path(__file__).parent.parent / "snapshots"
TEMPLATES = SNAPSHOTS / "resource_templates"
NAMES = {
    "submit_task", "get_task", "wait_tasks", "list_tasks", "cancel_task", "get_task_logs", "get_task_diff",
    "apply_task", "retry_task", "create_schedule", "list_schedules", "get_schedule", "update_schedule",
    "delete_schedule", "run_schedule", "get_queue", "delegate", "send_message", "list_pending_questions", "apply_tasks",
    "comment_task",
}  # fmt: skip


async def tools_of(world: World) -> list[Tool]:
    async with Client(mcp_server(world.app(), remote=False)) as client:
        return (await client.list_tools()).tools


def as_a_model_sees_it(tool: Tool) -> dict[str, Any]:
    seen = tool.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {key: seen[key] for key in ("name", "title", "description", "inputSchema", "annotations")}


@pytest.mark.anyio
async def test_every_tool_looks_to_a_model_as_its_snapshot_says(world: World, request: pytest.FixtureRequest) -> None:
    tools = {tool.name: as_a_model_sees_it(tool) for tool in await tools_of(world)}
    assert set(tools) == NAMES
    if request.config.getoption("--update-snapshots"):
        for name, tool in tools.items():
            (SNAPSHOTS / f"{name}.json").write_text(json.dumps(tool, indent=2) + "\n")
    assert {path.stem for path in SNAPSHOTS.glob("*.json")} == NAMES
    for name, tool in tools.items():
        assert tool == json.loads((SNAPSHOTS / f"{name}.json").read_text()), f"{name} has changed; see CONTRIBUTING"


@pytest.mark.anyio
async def test_every_resource_template_looks_as_its_snapshot_says(world: World, request: pytest.FixtureRequest) -> None:
    async with Client(mcp_server(world.app(), remote=False)) as client:
        found = (await client.list_resource_templates()).resource_templates
    templates = {one.name: one.model_dump(mode="json", by_alias=True, exclude_none=True) for one in found}
    assert set(templates) == {"task", "task-log", "task-diff", "task-result", "schedule"}
    if request.config.getoption("--update-snapshots"):
        TEMPLATES.mkdir(exist_ok=True)
        for name, template in templates.items():
            (TEMPLATES / f"{name}.json").write_text(json.dumps(template, indent=2) + "\n")
    assert {path.stem for path in TEMPLATES.glob("*.json")} == set(templates)
    for name, template in templates.items():
        assert template["title"] and template["description"] and template["mimeType"]
        assert template == json.loads((TEMPLATES / f"{name}.json").read_text()), f"{name} has changed"


@pytest.mark.anyio
async def test_all_tools_together_cost_a_model_at_most_12_kb(world: World) -> None:
    listed = [as_a_model_sees_it(tool) for tool in await tools_of(world)]
    assert len(json.dumps(listed, separators=(",", ":"))) <= 12_000


@pytest.mark.anyio
async def test_every_tool_and_argument_is_described_or_says_itself(world: World) -> None:
    for tool in await tools_of(world):
        assert tool.title and tool.description and tool.annotations is not None
        assert tool.annotations.read_only_hint or tool.annotations.destructive_hint is not None
        assert (tool.output_schema is None) == (tool.name in ("get_task_logs", "get_task_diff"))


def test_a_model_is_told_in_six_lines_when_and_how_to_delegate() -> None:
    assert len(INSTRUCTIONS.splitlines()) == 6
    for name in ("submit_task", "get_task", "wait_tasks", "get_task_diff", "apply_task", "send_message", "verify"):
        assert name in INSTRUCTIONS
