"""`ca doctor`: what a task needs, checked one by one, each failure with its remedy.

With `--provider`, what that sandbox provider promises, checked with the real account: the contract that the tests
run over every provider.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from urllib.parse import urlsplit

import anyio.to_thread
from anyio.from_thread import start_blocking_portal

from cloudagent_mcp import __version__
from cloudagent_mcp.app import App
from cloudagent_mcp.auth import is_loopback
from cloudagent_mcp.bridge import Bridge
from cloudagent_mcp.client import MARKS
from cloudagent_mcp.embedded import running_worker
from cloudagent_mcp.prompts import Prompts, built_in
from cloudagent_mcp.remote_server import RemoteServer, address_of
from cloudagent_mcp.settings import Settings
from cloudagent_queue import git
from cloudagent_queue.agents import open_agent
from cloudagent_queue.sandboxes.contract import CHECKS, Check, Trial, name_of
from cloudagent_queue.sandboxes.prices import Prices
from cloudagent_queue.sandboxes.template import SERVICES
from cloudagent_storage.errors import CloudAgentError, InvalidInput, ProviderBroken, SandboxUnavailable, Unavailable
from cloudagent_storage.records import Record

FREE_BYTES = 1_000_000_000


class Finding(Record):
    """One line of the doctor's."""

    name: str
    ok: bool
    message: str
    remedy: str | None = None
    seconds: float | None = None
    cost_usd: float | None = None
    """Of the sandboxes that lived meanwhile, by list price; None where that is not known."""


def examine(settings: Settings) -> Generator[Finding]:
    """Check everything; one check that fails does not end the others. For a client of a server, that server."""
    if settings.cloudagent_url is not None:
        yield from _examine_server(settings)
        return
    app = App(settings)
    agent = open_agent("claude")
    clouds = [name for name in app.providers if name in SERVICES]
    checks: list[tuple[str, Callable[[], str]]] = [
        ("data folder", lambda: _data_folder(settings)),
        ("database", lambda: _database(app)),
        ("queue", lambda: app.queue.check()),
        ("git", _git),
        *[(f"sandbox {name}", lambda name=name: app.open_provider(name).self_check()) for name in app.providers],
        ("prices", lambda: _prices(app)),
        ("agent", lambda: _agent_in_sandbox(app)),
        ("credential", lambda: _credential(settings, agent.check_credential)),
        ("worker", lambda: _worker(settings)),
        ("prompts", lambda: _prompts(app)),
    ]
    for name, check in checks:
        yield _find(name, check)
    if clouds:
        yield _template(settings.sandbox_template, clouds[0])
    app.close()


def _examine_server(settings: Settings) -> Generator[Finding]:
    """What a client of that server needs: the rest is done there, and `ca doctor` there checks it."""
    server, bridge = RemoteServer(settings), Bridge(settings)
    checks: list[tuple[str, Callable[[], Awaitable[str]]]] = [
        ("data folder", lambda: _in_thread(_data_folder, settings)),
        ("git", lambda: _in_thread(_git)),
        ("server", lambda: _server(settings, server)),
        ("key", lambda: _key(server)),
        ("prompts", lambda: _in_thread(_prompts, bridge)),
    ]
    with start_blocking_portal() as portal:
        for name, check in checks:
            yield _find(name, lambda check=check: portal.call(check))
        portal.call(server.close)


async def _server(settings: Settings, server: RemoteServer) -> str:
    version = (await server.health()).version
    url = urlsplit(address_of(settings.cloudagent_url or ""))
    said = f"{url.scheme}://{url.netloc}, version {version}"
    if version != __version__:
        said += f" (here: {__version__}; update the older one if a call says server_outdated)"
    if url.scheme == "http" and not is_loopback(url.hostname or ""):
        said += "; without https others on the way can read the key"
    return said


async def _key(server: RemoteServer) -> str:
    page = await server.call("list_tasks", MARKS["list_tasks"], {"limit": 1})
    return f"accepted; {page['total']} tasks are its account's"


