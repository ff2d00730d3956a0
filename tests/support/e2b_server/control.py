"""The control plane: what E2B's API answers, and who may reach which sandbox's envd.

Codes and messages are those of packages/api and packages/shared/pkg/proxy in e2b-dev/infra.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import string
import time
import urllib.parse
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloudagent_queue.sandboxes.bubblewrap import Bubblewrap, library_path
from tests.support.e2b_server import envd
from tests.support.e2b_server.faults import reset, transport_of, until_closed
from tests.support.e2b_server.sandbox import BARE_PATH, HOME, PATH_WITH_AGENT, USER, Gone, Isolated, copy_files
from tests.support.e2b_server.templates import Template, Templates

ENVD_VERSION = "0.6.1"
"""Octet-stream uploads, and no metadata of files."""
DEFAULT_TIMEOUT_S = 15
DISK_MB = 10_240


@dataclass
class Settings:
    """How this server is set up."""

    api_key: str
    session_cap_s: float = 24 * 3600
    """The longest life of a sandbox."""
    refuse_beyond_cap: bool = True
    """Does `timeout` answer 400 for what leads beyond the cap? E2B silently gives less; its create always refuses."""
    most_sandboxes: int = 1000
    shared_folder: str | None = None
    """A folder of this machine's that new sandboxes have, too, at its own path: stand-ins for agents leave traces."""


@dataclass
class Sandbox:
    """A sandbox and what was asked of it."""

    id: str
    template: Template
    asked: dict[str, Any]
    inside: Isolated
    app: Any
    token: str
    started_at: float
    ends_at: float = 0.0
    timeouts: list[int] = field(default_factory=list[int])
    network: dict[str, Any] = field(default_factory=dict[str, Any])
    timer: asyncio.TimerHandle | None = None

    def answer(self) -> dict[str, Any]:
        return {
            "templateID": self.template.id,
            "sandboxID": self.id,
            "clientID": "6532622b",
            "alias": self.template.name,
            "envdVersion": ENVD_VERSION,
            "envdAccessToken": self.token,
            "trafficAccessToken": None,
            "domain": None,
        }

    def info(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in self.answer().items() if name != "trafficAccessToken"},
            "startedAt": _moment(self.started_at),
            "endAt": _moment(self.ends_at),
            "cpuCount": self.template.cpu_count,
            "memoryMB": self.template.memory_mb,
            "diskSizeMB": DISK_MB,
            "state": "running",
            "metadata": self.asked.get("metadata") or {},
            "allowInternetAccess": self.asked.get("allow_internet_access"),
            "network": self.network,
        }

    def record(self) -> dict[str, Any]:
        """What a test may want to know of it."""
        return {
            "id": self.id,
            "alive": not self.inside.gone.is_set(),
            "asked": self.asked,
            "timeouts": self.timeouts,
            "network": self.network,
            "home": str(self.inside.folder / "home"),
            "first_process": self.inside.first_process(),
            "started_at": self.started_at,
            "ended_at": self.inside.ended_at,
        }


