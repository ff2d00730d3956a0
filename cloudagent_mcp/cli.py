"""`ca`, for people: written by hand over the same operations that tools and REST offer.

Imports are made inside the commands: `ca mcp` is started by every client session, and starts as fast as it can.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloudagent_mcp.cli_schedules import schedule
from cloudagent_mcp.cli_shared import as_json, client, given, print_answer, task_options
from cloudagent_mcp.cli_template import template
from cloudagent_storage.errors import (
    CloudAgentError,
    CredentialMissing,
    Forbidden,
    InvalidInput,
    NotNow,
    Unauthorized,
    Unavailable,
)

if TYPE_CHECKING:
    from cloudagent_mcp.app import App
    from cloudagent_mcp.client import Client
    from cloudagent_mcp.doctor import Finding

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 1, 2, 3, 130

task_id = click.argument("task_id", metavar="TASK")


def main() -> None:
    """The `ca` command."""
    try:
        ca(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our pipe has seen enough; nothing may be written at exit either.
        sys.stdout = None
        sys.exit(0)
    except CloudAgentError as error:
        sys.exit(report(error))


def mcp_main() -> None:
    """The `cloudagent-mcp` command is `ca mcp`."""
    sys.argv[1:1] = ["mcp"]
    main()


def report(error: CloudAgentError) -> int:
    """Say what went wrong; the exit code for it."""
    if "--json" in sys.argv:
        click.echo(json.dumps(error.as_dict()))
    else:
        click.echo(f"{click.style('Error', fg='red')} ({error.code}): {error.message}\n  {error.remedy}", err=True)
    if isinstance(error, Unavailable | Unauthorized | Forbidden | CredentialMissing):
        return EXIT_UNREACHABLE
    return EXIT_FAILED if isinstance(error, NotNow) else EXIT_USAGE


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="cloudagent-mcp", prog_name="ca")
def ca() -> None:
    """Hand coding tasks to remote agents, each in a sandbox, and bring their work home."""


# -- tasks ------------------------------------------------------------------------------------------------------------


@ca.group()
def task() -> None:
    """Create, watch and apply tasks. A task is named by its id, or by any beginning of it that is unique."""


@task.command()
@click.argument("prompt")
@task_options
@click.option("--continue", "continue_task_id", metavar="TASK", help="Go on from this ended task: branch and talk.")
@click.option(
    "--session",
    metavar="current|ID",
    help="Take this conversation of your own Claude Code along: the one that you are in, or by its id.",
)
@click.option("--idempotency-key", help="Repeating the command with the same key is still one task.")
@click.option(
    "--send-credentials",
    is_flag=True,
    help="Give the server that CLOUDAGENT_URL names your environment's ANTHROPIC_API_KEY and GH_TOKEN or GITHUB_TOKEN.",
)
@click.option("--watch", is_flag=True, help="Then watch it to its end.")
@as_json
def create(
    prompt: str, tags: tuple[str, ...], send_credentials: bool, watch: bool, as_json: bool, **options: Any
) -> None:
    """Submit a task. PROMPT is what the agent should do; - reads it from standard input."""
    if prompt == "-":
        prompt = sys.stdin.read()
    from cloudagent_mcp.settings import Settings

    arguments = given(options)
    if "session" in arguments:
        from cloudagent_mcp.session_home import take_along

        environment = Settings.read().environment
        arguments["session"] = take_along(arguments["session"], directory=Path.cwd(), environment=environment)
    if send_credentials:
        from cloudagent_mcp.operations.credentials import arguments_of

        arguments |= arguments_of(Settings.read().environment)
    with client() as api:
        if "continue_task_id" in arguments:
            arguments["continue_task_id"] = api.resolve(arguments["continue_task_id"])
        created = api.call("submit_task", prompt=prompt, tags=list(tags), **arguments)
        if as_json and not watch:
            click.echo(json.dumps(created))
            return
        if not as_json:
            from cloudagent_mcp.render import show_created

            show_created(created, hint=not watch)
        if watch:
            sys.exit(_watch(api, created["task_id"], as_json))


@task.command("list")
@click.option("--status", type=click.Choice(["queued", "running", "waiting", "completed", "failed", "cancelled"]))
@click.option("--repository")
@click.option("--tag")
@click.option("--schedule", "schedule_id", help="Only those that this schedule submitted.")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@click.option("--cursor", help="next_cursor of the list before.")
@as_json
def list_tasks(as_json: bool, **options: Any) -> None:
    """List tasks, newest first."""
    with client() as api:
        if options["schedule_id"]:
            from cloudagent_mcp.client import resolve_schedule

            options["schedule_id"] = resolve_schedule(api, options["schedule_id"])
        page = api.call("list_tasks", **given(options))
    print_answer(page, as_json, "show_list")


@task.command()
@click.argument("task_ids", metavar="TASK...", nargs=-1, required=True)
@as_json
def show(task_ids: tuple[str, ...], as_json: bool) -> None:
    """Show tasks: status, result, cost, last log lines."""
    with client() as api:
        tasks = [api.call("get_task", task_id=api.resolve(name)) for name in task_ids]
    if as_json:
        click.echo(json.dumps(tasks[0] if len(tasks) == 1 else tasks))
        return
    for found in tasks:
        print_answer(found, False, "show_task")


@task.command()
@task_id
@click.option("--after", type=click.IntRange(0), default=0, help="Show what follows this line.")
@click.option("--limit", type=click.IntRange(1), help="At most so many lines.")
@click.option("--level", type=click.Choice(["debug", "info", "warning", "error"]), help="The lowest level to show.")
@click.option("--kind", "kinds", multiple=True, help="Only this kind; may be given several times.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the task ends.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document a line.")
def logs(
    task_id: str, after: int, limit: int | None, level: str | None, kinds: tuple[str, ...], follow: bool, as_json: bool
) -> None:
    """Show a task's log."""
    from cloudagent_mcp.client import log_lines
    from cloudagent_mcp.render import show_line

    with client() as api:
        name = api.resolve(task_id)
        for count, line in enumerate(log_lines(api, name, after=after, level=level, kinds=kinds, follow=follow), 1):
            if as_json:
                click.echo(json.dumps(line))
            else:
                show_line(line)
            if count == limit:
                return