async def _in_thread(check: Callable[..., str], *arguments: object) -> str:
    return await anyio.to_thread.run_sync(check, *arguments)


def _git() -> str:
    return git.run("--version", folder=Path("/")).text.removeprefix("git ")


def _prompts(app: App) -> str:
    prompts, caller = Prompts(app.settings.cloudagent_home, app.operations), app.local_caller()
    if broken := prompts.broken(caller):
        more = f" And {len(broken) - 5} more." if len(broken) > 5 else ""
        raise InvalidInput(
            f"{'; '.join(broken[:5])}.{more}",
            remedy="Mend or remove them; the README, section Prompts, has their form.",
        )
    own = len(prompts.of(caller)) - len(built_in())
    return f"{len(built_in())} built in, {own} of your own"


def examine_provider(settings: Settings, name: str) -> Generator[Finding]:
    """Try a sandbox provider with the account that is configured, one sandbox or two at a time.

    Every sandbox that was made is killed at the end, also when the caller stops in the middle.
    Raises `UnknownProvider`, and `InvalidInput` for a table of prices that cannot be used.
    """
    provider, prices = App(settings).open_provider(name), Prices.read(settings.sandbox_prices)
    yield (account := _find("the account can be used", provider.self_check))
    if not account.ok:
        return
    trial, started = Trial(provider), time.monotonic()

    def timed(what: str, check: Callable[[], str]) -> Finding:
        began = time.monotonic()
        found = _find(what, check)
        return found.model_copy(update={"seconds": round(time.monotonic() - began, 2), "cost_usd": bill(began)})

    def bill(since: float) -> float | None:
        now = time.monotonic()
        parts = [
            prices.cost_usd(name, life.resources, max(0.0, (life.ended or now) - max(life.began, since)))
            for life in trial.lives.values()
        ]
        known = [part for part in parts if part is not None]
        return round(sum(known), 6) if len(known) == len(parts) else None

    try:
        yield (made := timed("a sandbox can be made", lambda: trial.shared.remark or trial.shared.id))
        for check in CHECKS if made.ok else ():
            yield timed(name_of(check), lambda check=check: _run_check(trial, check))
    finally:
        # Not yielded from here: whoever stopped listening does not come back.
        ended = timed("every sandbox that was made is gone", lambda: _end(trial))
    yield ended
    yield Finding(
        name="total",
        ok=True,
        message=f"{len(trial.lives)} sandboxes",
        seconds=round(time.monotonic() - started, 2),
        cost_usd=bill(started),
    )


def _run_check(trial: Trial, check: Check) -> str:
    try:
        check(trial)
    finally:
        trial.end_fresh()
    return ""


def _end(trial: Trial) -> str:
    trial.end()
    if left := trial.provider.list(trial.mark):
        raise ProviderBroken(
            f"{len(left)} sandboxes are still listed after they were killed.",
            remedy=f"Kill them in the provider's dashboard: {', '.join(info.id for info in left)}.",
        )
    return ""


def _find(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name=name, ok=True, message=check())
    except CloudAgentError as error:
        return Finding(name=name, ok=False, message=error.message, remedy=error.remedy)
    except Exception as error:
        return Finding(name=name, ok=False, message=f"The check itself failed ({type(error).__name__}).")


def _template(name: str | None, provider: str) -> Finding:
    if name is not None:
        return Finding(name="template", ok=True, message=name)
    return Finding(
        name="template",
        ok=True,
        message="none: each sandbox is prepared first, which takes a minute or more",
        remedy=f"Faster: `ca template build --provider {provider}`, and set SANDBOX_TEMPLATE as it says.",
    )


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


def _prices(app: App) -> str:
    prices = Prices.read(app.settings.sandbox_prices)
    return "; ".join(map(prices.told, app.providers))


def _agent_in_sandbox(app: App) -> str:
    """The agent's own command line, where it will have to run: inside a sandbox."""
    provider = app.open_provider(app.providers[0])
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