class Cloud:
    """All sandboxes of the server."""

    def __init__(self, folder: Path, settings: Settings, bubblewrap: Bubblewrap) -> None:
        self.settings = settings
        self.templates = Templates(folder / "templates")
        self.sandboxes: dict[str, Sandbox] = {}
        """Every one that there was."""
        self._folder = folder
        self._bubblewrap = bubblewrap
        self._tasks: set[asyncio.Task[None]] = set()

    def living(self) -> list[Sandbox]:
        return [sandbox for sandbox in self.sandboxes.values() if not sandbox.inside.gone.is_set()]

    def find(self, sandbox_id: str) -> Sandbox:
        sandbox = self.sandboxes.get(sandbox_id)
        if sandbox is None or sandbox.inside.gone.is_set():
            raise HTTPException(404, f"Sandbox \"{sandbox_id}\" doesn't exist or you don't have access to it")
        return sandbox

    async def create(self, asked: dict[str, Any]) -> Sandbox:
        timeout = asked.get("timeout", DEFAULT_TIMEOUT_S)
        self._check_timeout(timeout)
        template = self.templates.find(asked["templateID"])
        most = self.settings.most_sandboxes
        if len(self.living()) >= most:
            raise HTTPException(
                429,
                f"you have reached the maximum number of concurrent E2B sandboxes ({most}). If you need more, "
                "please visit 'https://e2b.dev/docs/billing'",
            )
        sandbox_id = "i" + "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(19))
        folder = self._folder / "sandboxes" / sandbox_id
        if template.folder is not None:
            await asyncio.to_thread(copy_files, template.folder, folder / "home")
        inside = Isolated(folder, self._bubblewrap, hidden=self._folder, shared=self.settings.shared_folder)
        env: dict[str, str] = {
            "PATH": PATH_WITH_AGENT if template.has_agent else BARE_PATH,
            **{"HOME": HOME, "USER": USER, "LOGNAME": USER, "LANG": "C.UTF-8"},
            **({"PYTHONPATH": library} if template.has_agent and (library := library_path()) else {}),
            **{"E2B_SANDBOX": "true", "E2B_SANDBOX_ID": sandbox_id, "E2B_TEMPLATE_ID": template.id},
            **(asked.get("envVars") or {}),
        }
        app = envd.application(inside, env)
        sandbox = Sandbox(sandbox_id, template, asked, inside, app, secrets.token_hex(16), time.time())
        sandbox.network = asked.get("network") or {}
        self.sandboxes[sandbox_id] = sandbox
        try:
            await inside.ready()
        except Gone:
            raise HTTPException(500, "Failed to place sandbox") from None
        self.give_time(sandbox, timeout)
        return sandbox

    def set_timeout(self, sandbox: Sandbox, seconds: int) -> None:
        """From now on; it may be less than was left."""
        sandbox.timeouts.append(seconds)
        cap = self.settings.session_cap_s
        if self.settings.refuse_beyond_cap and time.time() + seconds > sandbox.started_at + cap + 1:
            raise HTTPException(400, "Max instance length exceeded")
        self.give_time(sandbox, seconds)

    def connect(self, sandbox: Sandbox, seconds: int) -> None:
        """At least for so long; what was given before is not taken."""
        self._check_timeout(seconds)
        if time.time() + seconds > sandbox.ends_at:
            self.give_time(sandbox, seconds)

    def give_time(self, sandbox: Sandbox, seconds: float) -> None:
        now = time.time()
        left = max(0.0, min(seconds, sandbox.started_at + self.settings.session_cap_s - now))
        sandbox.ends_at = now + left
        if sandbox.timer is not None:
            sandbox.timer.cancel()
        sandbox.timer = asyncio.get_running_loop().call_later(left, self._end, sandbox)

    async def kill(self, sandbox: Sandbox) -> None:
        if sandbox.timer is not None:
            sandbox.timer.cancel()
        await sandbox.inside.kill()

    def _end(self, sandbox: Sandbox) -> None:
        task = asyncio.create_task(sandbox.inside.kill())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check_timeout(self, seconds: int) -> None:
        if seconds <= 0:
            raise HTTPException(400, "Timeout must be greater than 0")
        if seconds > self.settings.session_cap_s:
            hours = math.floor(self.settings.session_cap_s / 3600)
            raise HTTPException(400, f"Timeout cannot be greater than {hours} hours")


