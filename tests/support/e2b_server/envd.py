"""The data plane: what envd answers inside each sandbox, over the server classes that the SDK ships.

Semantics are those of envd in e2b-dev/infra (packages/envd): the deadline of a stream kills its command, a dropped
stream does not; `connect` gives what is printed from now on; how a command ended is remembered for 30 s; a command has
ended when its output is closed, too, and a signal goes to the command alone, not to what it has started.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import os
import posixpath
import shutil
import signal
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

from connectrpc.code import Code
from connectrpc.errors import ConnectError
from e2b.envd.filesystem import filesystem_connect
from e2b.envd.filesystem import filesystem_pb as fs
from e2b.envd.process import process_connect
from e2b.envd.process import process_pb as pb
from protobuf import Oneof
from protobuf.wkt import Timestamp
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from tests.support.e2b_server.sandbox import HOME, USER, Gone, Isolated, Refused

REMEMBERED_S = 30.0
CHUNK = 32 * 1024
_FILE_CHUNK = 256 * 1024
_END = object()


class Process:
    """A command, and whoever follows it."""

    def __init__(self, request: pb.StartRequest) -> None:
        self.config = request.process or pb.ProcessConfig()
        self.tag = request.tag if request.has_field("tag") else None
        self.pid = 0
        self.ended: pb.ProcessEvent.EndEvent | None = None
        self.stdin: int | None = None
        self.output_cut = asyncio.Event()
        """Was it killed? Then its end does not wait until what it has started lets go of its output."""
        self._followers: set[asyncio.Queue[Any]] = set()

    async def tell(self, event: Any) -> None:
        """A follower that does not read holds the command up, as envd's do."""
        for queue in list(self._followers):
            await queue.put(event)

    async def follow(
        self, inside: Isolated, *, ping_s: float, left_s: Callable[[], float | None]
    ) -> AsyncIterator[pb.ProcessEvent]:
        """Its start, what it prints from now on, and its end. Raises `ConnectError` at the deadline."""
        queue: asyncio.Queue[Any] = asyncio.Queue(64)
        self._followers.add(queue)
        try:
            yield pb.ProcessEvent(event=Oneof("start", pb.ProcessEvent.StartEvent(pid=self.pid)))
            while not (self.ended and queue.empty()):
                left = left_s()
                try:
                    event = await asyncio.wait_for(queue.get(), ping_s if left is None else min(ping_s, max(0, left)))
                except TimeoutError:
                    if left is not None and left <= ping_s:
                        raise ConnectError(Code.DEADLINE_EXCEEDED, "context deadline exceeded") from None
                    await inside.ask("ping")  # what is frozen gives no sign of life
                    yield pb.ProcessEvent(event=Oneof("keepalive", pb.ProcessEvent.KeepAlive()))
                    continue
                if event is _END:
                    break
                yield pb.ProcessEvent(event=Oneof("data", event))
            assert self.ended is not None
            yield pb.ProcessEvent(event=Oneof("end", self.ended))
        finally:
            self._followers.discard(queue)
            while not queue.empty():  # lets go of whoever waits for room
                queue.get_nowait()


