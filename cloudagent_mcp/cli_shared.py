"""What the commands of `ca` share: options, a client, how an answer is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import click

if TYPE_CHECKING:
    from cloudagent_mcp.client import Client
    from cloudagent_mcp.settings import Settings

EXIT_FAILED = 1

as_json = click.option("--json", "as_json", is_flag=True, help="Print what REST answers, as one JSON document.")


@contextmanager
def client() -> Generator[Client]:
    from cloudagent_mcp.client import open_client
    from cloudagent_mcp.settings import Settings

    settings = Settings.read()
    take_back_interrupted(settings)
    opened = open_client(settings, told=_show_upload)
    try:
        yield opened
    finally:
        opened.close()


def take_back_interrupted(settings: Settings) -> None:
    """What a process that died left half applied, in any directory, is brought to an end; told on standard error."""
    state_folder = settings.cloudagent_home / "apply"
    if not state_folder.is_dir():
        return
    from cloudagent_mcp import apply

    for top in apply.take_back_interrupted(state_folder):
        click.echo(f"An apply to {top} was interrupted; what was half done there is settled now.", err=True)


def _show_upload(done: float, total: float, message: str) -> None:
    """A line on standard error: where it is a terminal, one that goes on; else only what is said at the end."""
    running = message.startswith("Uploading")
    if not running or sys.stderr.isatty():
        click.echo(f"\r\x1b[K{message}" if sys.stderr.isatty() else message, err=True, nl=not running)


def task_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a task may be given, wherever one is described."""
    for option in reversed(TASK_OPTIONS):
        command = option(command)
    return command


def _listed(_: click.Context, __: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [part.strip() for part in value.split(",")]


TASK_OPTIONS = (
    click.option(
        "--repository", help="https, ssh or git@ address, a folder, or none. Default: the repository you are in."
    ),
    click.option("--base-ref", help="Branch, tag or commit to start from. Default: your working tree as it is."),
    click.option("--title", help="A short name."),
    click.option("--model", help="Model for the agent."),
    click.option("--best-of", type=click.IntRange(1, 8), help="So many independent tries; the best one counts."),
    click.option("--models", metavar="A,B", callback=_listed, help="Models for the tries, in turn; else one for each."),
    click.option("--providers", metavar="A,B", callback=_listed, help="The same for where their sandboxes come from."),
    click.option("--cancel-losers", is_flag=True, default=None, help="Cancel the other tries once one has passed."),
    click.option("--verify", help="Shell command that passes if the result is right; run in a clean checkout."),
    click.option("--retries", type=int, help="How often a failing verify goes back to the agent (0)."),
    click.option("--setup", help="Shell command that is run in the repository before the agent."),
    click.option(
        "--on-interrupt",
        type=click.Choice(["resume", "restart", "fail"]),
        help="When its sandbox dies: go on from the last checkpoint (resume), begin again, or fail.",
    ),
    click.option("--timeout-minutes", type=float, help="How long the agent may run (60)."),
    click.option("--max-turns", type=int, help="How many turns it may take."),
    click.option("--max-budget-usd", type=float, help="What it may spend."),
    click.option("--provider", help="Where its sandbox comes from."),
    click.option("--egress", multiple=True, metavar="HOST", help="One more host that its sandbox may reach."),
    click.option("--tag", "tags", multiple=True, help="A word to find it by; may be given several times."),
    click.option("--priority", type=click.Choice(["low", "normal", "high"]), help="Before which of your other tasks."),
)


def given(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: list(cast("tuple[str, ...]", value)) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value not in (None, ())
    }


def print_answer(answer: dict[str, Any], as_json: bool, how: str) -> None:
    if as_json:
        click.echo(json.dumps(answer))
        return
    from cloudagent_mcp import render

    show: Callable[[dict[str, Any]], None] = getattr(render, how)
    show(answer)