class Router:
    """An ASGI application: a request that names a sandbox in its header is for that one's envd, others for the API."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._api = api(cloud)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        if scope["type"] != "http" or b"e2b-sandbox-id" not in headers:
            await self._api(scope, receive, send)
            return
        sandbox_id = headers[b"e2b-sandbox-id"].decode()
        sandbox = self._cloud.sandboxes.get(sandbox_id)
        no_sandbox = {"sandboxId": sandbox_id, "message": "The sandbox was not found", "code": 502}
        if sandbox is None or sandbox.inside.gone.is_set():
            await JSONResponse(no_sandbox, 502)(scope, receive, send)
            return
        if scope["path"] != "/health" and headers.get(b"x-access-token", b"").decode() != sandbox.token:
            message = "unauthorized access, please provide a valid access token or method signing if supported"
            await JSONResponse({"code": 401, "message": message}, 401)(scope, receive, send)
            return
        started = left = False

        async def send_on(message: Any) -> None:
            nonlocal started
            if not sandbox.inside.gone.is_set():
                started = True
                await send(message)

        async def receive_on() -> Any:
            nonlocal left
            message = await receive()
            if message["type"] == "http.disconnect":
                left = True
                serving.cancel()  # a stream that has nothing to say would not notice
            return message

        async def serve() -> None:
            await sandbox.inside.ask("ping")  # envd is in there: it answers nothing while the sandbox is frozen
            await sandbox.app(scope, receive_on, send_on)

        serving = asyncio.create_task(serve())
        gone = asyncio.create_task(sandbox.inside.gone.wait())
        try:
            await asyncio.wait([serving, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            serving.cancel()
            gone.cancel()
            (error, _) = await asyncio.gather(serving, gone, return_exceptions=True)
        if sandbox.inside.gone.is_set() and not started:
            await JSONResponse(no_sandbox, 502)(scope, receive, send)
        elif sandbox.inside.gone.is_set() and error is not None:
            reset(transport_of(send))
            await until_closed(receive)
        elif isinstance(error, Exception) and not left:
            raise error


def api(cloud: Cloud) -> Starlette:
    """E2B's API as far as the SDKs use it here."""

    async def create(request: Request) -> Response:
        return JSONResponse((await cloud.create(await request.json())).answer(), 201)

    async def list_all(request: Request) -> Response:
        wanted = request.query_params
        metadata = {
            urllib.parse.unquote(name): urllib.parse.unquote(value)
            for name, value in urllib.parse.parse_qsl(wanted.get("metadata", ""))
        }
        found = [
            sandbox.info()
            for sandbox in sorted(cloud.living(), key=lambda one: one.started_at, reverse=wanted.get("order") != "asc")
            if metadata.items() <= (sandbox.asked.get("metadata") or {}).items()
            and "running" in wanted.get("state", "running").split(",")
        ]
        start, limit = int(wanted.get("nextToken") or 0), int(wanted.get("limit") or 100)
        more = {"x-next-token": str(start + limit)} if start + limit < len(found) else {}
        return JSONResponse(found[start : start + limit], headers=more)

    async def one(request: Request) -> Response:
        sandbox = cloud.find(request.path_params["id"])
        if request.method == "DELETE":
            await cloud.kill(sandbox)
            return Response(status_code=204)
        return JSONResponse(sandbox.info())

    async def set_timeout(request: Request) -> Response:
        sandbox, asked = cloud.find(request.path_params["id"]), await request.json()
        cloud.set_timeout(sandbox, asked["timeout"])
        return Response(status_code=204)

    async def connect(request: Request) -> Response:
        sandbox, asked = cloud.find(request.path_params["id"]), await request.json()
        cloud.connect(sandbox, asked.get("timeout", DEFAULT_TIMEOUT_S))
        return JSONResponse(sandbox.answer())

    async def network(request: Request) -> Response:
        cloud.find(request.path_params["id"]).network = await request.json()
        return Response(status_code=204)

    async def snapshot(request: Request) -> Response:
        sandbox, asked = cloud.find(request.path_params["id"]), await request.json()
        template = await cloud.templates.add_snapshot(sandbox.inside, sandbox.template, asked.get("name"))
        return JSONResponse(template.as_snapshot(), 201)

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"code": error.status_code, "message": error.detail}, error.status_code)

    def keyed(endpoint: Any) -> Any:
        async def checked(request: Request) -> Response:
            if request.headers.get("x-api-key") != cloud.settings.api_key:
                message = "Invalid API key, please visit https://e2b.dev/docs/api-key for more information."
                raise HTTPException(401, message)
            return await endpoint(request)

        return checked

    routes = [
        ("POST", "/sandboxes", create),
        ("POST", "/v2/sandboxes", create),
        ("GET", "/sandboxes", list_all),
        ("GET", "/v2/sandboxes", list_all),
        ("GET", "/sandboxes/{id}", one),
        ("DELETE", "/sandboxes/{id}", one),
        ("POST", "/sandboxes/{id}/timeout", set_timeout),
        ("POST", "/sandboxes/{id}/connect", connect),
        ("POST", "/v2/sandboxes/{id}/connect", connect),
        ("PUT", "/sandboxes/{id}/network", network),
        ("POST", "/sandboxes/{id}/snapshots", snapshot),
        *cloud.templates.routes(),
    ]
    return Starlette(
        routes=[Route(path, keyed(endpoint), methods=[method]) for method, path, endpoint in routes]
        + cloud.templates.open_routes(),
        exception_handlers={HTTPException: refuse},
    )


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
