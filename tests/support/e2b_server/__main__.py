"""`python -m tests.support.e2b_server --folder F --port 0 …`: prints `{"port": P, "pid": N}` when it listens."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloudagent_queue.sandboxes.bubblewrap import find_bubblewrap
from tests.support.e2b_server.control import Cloud, Router, Settings
from tests.support.e2b_server.faults import Fault, Faults


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, default={"api_key": "e2b_0123456789abcdef"}, help="JSON")
    given = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    listener = socket.create_server(("127.0.0.1", given.port), backlog=2048)
    asyncio.run(serve(given.folder, Settings(**given.settings), listener))
    os._exit(0)  # what is still open is of no interest


async def serve(folder: Path, settings: Settings, listener: socket.socket) -> None:
    cloud = Cloud(folder, settings, find_bubblewrap())
    switches = Starlette()
    app = Faults(Router(cloud), switches)
    switches.routes.extend(routes_of_switches(cloud, app))
    # Clients keep connections for five minutes; one that the server has closed meanwhile would fail at its next use.
    config = uvicorn.Config(
        app, log_level="warning", timeout_keep_alive=3600, timeout_graceful_shutdown=0, lifespan="off", ws="none"
    )
    print(json.dumps({"port": listener.getsockname()[1], "pid": os.getpid()}), flush=True)
    await uvicorn.Server(config).serve([listener])
    for sandbox in cloud.living():
        sandbox.inside.end()


def routes_of_switches(cloud: Cloud, faults: Faults) -> list[Route]:
    """What tests use beside E2B's own API; it needs no key."""

    async def stats(request: Request) -> Response:
        return JSONResponse(
            {
                "requests": faults.requests,
                "created": len(cloud.sandboxes),
                "living": len(cloud.living()),
                "streams": faults.streams,
                "faults": {name: fault.fired for name, fault in faults.faults.items()},
            }
        )

    async def add_fault(request: Request) -> Response:
        name = f"fault{len(faults.faults) + 1}"
        faults.faults[name] = Fault(**await request.json())
        return JSONResponse({"name": name, **asdict(faults.faults[name])})

    async def heal(request: Request) -> Response:
        for fault in faults.faults.values():
            fault.count = 0
        return Response(status_code=204)

    async def sandboxes(request: Request) -> Response:
        return JSONResponse([sandbox.record() for sandbox in cloud.sandboxes.values()])

    async def builds(request: Request) -> Response:
        return JSONResponse([cloud.templates.record(build) for build in cloud.templates.builds.values()])

    async def fail_next_build(request: Request) -> Response:
        cloud.templates.next_failure = await request.json()
        return Response(status_code=204)

    async def change(request: Request) -> Response:
        for name, value in (await request.json()).items():
            setattr(cloud.settings, name, value)
        return Response(status_code=204)

    first = asdict(cloud.settings)

    async def as_first(request: Request) -> Response:
        cloud.settings = Settings(**first)
        return Response(status_code=204)

    async def to_sandbox(request: Request) -> Response:
        inside = cloud.find(request.path_params["id"]).inside
        does: dict[str, Callable[[], Any]] = {"freeze": inside.freeze, "thaw": inside.thaw, "vanish": inside.end}
        does[request.path_params["what"]]()
        if request.path_params["what"] == "vanish":
            await inside.gone.wait()
        return Response(status_code=204)

    return [
        Route("/_stats", stats, methods=["GET"]),
        Route("/_faults", add_fault, methods=["POST"]),
        Route("/_faults", heal, methods=["DELETE"]),
        Route("/_settings", change, methods=["POST"]),
        Route("/_settings", as_first, methods=["DELETE"]),
        Route("/_sandboxes", sandboxes, methods=["GET"]),
        Route("/_sandboxes/{id}/{what}", to_sandbox, methods=["POST"]),
        Route("/_builds", builds, methods=["GET"]),
        Route("/_builds/fail", fail_next_build, methods=["POST"]),
    ]


if __name__ == "__main__":
    main()