class Processes:
    """The commands of one sandbox."""

    def __init__(self, inside: Isolated, env: Mapping[str, str]) -> None:
        self.inside = inside
        self._env = env
        self.living: dict[int, Process] = {}
        self.remembered: dict[int, Process] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, request: pb.StartRequest, deadline_s: float | None) -> Process:
        process = Process(request)
        config = process.config
        env = {**self._env, **config.envs}
        takes_input = not request.has_field("stdin") or request.stdin
        their_in, our_in = os.pipe() if takes_input else (os.open(os.devnull, os.O_RDONLY), None)
        (our_out, their_out), (our_err, their_err) = os.pipe(), os.pipe()
        cwd = _inside_path(config.cwd)
        try:
            theirs = (their_in, their_out, their_err)
            process.pid = await self.inside.start([config.cmd, *config.args], env, cwd, theirs)
        except BaseException as error:
            for file in (our_in, our_out, our_err):
                if file is not None:
                    os.close(file)
            if isinstance(error, Refused):
                raise ConnectError(Code.INVALID_ARGUMENT, f"cwd '{cwd}' does not exist") from None
            raise
        finally:
            for file in (their_in, their_out, their_err):
                os.close(file)
        if our_in is not None:
            os.set_blocking(our_in, False)
        process.stdin = our_in
        self.remembered.pop(process.pid, None)
        self.living[process.pid] = process
        task = asyncio.create_task(self._attend(process, our_out, our_err, deadline_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return process

    async def signal(self, process: Process, number: int) -> None:
        process.output_cut.set()
        with suppress(Refused):  # ended, and only its output is still held open
            await self.inside.ask("signal", pid=process.pid, signal=number)

    def find(self, selector: pb.ProcessSelector | None, *, ended: bool = False) -> Process:
        chosen = selector.selector if selector else None
        known = [*self.living.values(), *(self.remembered.values() if ended else ())]
        for process in known:
            if chosen and chosen.value == (process.pid if chosen.field == "pid" else process.tag):
                return process
        asked = f"{chosen.field} {chosen.value}" if chosen else "pid 0"
        raise ConnectError(Code.NOT_FOUND, f"process with {asked} not found")

    async def _attend(self, process: Process, out: int, err: int, deadline_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        exit_status = self.inside.exit_of(process.pid)
        readers = [
            asyncio.create_task(self._read(process, out, lambda data: Oneof("stdout", data))),
            asyncio.create_task(self._read(process, err, lambda data: Oneof("stderr", data))),
        ]
        if deadline_s is not None:
            timer = loop.call_later(deadline_s, lambda: asyncio.ensure_future(self._out_of_time(process)))
            exit_status.add_done_callback(lambda _: timer.cancel())
        drained = asyncio.create_task(asyncio.wait(readers))
        cut = asyncio.create_task(process.output_cut.wait())
        try:
            await asyncio.wait([drained, cut], return_when=asyncio.FIRST_COMPLETED)
            status = await asyncio.shield(exit_status)
        except Gone:  # whoever follows is cut off
            return
        finally:
            cut.cancel()
            for task in readers:
                task.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            if process.stdin is not None:
                os.close(process.stdin)
            self.living.pop(process.pid, None)
            self.inside.exits.pop(process.pid, None)
        process.ended = _end_event(status)
        self.remembered[process.pid] = process
        loop.call_later(REMEMBERED_S, self._forget, process)
        await process.tell(_END)

    async def _read(self, process: Process, file: int, named: Callable[[bytes], Any]) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(file, "rb", 0)
        )
        try:
            while data := await reader.read(CHUNK):
                await process.tell(pb.ProcessEvent.DataEvent(output=named(data)))
        finally:
            transport.close()

    async def _out_of_time(self, process: Process) -> None:
        with suppress(Gone):
            await self.signal(process, signal.SIGKILL)

    def _forget(self, process: Process) -> None:
        if self.remembered.get(process.pid) is process:
            del self.remembered[process.pid]


class _ProcessService(process_connect.Process):
    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    async def list(self, request: pb.ListRequest, ctx: Any) -> pb.ListResponse:
        living = self._processes.living.values()
        return pb.ListResponse(processes=[pb.ProcessInfo(config=p.config, pid=p.pid, tag=p.tag) for p in living])

    async def start(self, request: pb.StartRequest, ctx: Any) -> AsyncIterator[pb.StartResponse]:
        _check_user(ctx)
        left_s = _time_left(ctx)
        process = await self._processes.start(request, left_s())
        async for event in process.follow(self._processes.inside, ping_s=_ping_s(ctx), left_s=left_s):
            yield pb.StartResponse(event=event)

    async def connect(self, request: pb.ConnectRequest, ctx: Any) -> AsyncIterator[pb.ConnectResponse]:
        process = self._processes.find(request.process, ended=True)
        async for event in process.follow(self._processes.inside, ping_s=_ping_s(ctx), left_s=_time_left(ctx)):
            yield pb.ConnectResponse(event=event)

    async def send_signal(self, request: pb.SendSignalRequest, ctx: Any) -> pb.SendSignalResponse:
        numbers = {pb.Signal.SIGKILL: signal.SIGKILL, pb.Signal.SIGTERM: signal.SIGTERM}
        process = self._processes.find(request.process)
        if request.signal not in numbers:
            raise ConnectError(Code.UNIMPLEMENTED, f"invalid signal: {request.signal}")
        await self._processes.signal(process, numbers[request.signal])
        return pb.SendSignalResponse()

    async def send_input(self, request: pb.SendInputRequest, ctx: Any) -> pb.SendInputResponse:
        process = self._processes.find(request.process)
        if process.stdin is None:
            raise ConnectError(Code.INTERNAL, "error writing to stdin: stdin not enabled or closed")
        data = request.input.input.value if request.input and request.input.input else b""
        while data:
            try:
                data = data[os.write(process.stdin, data) :]
            except BlockingIOError:
                await asyncio.sleep(0.01)
            except OSError as error:
                raise ConnectError(Code.INTERNAL, f"error writing to stdin: {error.strerror}") from None
        return pb.SendInputResponse()

    async def close_stdin(self, request: pb.CloseStdinRequest, ctx: Any) -> pb.CloseStdinResponse:
        process = self._processes.find(request.process)
        if process.stdin is None:
            raise ConnectError(Code.UNKNOWN, "error closing stdin: stdin not enabled or closed")
        os.close(process.stdin)
        process.stdin = None
        return pb.CloseStdinResponse()


class _FilesystemService(filesystem_connect.Filesystem):
    def __init__(self, inside: Isolated) -> None:
        self._inside = inside

    async def stat(self, request: fs.StatRequest, ctx: Any) -> fs.StatResponse:
        return fs.StatResponse(entry=_entry((await self._ask("stat", ctx, path=request.path))["entry"]))

    async def list_dir(self, request: fs.ListDirRequest, ctx: Any) -> fs.ListDirResponse:
        answer = await self._ask("list", ctx, path=request.path, depth=request.depth or 1)
        return fs.ListDirResponse(entries=[_entry(found) for found in answer["entries"]])

    async def make_dir(self, request: fs.MakeDirRequest, ctx: Any) -> fs.MakeDirResponse:
        return fs.MakeDirResponse(entry=_entry((await self._ask("make_dir", ctx, path=request.path))["entry"]))

    async def move(self, request: fs.MoveRequest, ctx: Any) -> fs.MoveResponse:
        to = _inside_path(request.destination)
        return fs.MoveResponse(entry=_entry((await self._ask("move", ctx, path=request.source, to=to))["entry"]))

    async def remove(self, request: fs.RemoveRequest, ctx: Any) -> fs.RemoveResponse:
        await self._ask("remove", ctx, path=request.path)
        return fs.RemoveResponse()

    async def _ask(self, do: str, ctx: Any, *, path: str, **more: Any) -> dict[str, Any]:
        _check_user(ctx)
        try:
            return (await self._inside.ask(do, path=_inside_path(path), **more))[0]
        except Refused as error:
            codes = {
                errno.ENOENT: Code.NOT_FOUND,
                errno.EEXIST: Code.ALREADY_EXISTS,
                errno.ENOTDIR: Code.INVALID_ARGUMENT,
            }
            raise ConnectError(codes.get(error.errno, Code.INTERNAL), str(error)) from None


def application(inside: Isolated, env: Mapping[str, str]) -> Starlette:
    """Envd of one sandbox, as an ASGI application. `env` is what each command has in its environment."""

    async def health(request: Request) -> Response:
        return Response(status_code=204)

    async def read(request: Request) -> Response:
        path = _inside_path(request.query_params.get("path", ""))
        if request.query_params.get("username", USER) not in (USER, "root"):
            return _error(401, f"error looking up user '{request.query_params['username']}'")
        try:
            found, files = await inside.ask("open", path=path)
        except Refused as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return _error(404, f"path '{path}' does not exist")
            return _error(500, f"error opening file '{path}': {error}")
        if found["directory"]:
            return _error(400, f"path '{path}' is a directory")
        return StreamingResponse(_content(files[0]), media_type="application/octet-stream")

    async def write(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0]
        given = request.query_params.get("path")
        written: list[str] = []
        try:
            if kind == "application/octet-stream" and given is not None:
                written.append(_inside_path(given))
                with os.fdopen((await inside.ask("create", path=written[0]))[1][0], "wb") as file:
                    unpack = zlib.decompressobj(31) if request.headers.get("content-encoding") == "gzip" else None
                    async for chunk in request.stream():
                        file.write(unpack.decompress(chunk) if unpack else chunk)
            elif kind == "multipart/form-data":
                async with request.form(max_files=10_000) as form:
                    for part in form.getlist("file"):
                        assert not isinstance(part, str)
                        written.append(_inside_path(given or part.filename or ""))
                        with os.fdopen((await inside.ask("create", path=written[-1]))[1][0], "wb") as file:
                            await asyncio.to_thread(shutil.copyfileobj, part.file, file, _FILE_CHUNK)
            else:
                return _error(400, f"unsupported content type: {kind}")
        except Refused as error:
            return _error(507 if error.errno == errno.ENOSPC else 500, f"error opening file: {error}")
        return JSONResponse([{"path": path, "name": posixpath.basename(path), "type": "file"} for path in written])

    return Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            Route("/files", read, methods=["GET"]),
            Route("/files", write, methods=["POST"]),
            Mount("/process.Process", process_connect.ProcessASGIApplication(_ProcessService(Processes(inside, env)))),
            Mount("/filesystem.Filesystem", filesystem_connect.FilesystemASGIApplication(_FilesystemService(inside))),
        ]
    )


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"code": status, "message": message}, status)


