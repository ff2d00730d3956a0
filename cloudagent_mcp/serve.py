"""The HTTP server's process."""

from __future__ import annotations

import logging
import socket

import click
import uvicorn

from cloudagent_mcp.app import App
from cloudagent_mcp.auth import is_loopback, server_key
from cloudagent_mcp.server import http_app
from cloudagent_storage.errors import PortTaken


def serve(app: App, *, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT. Where the queue is a file, the worker is started with it.

    Raises `InvalidInput` for a server beyond loopback without keys, `PortTaken`, and `DatabaseUnavailable`.
    """
    key, made = server_key(app.settings, host=host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named: asyncio turns Nagle off only then, and an answer of two writes would wait 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # from here on a client that has read the address below can connect
    except OSError as error:
        listener.close()
        raise PortTaken() from error
    port = listener.getsockname()[1]
    app.store.check()
    app.store.keep_reserve()
    app.ensure_worker()
    url = app.settings.public_url or f"http://{f'[{host}]' if ':' in host else host}:{port}"
    click.echo(f"cloudagent serves MCP at {url}/mcp and REST at {url}/api/v1")
    if made:
        click.echo(
            f"A key was made; it is kept in the data folder. Add the server to Claude Code with:\n"
            f'  claude mcp add --transport http cloudagent {url}/mcp --header "Authorization: Bearer {key}"'
        )
    elif is_loopback(host) and app.settings.admin_api_key is None:
        click.echo("It wants the key in the file server.key of the data folder.")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = uvicorn.Config(
        http_app(app, key=key, host=host, port=port),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        app.close()