@task.command()
@task_id
@as_json
def watch(task_id: str, as_json: bool) -> None:
    """Watch a task to its end. Ctrl-C stops the watching, not the task."""
    with client() as api:
        sys.exit(_watch(api, api.resolve(task_id), as_json))


@task.command()
@click.argument("task_ids", metavar="TASK...", nargs=-1, required=True)
@click.option("--any", "any_", is_flag=True, help="Until one of them has ended, not all.")
@click.option("--timeout", type=click.FloatRange(0), help="Seconds; then exit with 1.")
@as_json
def wait(task_ids: tuple[str, ...], any_: bool, timeout: float | None, as_json: bool) -> None:
    """Wait until tasks have ended. Exit 0 when all that ended completed and no verdict failed."""
    import time

    with client() as api:
        names = [api.resolve(name) for name in task_ids]
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = 50.0 if deadline is None else max(0.0, min(50.0, deadline - time.monotonic()))
            found = api.call("wait_tasks", task_ids=names, mode="any" if any_ else "all", timeout_seconds=left)
            if found["finished"] or (deadline is not None and time.monotonic() >= deadline):
                break
    print_answer(found, as_json, "show_list")
    ended = [task for task in found["tasks"] if task["completed_at"]]
    sys.exit(max((exit_code(task) for task in ended), default=0) if found["finished"] else EXIT_FAILED)


@task.command()
@task_id
@click.option("--path", help="Only this file, or this folder.")
@click.option("--stat", "stat_only", is_flag=True, help="Only the list of files.")
@as_json
def diff(task_id: str, path: str | None, stat_only: bool, as_json: bool) -> None:
    """Show what a task changed. In a pipe it is a patch."""
    with client() as api:
        found = api.call("get_task_diff", task_id=api.resolve(task_id), path=path, stat_only=stat_only)
    print_answer(found, as_json, "show_diff")


directory = click.option(
    "--directory", type=click.Path(path_type=Path), help="The working tree. Default: where you are."
)


@task.command("apply")
@task_id
@directory
@click.option("--dry-run", is_flag=True, help="Only say what would be written.")
@click.option("--allow-sensitive", multiple=True, metavar="FILE", help="A file that can make a machine execute things.")
@as_json
def apply_(
    task_id: str, directory: Path | None, dry_run: bool, allow_sensitive: tuple[str, ...], as_json: bool
) -> None:
    """Write a task's changes into a working tree: all or nothing, with a backup."""
    with client() as api:
        arguments = {"dry_run": dry_run, "allow_sensitive": list(allow_sensitive)}
        done = api.apply(api.resolve(task_id), **arguments, **_directory(directory))
    print_answer(done, as_json, "show_applied")


@task.command()
@task_id
@directory
@as_json
def undo(task_id: str, directory: Path | None, as_json: bool) -> None:
    """Take an applied result back, exactly."""
    with client() as api:
        done = api.apply(api.resolve(task_id), undo=True, **_directory(directory))
    print_answer(done, as_json, "show_applied")


