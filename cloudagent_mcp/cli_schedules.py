"""`ca schedule …`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cloudagent_mcp.cli_shared import as_json, client, given, print_answer, task_options

if TYPE_CHECKING:
    from cloudagent_mcp.client import Client

schedule_name = click.argument("name", metavar="SCHEDULE")


@click.group()
def schedule() -> None:
    """Submit tasks at the times of a cron line. A schedule is named by its name, its id, or any beginning of that."""


@schedule.command("create")
@click.argument("name")
@click.argument("cron")
@click.argument("prompt")
@click.option("--timezone", help="The time zone of CRON, such as Europe/Berlin (UTC).")
@task_options
@as_json
def create_schedule(
    name: str, cron: str, prompt: str, timezone: str | None, tags: tuple[str, ...], as_json: bool, **options: Any
) -> None:
    """Create a schedule. CRON has five fields, such as "0 3 * * 1-5"; PROMPT is what the agent should do each time."""
    task = {"prompt": prompt, "tags": list(tags), **given(options)}
    with client() as api:
        created = api.call("create_schedule", name=name, cron=cron, task=task, **given({"timezone": timezone}))
    print_answer(created, as_json, "show_schedule")


@schedule.command("list")
@as_json
def list_schedules(as_json: bool) -> None:
    """List schedules, their next due times, and what became of the last ones."""
    with client() as api:
        found = api.call("list_schedules")
    print_answer(found, as_json, "show_schedules")


@schedule.command("show")
@schedule_name
@as_json
def show_schedule(name: str, as_json: bool) -> None:
    """Show a schedule: its task, its next due times, and what became of the last ones."""
    _on_schedule("get_schedule", name, as_json)


@schedule.command("update")
@schedule_name
@click.option("--name", "new_name", help="Another name.")
@click.option("--cron", help="Another cron line.")
@click.option("--timezone", help="Another time zone.")
@click.option("--prompt", help="What the agent should do each time.")
@task_options
@as_json
def update_schedule(
    name: str,
    new_name: str | None,
    cron: str | None,
    timezone: str | None,
    tags: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Change a schedule. With an option of its task, or with none at all, it also takes your credential anew."""
    task = {**given(options), **({"tags": list(tags)} if tags else {})}
    changes = given({"name": new_name, "cron": cron, "timezone": timezone})
    if task or not changes:
        changes["task"] = task
    _on_schedule("update_schedule", name, as_json, changes=changes)


@schedule.command()
@schedule_name
@as_json
def pause(name: str, as_json: bool) -> None:
    """Let a schedule submit nothing until it is resumed."""
    _on_schedule("update_schedule", name, as_json, changes={"enabled": False})


@schedule.command()
@schedule_name
@as_json
def resume(name: str, as_json: bool) -> None:
    """Go on with a schedule that was paused, from its next due time on."""
    _on_schedule("update_schedule", name, as_json, changes={"enabled": True})


@schedule.command()
@schedule_name
@as_json
def delete(name: str, as_json: bool) -> None:
    """Remove a schedule. The tasks that it submitted stay, and go on."""
    _on_schedule("delete_schedule", name, as_json, how="show_deleted")


@schedule.command()
@schedule_name
@as_json
def run(name: str, as_json: bool) -> None:
    """Submit a schedule's task now, also of a paused one."""
    _on_schedule("run_schedule", name, as_json, how="show_ran")


def _on_schedule(
    operation: str, name: str, as_json: bool, *, changes: dict[str, Any] | None = None, how: str = "show_schedule"
) -> None:
    with client() as api:
        answer = api.call(operation, schedule_id=_schedule(api, name), **(changes or {}))
    print_answer(answer, as_json, how)


def _schedule(api: Client, name: str) -> str:
    from cloudagent_mcp.client import resolve_schedule

    return resolve_schedule(api, name)
