"""Words for the scripted model that several tests use."""

from __future__ import annotations

from typing import Any

from cloudagent_mcp.scripted_model import Rule, Text, ToolUse, Turn


def say(text: str) -> Turn:
    """An answer that ends the agent's turn."""
    return Turn(blocks=(Text(text=text),))


def use(name: str, **arguments: Any) -> Turn:
    """An answer that calls one tool."""
    return Turn(blocks=(ToolUse(name=name, input=arguments),))


def bash(command: str, **arguments: Any) -> Turn:
    """An answer that runs a command. Claude Code refuses `sleep`: see `pause`."""
    return use("Bash", command=command, description="A step of the script", **arguments)


def pause(seconds: float, then: str = "true") -> str:
    """A command that takes a while."""
    return f"python3 -c 'import time; time.sleep({seconds})' && {then}"


WRITE_AND_COMMIT = Rule(
    prompt="^Write and commit",
    turns=(
        use("Write", file_path="{{cwd}}/hello.txt", content="hello\n"),
        bash("git add hello.txt && git -c user.name=A -c user.email=a@b commit -q -m 'Say hello' && git log --oneline"),
        say("I wrote hello.txt."),
    ),
)
"""A file, a commit, a sentence."""

STEPS = Rule(prompt="^Take steps", turns=(*(bash(f"echo step {number}") for number in range(6)), say("All taken.")))
"""Six commands, one an answer."""

HANG = Rule(prompt="^Hang", turns=(bash("echo unfinished > draft.txt"), Turn(fault="hang")))
"""A file that nobody commits; then the model never answers."""