@task.command()
@task_id
@directory
@click.option("--run", is_flag=True, help="Start `claude` with it at once.")
@as_json
def resume(task_id: str, directory: Path | None, run: bool, as_json: bool) -> None:
    """Bring a task's conversation home, to go on with it in Claude Code on this machine."""
    with client() as api:
        done = api.resume(api.resolve(task_id), (directory or Path()).absolute())
    if run and not as_json:
        import os

        try:
            os.chdir(done["directory"])
            os.execvp("claude", ["claude", "--resume", done["session_id"]])
        except OSError:
            click.echo("`claude` is not to be found here; type this where it is:", err=True)
    print_answer(done, as_json, "show_resumed")


@task.command()
@task_id
@click.argument("message")
@click.option("--question", "question_id", metavar="ID", help="Only as the answer to this question: safe to repeat.")
@as_json
def send(task_id: str, message: str, question_id: str | None, as_json: bool) -> None:
    """Answer a task's question, or tell its agent something. MESSAGE - is read from standard input."""
    if message == "-":
        message = sys.stdin.read()
    with client() as api:
        told = api.call("send_message", task_id=api.resolve(task_id), message=message, question_id=question_id)
    print_answer(told, as_json, "show_sent")


@task.command()
@as_json
def questions(as_json: bool) -> None:
    """List what the agents of waiting tasks ask you."""
    with client() as api:
        print_answer(api.call("list_pending_questions"), as_json, "show_questions")


@task.command()
@click.argument("task_ids", metavar="TASK...", nargs=-1, required=True)
@as_json
def cancel(task_ids: tuple[str, ...], as_json: bool) -> None:
    """Stop tasks. What their agents did until then is saved."""
    with client() as api:
        tasks = [api.call("cancel_task", task_id=api.resolve(name)) for name in task_ids]
    if as_json:
        click.echo(json.dumps(tasks[0] if len(tasks) == 1 else tasks))
        return
    for found in tasks:
        print_answer(found, False, "show_cancelled")


@task.command()
@task_id
@as_json
def retry(task_id: str, as_json: bool) -> None:
    """Try a task that has ended once more, as a new task."""
    with client() as api:
        created = api.call("retry_task", task_id=api.resolve(task_id))
    print_answer(created, as_json, "show_created")


def exit_code(task: dict[str, Any]) -> int:
    """0 when a task has completed and its verdict is not failed."""
    return 0 if task["status"] == "completed" and task["verdict"] != "failed" else EXIT_FAILED


def _watch(api: Client, name: str, as_json: bool) -> int:
    from cloudagent_mcp.render import watch

    return exit_code(watch(api, name, as_json))


def _directory(directory: Path | None) -> dict[str, str]:
    return {} if directory is None else {"directory": str(directory.absolute())}


ca.add_command(schedule)
ca.add_command(template)


# -- the installation -------------------------------------------------------------------------------------------------


@ca.command()
@as_json
def queue(as_json: bool) -> None:
    """Show what waits, what runs where, the workers and the dead letters."""
    with client() as api:
        print_answer(api.call("get_queue"), as_json, "show_queue")


# -- the rest ---------------------------------------------------------------------------------------------------------


@ca.command()
@click.option("--unsafe-process", is_flag=True, help="Without a sandbox, where none can be had.")
@click.option("--keep", is_flag=True, help="Keep the demo's folders to look at.")
def demo(unsafe_process: bool, keep: bool) -> None:
    """A whole task in under a minute: a failing test, an agent in a sandbox, the diff, applied, the test passes."""
    from cloudagent_mcp.demo import demo as run_demo
    from cloudagent_mcp.settings import Settings

    sys.exit(run_demo(Settings.read(), unsafe_process=unsafe_process, keep=keep))


@ca.command()
@click.option(
    "--provider", metavar="NAME", help="Try that sandbox provider, with the real account: minutes, and cents."
)
@as_json
def doctor(provider: str | None, as_json: bool) -> None:
    """Check what a task needs, a line each, with what to do where something is missing."""
    from cloudagent_mcp.doctor import examine, examine_provider
    from cloudagent_mcp.settings import Settings

    if provider is None:
        examined = examine(Settings.read())
    else:
        # SIGTERM ends it like Ctrl-C does: the sandboxes that were made are killed.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        examined = examine_provider(Settings.read(), provider)
    with closing(examined):
        findings = list(examined if as_json else _shown(examined))
    if as_json:
        click.echo(json.dumps([finding.model_dump(mode="json") for finding in findings]))
    sys.exit(0 if all(finding.ok for finding in findings) else EXIT_FAILED)


def _shown(findings: Iterator[Finding]) -> Iterator[Finding]:
    from cloudagent_mcp.render import show_finding

    for finding in findings:
        show_finding(finding)
        yield finding


