"""The real Claude Code as a client of ours, whose model says what a test wrote."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import claude_agent_sdk

from cloudagent_mcp.scripted_model import Rule, ScriptedModel, Text, ToolUse, Turn
from tests.support.worlds import World

CLAUDE = Path(claude_agent_sdk.__file__).parent / "_bundled" / "claude"
TITLE = re.compile(r"<(\w+)>")


class Talk(ScriptedModel):
    """A model that names a task by its title, as in `<mend>`: a script is written before there is an id."""

    def __init__(self, rules: list[Rule], world: World) -> None:
        super().__init__(rules)
        self._world = world

    def choose(self, body: Any) -> Any:
        turn, fault, values = super().choose(body)
        if TITLE.search(said := turn.model_dump_json()):
            with self._world.client() as client:
                ids = {task["title"]: task["task_id"] for task in client.call("list_tasks")["tasks"]}
            turn = Turn.model_validate_json(TITLE.sub(lambda found: ids.get(found[1], found[0]), said))
        return turn, fault, values


def calls(*tools: tuple[str, dict[str, Any]]) -> Turn:
    """An answer of the model that calls these tools of ours, all at once."""
    return Turn(blocks=tuple(ToolUse(name=f"mcp__cloudagent__{name}", input=given) for name, given in tools))


def says(text: str) -> Turn:
    """An answer of the model in words."""
    return Turn(blocks=(Text(text=text),))


def claude(world: World, folder: Path, *words: str) -> str:
    """What `claude` prints; it is given what the world's user has in the environment."""
    quiet = {"IS_SANDBOX": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"}
    # On a busy machine it would begin without the server, whose tools and commands nobody then knows.
    quiet |= {"MCP_CONNECTION_NONBLOCKING": "0", "MCP_TIMEOUT": "60000"}
    done = subprocess.run(
        [CLAUDE, *words], cwd=folder, env={**world.environment, **quiet}, capture_output=True, text=True, timeout=115
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def converse(world: World, folder: Path, prompt: str) -> list[dict[str, Any]]:
    """Every message of a conversation that begins with this prompt."""
    said = claude(
        world, folder, "-p", prompt, "--output-format", "stream-json", "--verbose", "--dangerously-skip-permissions"
    )
    return [json.loads(line) for line in said.splitlines()]


def tools_called(messages: Sequence[dict[str, Any]]) -> list[str]:
    """The names of our tools in the order in which they were called."""
    return [
        block["name"].removeprefix("mcp__cloudagent__")
        for block in _blocks(messages, "assistant")
        if block["type"] == "tool_use" and block["name"].startswith("mcp__cloudagent__")
    ]


def results(messages: Sequence[dict[str, Any]], tool: str) -> list[str]:
    """What the model was given back by each call of this tool."""
    ids = [
        block["id"]
        for block in _blocks(messages, "assistant")
        if block["type"] == "tool_use" and block["name"] == f"mcp__cloudagent__{tool}"
    ]
    given = {block["tool_use_id"]: block for block in _blocks(messages, "user") if block["type"] == "tool_result"}
    return [_text(given[id]["content"]) for id in ids]


def transcript(prompt: str, messages: Sequence[dict[str, Any]]) -> str:
    """A conversation for people, with answers as far as they fit on a few lines."""
    lines = [f"> {prompt}"]
    for message in messages:
        for block in _blocks([message], "assistant", "user"):
            match block["type"]:
                case "text":
                    lines += ["", f"● {block['text']}"]
                case "tool_use":
                    given = ", ".join(f"{name}: {json.dumps(value)}" for name, value in block["input"].items())
                    lines += ["", f"● {block['name'].replace('mcp__cloudagent__', 'cloudagent - ')} ({given})"]
                case "tool_result":
                    lines += [f"  ⎿ {line}" for line in _brief(_text(block["content"]))]
                case _:
                    pass
    return "\n".join(line.rstrip() for line in lines)


KEPT = (
    "task_id", "status", "verdict", "finished", "outcome", "summary", "question", "next_action", "message", "command",
)  # fmt: skip


def _brief(text: str) -> list[str]:
    """The first lines of a text; of an object, what tells the story."""
    try:
        answer = json.loads(text)
    except ValueError:
        return text.splitlines()[:16]
    tasks = [_kept(task) for task in answer.get("tasks", [])]
    return [json.dumps(each, ensure_ascii=False) for each in ([_kept(answer), *tasks] if tasks else [_kept(answer)])]


def _kept(answer: dict[str, Any]) -> dict[str, Any]:
    kept = {key: answer[key] for key in KEPT if answer.get(key) is not None}
    return kept | ({"files": [file["path"] for file in answer["files"]]} if answer.get("files") else {})


def _blocks(messages: Sequence[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for message in messages:
        content: str | list[dict[str, Any]] = message["message"]["content"] if message["type"] in kinds else []
        found += content if not isinstance(content, str) else []
    return found


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(block.get("text", "") for block in cast("list[dict[str, Any]]", content))
