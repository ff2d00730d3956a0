"""`ca doctor`: what a task needs, checked one by one, each failure with its remedy."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from cloudagent_mcp import __version__
from cloudagent_mcp.app import App
from cloudagent_mcp.embedded import running_worker
from cloudagent_mcp.settings import Settings
from cloudagent_queue import git
from cloudagent_queue.agents import open_agent
from cloudagent_queue.sandboxes import open_provider
from cloudagent_queue.sandboxes.prices import Prices
from cloudagent_storage.errors import CloudAgentError, SandboxUnavailable, Unavailable
from cloudagent_storage.records import Record

FREE_BYTES = 1_000_000_000


class Finding(Record):
    """One line of the doctor's."""

    name: str
    ok: bool
    message: str
    remedy: str | None = None


def examine(settings: Settings) -> Iterator[Finding]:
    """Check everything; one check that fails does not end the others."""
    app = App(settings)
    agent = open_agent("claude")
    checks: list[tuple[str, Callable[[], str]]] = [
        ("data folder", lambda: _data_folder(settings)),
        ("database", lambda: _database(app)),
        ("queue", lambda: app.queue.check()),
        ("git", lambda: git.run("--version", folder=Path("/")).text.removeprefix("git ")),
        *[(f"sandbox {name}", lambda name=name: _sandbox(settings, name)) for name in app.providers],
        ("prices", lambda: _prices(app)),
        ("agent", lambda: _agent_in_sandbox(app)),
        ("credential", lambda: _credential(settings, agent.check_credential)),
        ("worker", lambda: _worker(settings)),
    ]
    for name, check in checks:
        try:
            yield Finding(name=name, ok=True, message=check())
        except CloudAgentError as error:
            yield Finding(name=name, ok=False, message=error.message, remedy=error.remedy)
        except Exception as error:
            yield Finding(name=name, ok=False, message=f"The check itself failed ({type(error).__name__}).")
    app.close()


def _data_folder(settings: Settings) -> str:
    home = settings.cloudagent_home
    try:
        settings.make_home()
        with tempfile.TemporaryFile(dir=home):
            free = shutil.disk_usage(home).free
    except OSError as error:
        raise Unavailable(
            "The data folder cannot be written to.", remedy="Set CLOUDAGENT_HOME to a folder of yours."
        ) from error
    if free < FREE_BYTES:
        raise Unavailable(
            "Less than 1 GB of disk is free.", remedy="Free some, or set CLOUDAGENT_HOME to another disk."
        )
    return f"{home}, {free / 1e9:.0f} GB free"


def _database(app: App) -> str:
    app.store.check()
    return f"{app.settings.store_url.partition(':')[0]}, {app.store.tasks.unfinished()} tasks unfinished"


def _sandbox(settings: Settings, name: str) -> str:
    return open_provider(name, data_folder=settings.cloudagent_home).self_check()


def _prices(app: App) -> str:
    prices = Prices.read(app.settings.sandbox_prices)
    return "; ".join(map(prices.told, app.providers))


def _agent_in_sandbox(app: App) -> str:
    """The agent's own command line, where it will have to run: inside a sandbox."""
    provider = open_provider(app.providers[0], data_folder=app.settings.cloudagent_home)
    sandbox = provider.create(metadata={"purpose": "doctor"})
    try:
        found = sandbox.run(
            [
                sandbox.python,
                "-c",
                "import claude_agent_sdk, pathlib, subprocess; p = pathlib.Path(claude_agent_sdk.__file__);"
                "print(subprocess.check_output([p.with_name('_bundled') / 'claude', '--version'], text=True))",
            ],
            timeout_s=60,
        )
    finally:
        sandbox.kill()
    if found.exit_code != 0:
        raise SandboxUnavailable("The agent does not start in a sandbox.", remedy="Install cloudagent-mcp anew.")
    return found.output.strip()


def _credential(settings: Settings, check: Callable[..., None]) -> str:
    if settings.system_anthropic_api_key is not None:
        return "SYSTEM_ANTHROPIC_API_KEY, for whoever brings none"
    check(settings.environment)
    return "found in the environment"


def _worker(settings: Settings) -> str:
    if not settings.embedded:
        return "started by you: `ca worker`"
    running = running_worker(Path(settings.cloudagent_home))
    if running is None:
        return f"version {__version__} starts with the first task"
    return f"version {running.version} runs"