@ca.command()
@click.option(
    "--send-credentials",
    is_flag=True,
    help="With each task, give the server of CLOUDAGENT_URL your ANTHROPIC_API_KEY and GH_TOKEN or GITHUB_TOKEN.",
)
def mcp(send_credentials: bool) -> None:
    """Serve MCP over standard input and output; this is what a client starts."""
    from cloudagent_mcp.app import App
    from cloudagent_mcp.server import mcp_server
    from cloudagent_mcp.settings import Settings

    if sys.stdin.isatty():
        click.echo(
            "This speaks MCP and waits for a client; add it with `claude mcp add cloudagent -- cloudagent-mcp`.",
            err=True,
        )
    settings = Settings.read()
    if settings.cloudagent_url is None:
        app = App(settings)
    else:
        from cloudagent_mcp.bridge import Bridge

        app = Bridge(settings, send_credentials=send_credentials)
    mcp_server(app, remote=False).run("stdio")


@ca.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8420, show_default=True, help="0 takes a free one.")
def serve(host: str, port: int) -> None:
    """Serve MCP at /mcp and REST at /api/v1 over HTTP."""
    from cloudagent_mcp.app import App
    from cloudagent_mcp.serve import serve as run_server
    from cloudagent_mcp.settings import Settings

    run_server(App(Settings.read()), host=host, port=port)


@ca.command()
@click.option("--concurrency", type=click.IntRange(1, 1000), help="How many tasks at once (WORKER_CONCURRENCY, or 10).")
@click.option("--embedded", is_flag=True, hidden=True)
def worker(concurrency: int | None, embedded: bool) -> None:
    """Run tasks until stopped. A stop gives running tasks back; their sandboxes live on."""
    import logging

    from cloudagent_mcp.app import App
    from cloudagent_mcp.settings import Settings
    from cloudagent_mcp.worker import work

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # It tells of each tick of its clock, and a worker may live for months.
    logging.getLogger("huey").setLevel(logging.WARNING)
    work(App(Settings.read()), embedded=embedded, concurrency=concurrency)


@ca.group()
def key() -> None:
    """Keys. Those of accounts are made where the server runs, with its DATABASE_URL and ENCRYPTION_KEY."""


@key.command()
def generate() -> None:
    """Print a fresh random key, good for ADMIN_API_KEY or ENCRYPTION_KEY."""
    from cloudagent_storage.secrets import generate_key

    click.echo(generate_key())


@key.command("create")
@click.argument("name")
@click.option("--account", default="local", show_default=True, help="Whose key; the account is made if there is none.")
@click.option("--expires-days", type=click.IntRange(1, 3650), help="When it stops to work. Default: never.")
@as_json
def create_key(name: str, account: str, expires_days: int | None, as_json: bool) -> None:
    """Make an API key for `ca serve` and print its token, this once."""
    from cloudagent_mcp import api_keys

    with server_app() as app:
        made, token = api_keys.create_key(
            app.store, app.settings.keyring, name=name, account_id=account, expires_days=expires_days
        )
    if as_json:
        click.echo(json.dumps({**made.model_dump(mode="json"), "token": token}))
        return
    click.echo(f"{made.key_id} for the account {account}. Its token is not shown again:", err=True)
    click.echo(token)


@key.command("list")
@as_json
def list_keys(as_json: bool) -> None:
    """List API keys, newest first."""
    with server_app() as app:
        keys = [found.model_dump(mode="json") for found in app.store.keys.list()]
    print_answer({"keys": keys}, as_json, "show_keys")


@key.command("revoke")
@click.argument("key_ids", metavar="KEY...", nargs=-1, required=True)
@as_json
def revoke_keys(key_ids: tuple[str, ...], as_json: bool) -> None:
    """End API keys, named by their ids or any beginning of one that is unique. It works within seconds."""
    with server_app() as app:
        keys = [app.store.keys.revoke(name).model_dump(mode="json") for name in key_ids]
    print_answer({"keys": keys}, as_json, "show_keys")


@contextmanager
def server_app() -> Generator[App]:
    """What the server works with, for its operator on the same machine."""
    from cloudagent_mcp.app import App
    from cloudagent_mcp.settings import Settings

    settings = Settings.read()
    if settings.cloudagent_url is not None:
        raise InvalidInput(
            "API keys are made, listed and revoked where the server runs, and CLOUDAGENT_URL names another one.",
            remedy="Type it on the server's machine, with its DATABASE_URL and ENCRYPTION_KEY and no CLOUDAGENT_URL.",
            field="CLOUDAGENT_URL",
        )
    app = App(settings)
    try:
        yield app
    finally:
        app.close()
