"""`ca demo`: one whole task, through the same path as any client, in folders of its own that are gone afterwards.

Its data folder is temporary and its worker its own, so that no task of the user's ever meets the scripted model.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, cast

import anyio
from anyio.from_thread import start_blocking_portal
from mcp import Client, StdioServerParameters
from mcp.types import TextContent
from rich.rule import Rule as Line
from rich.text import Text as Styled

from cloudagent_mcp.embedded import running_worker
from cloudagent_mcp.render import console, show_applied
from cloudagent_mcp.scripted_model import Rule, ScriptedModel, Text, ToolUse, Turn
from cloudagent_mcp.settings import Settings
from cloudagent_queue.agents import open_agent
from cloudagent_queue.sandboxes import open_provider
from cloudagent_storage.errors import CloudAgentError, CredentialMissing

PROMPT = "Make the test pass."
TEST = "python3 -m unittest -q"
FILES = {
    "prices.py": '''"""Prices in a shop."""


def total(prices: list[float], discount: float = 0.0) -> float:
    """What a customer pays: the sum of the prices, less the discount (0.2 is 20 %)."""
    return sum(prices) * discount
''',
    "test_prices.py": """import unittest

from prices import total


class Prices(unittest.TestCase):
    def test_a_discount_is_taken_off(self) -> None:
        self.assertAlmostEqual(total([10.0, 30.0], discount=0.25), 30.0)
