"""Templates: those that are always there, snapshots of sandboxes, and builds.

A build is recorded, not carried out; a snapshot holds the home folder, where E2B's hold the memory, too.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import string
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.support.e2b_server.sandbox import Isolated


@dataclass
class Template:
    """What a sandbox starts from."""

    id: str
    name: str | None
    cpu_count: int = 2
    memory_mb: int = 512
    folder: Path | None = None
    """What its home begins with."""
    has_agent: bool = True
    """Is the agent's library in reach of its `python3`?"""
    snapshot_of: str | None = None
    ready: bool = True

    def as_snapshot(self) -> dict[str, Any]:
        return {"snapshotID": f"{self.id}:default", "names": [f"{self.name}:default"] if self.name else []}


@dataclass
class Build:
    """One build of a template."""

    id: str
    template: Template
    requested: dict[str, Any]
    started: dict[str, Any] | None = None
    logs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    status: str = "waiting"
    reason: dict[str, Any] | None = None
    uploads: dict[str, int] = field(default_factory=dict[str, int])
    """The size of each uploaded archive, by its hash."""
    fails: dict[str, Any] | None = None
    """At which step it is to fail (from 1), and with which words."""

    def begin(self, asked: dict[str, Any]) -> None:
        self.started, self.status = asked, "building"

    def advance(self) -> None:
        """The next step; the end after the last one."""
        assert self.started is not None
        steps: list[dict[str, Any]] = self.started.get("steps") or []
        done = len(self.logs)
        if done < len(steps):
            self._log(f"[builder {done + 1}/{len(steps)}] {steps[done]['type']} {' '.join(steps[done]['args'])}", done)
            if self.fails is not None and self.fails["step"] == done + 1:
                self.status = "error"
                self.reason = {"message": self.fails["message"], "step": str(done + 1), "logEntries": self.logs[-1:]}
        else:
            self._log("Build finished", done)
            self.status, self.template.ready = "ready", True

    def _log(self, message: str, step: int) -> None:
        moment = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        self.logs.append({"timestamp": moment, "message": message, "level": "info", "step": str(step + 1)})


class Templates:
    """All templates of the server. `base` is what E2B has; `bare` is one without the agent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.builds: dict[str, Build] = {}
        self.next_failure: dict[str, Any] | None = None
        self._templates = [Template(new_id(), "base"), Template(new_id(), "bare", has_agent=False)]

    def find(self, wanted: str) -> Template:
        """By id or name, with or without a tag. Raises 404."""
        plain = wanted.partition(":")[0].rpartition("/")[2]
        for template in self._templates:
            if plain in (template.id, template.name) and template.ready:
                return template
        raise HTTPException(404, f"template '{plain}' not found")

    async def add_snapshot(self, inside: Isolated, origin: Template, name: str | None) -> Template:
        template = Template(new_id(), name, origin.cpu_count, origin.memory_mb, has_agent=origin.has_agent)
        template.folder, template.snapshot_of = self._folder / template.id, inside.folder.name
        await inside.copy_home(template.folder)
        self._templates.append(template)
        return template

    def routes(self) -> list[tuple[str, str, Any]]:
        return [
            ("GET", "/snapshots", self._list_snapshots),
            ("GET", "/templates/aliases/{name}", self._alias),
            ("DELETE", "/templates/{id}", self._delete),
            ("POST", "/v3/templates", self._request_build),
            ("GET", "/templates/{id}/files/{hash}", self._upload_address),
            ("POST", "/v2/templates/{id}/builds/{build}", self._start_build),
            ("GET", "/templates/{id}/builds/{build}/status", self._status),
        ]

    def open_routes(self) -> list[Route]:
        """What a presigned address leads to: nobody shows a key there."""
        return [Route("/uploads/{build}/{hash}", self._upload, methods=["PUT"])]

    def record(self, build: Build) -> dict[str, Any]:
        return {
            "id": build.id,
            "template": build.template.id,
            "requested": build.requested,
            "started": build.started,
            "status": build.status,
            "uploads": build.uploads,
        }

    async def _list_snapshots(self, request: Request) -> Response:
        of, name = request.query_params.get("sandboxID"), request.query_params.get("name")
        snapshots = [template for template in self._templates if template.snapshot_of]
        return JSONResponse(
            [
                template.as_snapshot()
                for template in snapshots
                if of in (None, template.snapshot_of) and name in (None, template.name)
            ]
        )

    async def _alias(self, request: Request) -> Response:
        return JSONResponse({"templateID": self.find(request.path_params["name"]).id, "public": False})

    async def _delete(self, request: Request) -> Response:
        template = self.find(request.path_params["id"])
        self._templates.remove(template)
        if template.folder is not None:
            await asyncio.to_thread(shutil.rmtree, template.folder)
        return Response(status_code=204)

    async def _request_build(self, request: Request) -> Response:
        asked = await request.json()
        name = asked.get("name", "").partition(":")[0]
        template = next((one for one in self._templates if one.name == name), None)
        if template is None:
            template = Template(new_id(), name, ready=False)
            self._templates.append(template)
        template.cpu_count = asked.get("cpuCount") or template.cpu_count
        template.memory_mb = asked.get("memoryMB") or template.memory_mb
        build = Build(str(uuid.uuid4()), template, asked, fails=self.next_failure)
        self.next_failure = None
        self.builds[build.id] = build
        answer = {"templateID": template.id, "buildID": build.id, "public": False, "names": [name], "aliases": [name]}
        return JSONResponse({**answer, "tags": asked.get("tags") or ["default"]}, 202)

    async def _upload_address(self, request: Request) -> Response:
        files = request.path_params["hash"]
        build = next(
            (one for one in reversed(self.builds.values()) if one.template.id == request.path_params["id"]), None
        )
        if build is None:
            raise HTTPException(404, "Error when getting template: template not found")
        if files in build.uploads:
            return JSONResponse({"present": True}, 201)
        return JSONResponse({"present": False, "url": f"{request.base_url}uploads/{build.id}/{files}"}, 201)

    async def _upload(self, request: Request) -> Response:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
        self.builds[request.path_params["build"]].uploads[request.path_params["hash"]] = size
        return Response(status_code=200)

    async def _start_build(self, request: Request) -> Response:
        self._build(request).begin(await request.json())
        return Response(status_code=202)

    async def _status(self, request: Request) -> Response:
        build = self._build(request)
        if build.status == "building":
            build.advance()
        offset = int(request.query_params.get("logsOffset", 0))
        limit = int(request.query_params.get("limit", 100))
        logs = {"logs": list[str](), "logEntries": build.logs[offset : offset + limit]}
        answer = {"templateID": build.template.id, "buildID": build.id, "status": build.status, **logs}
        return JSONResponse(answer if build.reason is None else {**answer, "reason": build.reason})

    def _build(self, request: Request) -> Build:
        build = self.builds.get(request.path_params["build"])
        if build is None or build.template.id != request.path_params["id"]:
            raise HTTPException(404, f"Build '{request.path_params['build']}' not found")
        return build


def new_id() -> str:
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(20))
