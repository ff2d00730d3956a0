"""Who may come in over HTTP: one guard in front of every route."""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cloudagent_mcp.api_keys import ApiKeyCheck
from cloudagent_mcp.rest import problem
from cloudagent_mcp.settings import Settings
from cloudagent_storage.errors import CloudAgentError, ForbiddenHost, InvalidInput, Unauthorized
from cloudagent_storage.records import LOCAL_ACCOUNT

OPEN_PATHS = frozenset({"/health"})


def is_loopback(host: str) -> bool:
    """Does only this machine reach a server that is bound to `host`?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def server_key(settings: Settings, *, host: str) -> tuple[str, bool]:
    """The key that a server wants, and whether it was made just now.

    On loopback one is made at the first start and kept where only its owner can read it: an agent in a local sandbox
    shares the host's loopback. Raises `InvalidInput` for a server beyond loopback without keys of its operator's.
    """
    if not is_loopback(host) and (settings.admin_api_key is None or settings.encryption_key is None):
        raise InvalidInput(
            "A server that other machines can reach needs ADMIN_API_KEY and ENCRYPTION_KEY.",
            remedy="Set both; `ca key generate` prints a good value for either.",
        )
    if settings.admin_api_key is not None:
        return settings.admin_api_key.get_secret_value(), False
    settings.make_home()
    path = settings.cloudagent_home / "server.key"
    made = _make_key_file(path)
    return path.read_text().strip(), made


def _make_key_file(path: Path) -> bool:
    draft = path.with_name(f"server.key.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, f"{secrets.token_urlsafe(32)}\n".encode())
        os.link(draft, path)
        return True
    except FileExistsError:
        return False
    finally:
        os.close(descriptor)
        draft.unlink()


def allowed_hosts(settings: Settings, *, host: str, port: int) -> list[str]:
    """The Host headers that a server answers to; empty means any, for a server beyond loopback without PUBLIC_URL."""
    public = urlsplit(settings.public_url).netloc if settings.public_url else ""
    if not is_loopback(host):
        return [public] if public else []
    names = {host, "127.0.0.1", "localhost", "[::1]"}
    return sorted({f"{name}:{port}" for name in names} | ({public} if public else set()))


class Guard:
    """ASGI middleware: checks Host, Origin and key on every route, and says whose request it is."""

    def __init__(self, app: ASGIApp, *, key: str, hosts: Sequence[str], api_keys: ApiKeyCheck) -> None:
        self._app = app
        self._key = key.encode()
        self._api_keys = api_keys
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        response = self._foreign(request)
        if response is None and request.url.path not in OPEN_PATHS:
            try:
                account_id, operator = await self._holder(request)
                scope.setdefault("state", {}).update(account_id=account_id, operator=operator)
            except CloudAgentError as error:
                response = problem(error)
        await (self._app if response is None else response)(scope, receive, send)

    def _foreign(self, request: Request) -> Response | None:
        if self._hosts:
            # Against DNS rebinding: a page of somebody else's that resolves to this machine says its own name here.
            if request.headers.get("host", "") not in self._hosts:
                return problem(ForbiddenHost(), status=421)
            origin = request.headers.get("origin")
            if origin is not None and urlsplit(origin).netloc not in self._hosts:
                return problem(ForbiddenHost(), status=403)
        return None

    async def _holder(self, request: Request) -> tuple[str, bool]:
        """Whose key it is, and whether that is the operator's."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthorized()
        if hmac.compare_digest(token.strip().encode(), self._key):
            return LOCAL_ACCOUNT, True
        return await self._api_keys.account_of(token.strip()), False