""",
    ".gitignore": "__pycache__/\n",
}
SCRIPT = [
    Rule(
        prompt="Make the test pass",
        turns=(
            Turn(
                blocks=(
                    Text(text="I run the test first, to see how it fails."),
                    ToolUse(name="Bash", input={"command": TEST, "description": "Run the tests"}),
                )
            ),
            Turn(blocks=(ToolUse(name="Read", input={"file_path": "{{cwd}}/prices.py"}),)),
            Turn(
                blocks=(
                    Text(text="The sum is multiplied by the discount itself; what remains after it was meant."),
                    ToolUse(
                        name="Edit",
                        input={
                            "file_path": "{{cwd}}/prices.py",
                            "old_string": "sum(prices) * discount",
                            "new_string": "sum(prices) * (1 - discount)",
                        },
                    ),
                )
            ),
            Turn(blocks=(ToolUse(name="Bash", input={"command": TEST, "description": "Run the tests again"}),)),
            Turn(
                blocks=(Text(text="total() multiplied by the discount instead of 1 - discount. The test passes now."),)
            ),
        ),
    )
]
STOP_S = 15.0
FOREVER_S = 3600.0


def demo(settings: Settings, *, unsafe_process: bool, keep: bool) -> int:
    """Show a whole task. Returns the exit code: 0 when the result was applied and the test passes.

    Without a credential in the environment the model's words come from a script, and it says so.
    """
    provider = "unsafe-process" if unsafe_process else "local"
    # SIGTERM ends it like Ctrl-C does: through every `finally`.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _folder(keep) as folder, contextlib.ExitStack() as stack:
        home, repository = folder / "data", folder / "shop"
        home.mkdir(mode=0o700)
        console.print(Line("cloudagent demo", style="dim"))
        console.print(open_provider(provider, data_folder=home).self_check(), style="dim")
        try:
            agent = open_agent("claude")
            agent.check_credential(settings.environment)
            credential = settings.pick(list(agent.environment))
            console.print("A credential was found: the agent uses the real model.")
        except CredentialMissing:
            model = stack.enter_context(ScriptedModel(SCRIPT))
            credential = model.environment()
            console.print(
                "[yellow]No credential was found: the model's words are scripted; everything else is real.[/] "
                "[dim](the agent, its sandbox, git, the queue)[/]"
            )
        _make_repository(repository, settings)
        stack.callback(_stop_worker, home)
        env = {**settings.git_environment, **credential, "CLOUDAGENT_HOME": str(home), "SANDBOX_PROVIDER": provider}
        env["CLAUDE_CONFIG_DIR"] = str(folder / "claude")  # its session comes home to there
        server = StdioServerParameters(
            command=sys.executable, args=["-m", "cloudagent_mcp", "mcp"], env=env, cwd=repository
        )
        # In a thread of its own: an interrupt that is raised in an event loop may be taken for a library's own failure.
        with start_blocking_portal() as portal:
            code = portal.start_task_soon(_show, server, repository, settings).result()
    if code == 0:
        _say_what_is_next()
    return code


async def _show(server: StdioServerParameters, repository: Path, settings: Settings) -> int:
    async with Client(server) as client:
        console.print(f'\n[bold]submit_task[/] "{PROMPT}"  [dim]verify: {TEST}[/]')
        task = await _call(client, "submit_task", prompt=PROMPT, verify=TEST, max_turns=20, max_budget_usd=1)
        name = task["task_id"]
        console.print(f"[dim]{name} is {task['status']}; a worker takes it.[/]\n")
        after, deadline = 0, time.monotonic() + FOREVER_S
        while time.monotonic() < deadline:
            task = await _call(client, "get_task", task_id=name, wait_seconds=0, log_lines=0)
            after = await _show_log(client, name, after)
            if task["completed_at"]:
                break
            await anyio.sleep(0.2)
        console.print(f"\n[bold]get_task[/]  status {task['status']}, verdict [bold]{task['verdict']}[/]")
        if task["status"] != "completed" or task["verdict"] != "passed":
            console.print(task["error"]["message"] if task["error"] else task["next_action"], style="red")
            return 1
        console.print("\n[bold]get_task_diff[/]")
        for line in await _untrusted(client, "get_task_diff", task_id=name):
            style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
            console.print(Styled(line, style))
        console.print("\n[bold]apply_task[/]")
        show_applied(await _call(client, "apply_task", task_id=name, directory=str(repository)))
    console.print(f"\n[bold]{TEST}[/]  [dim]in your working tree[/]")
    test = subprocess.run(
        [sys.executable, *TEST.split()[1:]],
        cwd=repository,
        env=settings.git_environment,
        capture_output=True,
        text=True,
    )
    passed = test.returncode == 0
    console.print(test.stderr.strip(), style="green" if passed else "red")
    return 0 if passed else 1


async def _call(client: Client, name: str, **arguments: Any) -> dict[str, Any]:
    result = await client.call_tool(name, arguments)
    answer = cast("dict[str, Any]", result.structured_content or {})
    if result.is_error:
        raise CloudAgentError(answer.get("detail"), remedy=answer.get("remedy"))
    return answer


async def _untrusted(client: Client, name: str, **arguments: Any) -> list[str]:
    """The lines between the fences of a text answer."""
    result = await client.call_tool(name, arguments)
    lines = "".join(block.text for block in result.content if isinstance(block, TextContent)).splitlines()
    fences = [number for number, line in enumerate(lines) if "untrusted output" in line and line.startswith("[")]
    return lines[fences[0] + 1 : fences[-1]] if fences else []


async def _show_log(client: Client, name: str, after: int) -> int:
    for line in await _untrusted(client, "get_task_logs", task_id=name, after=after, limit=200):
        number, _, rest = line.partition(" ")
        if number.isdigit():
            after = int(number)
            clock, level, kind, *message = rest.split(" ", 3)
            style = {"tool_use": "cyan", "text": "bold", "error": "red"}.get(kind.rstrip(":"), "dim")
            if level == "warning":
                style = "yellow"
            if kind not in ("usage:", "thinking:"):
                console.print(
                    Styled.assemble((f"  {clock} ", "dim"), (f"{kind:<13}", style), (" ".join(message), style))
                )
        else:
            console.print(Styled(f"{'':24}{line}", "dim"))
    return after


def _make_repository(folder: Path, settings: Settings) -> None:
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_text(content)
    identity = ["-c", "user.name=demo", "-c", "user.email=demo@localhost"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], [*identity, "commit", "-q", "-m", "A shop"]):
        subprocess.run(["git", *command], cwd=folder, check=True, env=settings.git_environment)
    console.print(f"A small repository with a failing test was made: {', '.join(FILES)}", style="dim")


@contextlib.contextmanager
def _folder(keep: bool) -> Generator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="cloudagent-demo-"))
    try:
        yield folder
    finally:
        if keep:
            console.print(f"[dim]Kept:[/] {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _stop_worker(home: Path) -> None:
    """Stop the demo's own worker, and end what its sandboxes still run."""
    running = running_worker(home)
    if running is not None and running.pid is not None:
        os.kill(running.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while running_worker(home) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    for name in ("local", "unsafe-process"):
        provider = open_provider(name, data_folder=home)
        for info in provider.list({}):
            with contextlib.suppress(CloudAgentError):
                provider.connect(info.id).kill()


def _say_what_is_next() -> None:
    console.print(Line(style="dim"))
    steps: Mapping[str, str] = {
        "claude mcp add cloudagent -- uvx cloudagent-mcp": "give Claude Code these tools",
        'ca task create "…" --watch': "hand over a task in your own repository",
        "ca doctor": "see what a task needs on this machine",
    }
    for command, meaning in steps.items():
        console.print(f"  [bold]{command:<50}[/] [dim]{meaning}[/]")
