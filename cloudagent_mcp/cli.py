"""`ca`, for people: written by hand over the same operations that tools and REST offer.

Imports are made inside the commands: `ca mcp` is started by every client session, and starts as fast as it can.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import click

from cloudagent_mcp.cli_schedules import schedule
from cloudagent_mcp.cli_shared import EXIT_FAILED, as_json, client, print_answer, take_back_interrupted
from cloudagent_mcp.cli_tasks import task
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
    from cloudagent_mcp.doctor import Finding

EXIT_USAGE, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 2, 3, 130


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


ca.add_command(task)
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
    take_back_interrupted(settings)
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