async def _content(file: int) -> AsyncIterator[bytes]:
    with os.fdopen(file, "rb", 0) as source:
        while data := await asyncio.to_thread(source.read, _FILE_CHUNK):
            yield data


def _inside_path(path: str) -> str:
    if path == "~" or path.startswith("~/"):
        path = HOME + path[1:]
    return posixpath.normpath(posixpath.join(HOME, path))


def _check_user(ctx: Any) -> None:
    kind, _, value = ctx.request_headers.get("authorization", "").partition(" ")
    if kind == "Basic" and (name := base64.b64decode(value).decode().partition(":")[0]) not in (USER, "root"):
        raise ConnectError(Code.UNAUTHENTICATED, f"invalid username: '{name}'")


def _ping_s(ctx: Any) -> float:
    return float(ctx.request_headers.get("keepalive-ping-interval") or 90)


def _time_left(ctx: Any) -> Callable[[], float | None]:
    left = ctx.timeout_ms
    ends = None if left is None else time.monotonic() + left / 1000
    return lambda: None if ends is None else ends - time.monotonic()


def _end_event(status: int) -> pb.ProcessEvent.EndEvent:
    """As Go says it."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        words = f"signal: {(signal.strsignal(number) or str(number)).lower()}"
        return pb.ProcessEvent.EndEvent(exit_code=-1, exited=False, status=words, error=words)
    code = os.WEXITSTATUS(status)
    words = f"exit status {code}"
    return pb.ProcessEvent.EndEvent(exit_code=code, exited=True, status=words, error=words if code else None)


def _entry(found: Mapping[str, Any]) -> fs.EntryInfo:
    seconds, nanos = divmod(found["modified"], 10**9)
    return fs.EntryInfo(
        name=found["name"],
        type=fs.FileType[found["type"].removeprefix("FILE_TYPE_")],
        path=found["path"],
        size=found["size"],
        mode=found["mode"],
        permissions=found["permissions"],
        owner=found["owner"],
        group=found["group"],
        modified_time=Timestamp(seconds=seconds, nanos=nanos),
        symlink_target=found["target"],
    )
