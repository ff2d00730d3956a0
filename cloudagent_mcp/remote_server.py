"""A cloudagent server elsewhere, over REST: the operations by name, with every way that a server can fail told apart.

The one place that speaks to it: `ca` and the bridge both stand on this.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import quote, urlsplit

import anyio
import httpx2

from cloudagent_mcp import apply
from cloudagent_mcp.operations import Marked, in_thread
from cloudagent_mcp.operations.results import ANCESTORS, Applied, destination_of, session_folder, undo_one_of
from cloudagent_mcp.operations.tasks import WAIT_MAX_S
from cloudagent_mcp.rest import repr_digest
from cloudagent_mcp.session_home import SessionHome, bring_home
from cloudagent_mcp.settings import Settings
from cloudagent_mcp.untrusted import clean, cut
from cloudagent_mcp.upload_headers import BASE_HEADER, NOTE_LENGTH, NOTES_HEADER, NOTES_MAX
from cloudagent_queue.agents.claude import SESSION_MAX
from cloudagent_queue.repository.bundles import BUNDLE_LIMIT
from cloudagent_storage import errors

CONNECT_S = 5.0
SILENT_S = 15.0
"""How long a server may say nothing, beyond the time that it was asked to wait."""
DOWNLOAD_S = 900.0
"""For a whole bundle, as long as it keeps coming; and for one that goes there, as long as it keeps going."""
CHECK_S = 300.0
"""How long a server may look at what was uploaded before it answers."""
PART_BYTES = 256 * 1024
ANSWER_LIMIT = 64 * 1024 * 1024
KEY_REMEDY = "Set it to a key that `ca key create` printed, or to the server's own, which `ca serve` printed."
_ID = re.compile(r"[A-Za-z0-9_]{1,200}")
_NOT_FOUND = {"task_id": errors.TaskNotFound, "schedule_id": errors.ScheduleNotFound}


class Health(NamedTuple):
    """What a server says to whoever has no key."""

    version: str


class RemoteServer:
    """The server that `CLOUDAGENT_URL` names. Nothing is sent before the first call, which says what is wrong.

    Every call raises the errors that the server raises, and `ServerUnreachable`, `ServerOutdated`, `Unauthorized`.
    """

    def __init__(self, settings: Settings) -> None:
        self._url = (settings.cloudagent_url or "").strip()
        self._key = settings.cloudagent_api_key
        self._state_folder = settings.cloudagent_home / "apply"
        self._environment = settings.environment
        self._http: httpx2.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()
            self._http = None

    async def call(
        self, name: str, marked: Marked, arguments: Mapping[str, Any], *, known: Container[str] | None = None
    ) -> Any:
        """What the operation answers there, as plain JSON values. What is None is left out.

        `known` are the arguments that this version has, also within a task; every one that is sent, where it is None.
        """
        given = {key: value for key, value in arguments.items() if value is not None}
        path, rest = marked.path, dict(given)
        for key in re.findall(r"\{(\w+)\}", path):
            value = str(rest.pop(key, ""))
            if not _ID.fullmatch(value):
                raise _NOT_FOUND.get(key, errors.NotFound)()
            path = path.replace(f"{{{key}}}", value)
        waits = given.get("wait_seconds", given.get("timeout_seconds", WAIT_MAX_S if name == "wait_tasks" else 0))
        query = {key: str(value).lower() if isinstance(value, bool) else value for key, value in rest.items()}
        how: dict[str, Any] = {"params": query} if marked.method in ("GET", "DELETE") else {"json": rest}
        try:
            response = await self._send(marked.method, path, waits_s=waits, **how)
        except errors.ServerUnreachable as error:
            arrived = not isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout | None)
            if arrived and not marked.idempotent:
                error.remedy = "It may have been done all the same: look with list_tasks before you repeat it."
            raise
        if response.is_success:
            return _json_of(response)
        refused = self._refusal(response)
        if isinstance(refused, errors.NoRoute) or response.status_code == 405:
            raise errors.ServerOutdated(f"The cloudagent server does not know {name}: it is older than this program.")
        argument = (refused.field or "").rpartition(".")[2]
        if isinstance(refused, errors.UnknownArgument) and (known is None or argument in known):
            raise errors.ServerOutdated(
                f"The cloudagent server is older than this program and does not know {argument} of {name}.",
                remedy="Leave it out, or ask the server's operator to update it.",
                field=refused.field,
            )
        raise refused

    async def apply_task(self, folder: Path, marks: Mapping[str, Marked], *, task_id: str, **arguments: Any) -> Applied:
        """`apply_task` in a folder of this machine, of a task that the server keeps."""
        where = {name: arguments.get(name) for name in ("onto", "branch", "path")}
        wanted = destination_of(folder, **where, squash=bool(arguments.get("squash")), title="")
        folder = folder / (arguments.get("directory") or ".")
        if arguments.get("undo"):
            given = wanted if any(where.values()) else None
            return await self._undone(folder, marks, task_id, arguments.get("candidate"), given)
        task = await self.candidate(marks, task_id, arguments.get("candidate"))
        task_id = task["task_id"]
        if task["completed_at"] is None:
            raise errors.NotReady()
        result, given = await self._bundle(task_id, "result"), await self._bundle(task_id, "input")
        if result is None or task["base_sha"] is None:
            raise errors.NoChanges()
        earlier = await self._goes_on_from(marks, task)
        outcome = await in_thread(
            lambda: apply.apply(
                folder,
                task_id=task_id,
                branch=task["branch"],
                base_sha=task["base_sha"],
                input_bundle=given,
                result_bundle=result,
                state_folder=self._state_folder,
                dry_run=bool(arguments.get("dry_run")),
                allow_sensitive=arguments.get("allow_sensitive") or (),
                destination=wanted.model_copy(update={"title": task["title"]}),
                preview=arguments.get("preview"),
                goes_on_from=earlier,
            )
        )
        done = Applied.of(task, outcome)
        if (home := session_folder(done, folder)) is None:
            return done
        try:
            session = await self._session(task_id)
        except errors.CloudAgentError as error:
            return done.model_copy(update={"session_refused": error.code})
        return await in_thread(lambda: done.with_session(lambda: self._bring_home(session, task_id, home)))

    async def candidate(self, marks: Mapping[str, Marked], task_id: str, candidate: int | None = None) -> Any:
        """The task whose result is meant: that candidate of it, the best one where none is named, or itself.

        Raises `NotReady` and `OutOfRange`, as the server would.
        """
        task = await self._task(marks, task_id)
        if candidate is None and not task.get("best_of"):
            return task
        if candidate is None:
            if (best := task["best"]) is None:
                raise errors.NotReady("Which of its candidates is the best shows when all have ended.")
            named = [best["task_id"]]
        else:
            table = task.get("candidates") or ()
            named = [found["task_id"] for found in table if found["candidate"] == candidate]
        if not named:
            raise errors.OutOfRange("The task has no candidate of that number.", field="candidate")
        return await self._task(marks, named[0])

    async def _goes_on_from(self, marks: Mapping[str, Marked], task: Any) -> list[str]:
        """The tasks whose results are within this one's, the last one first."""
        found: list[str] = []
        while (parent_id := task.get("parent_task_id")) is not None and len(found) < ANCESTORS:
            parent = await self._task(marks, parent_id)
            if task.get("candidate") is None:
                found.append(best["task_id"] if (best := parent.get("best")) else parent_id)
            task = parent
        return found

    async def _undone(
        self,
        folder: Path,
        marks: Mapping[str, Marked],
        task_id: str,
        candidate: int | None,
        destination: apply.Destination | None,
    ) -> Applied:
        """Take back what of a task is applied; the server is only asked where that may be a candidate of it."""

        async def undo(names: Sequence[str]) -> Applied:
            name, done = await in_thread(
                lambda: undo_one_of(names, folder, state_folder=self._state_folder, destination=destination)
            )
            return Applied.model_validate({"task_id": name, **done.model_dump()})

        if candidate is not None:
            return await undo([(await self.candidate(marks, task_id, candidate))["task_id"]])
        try:
            return await undo([task_id])
        except errors.NothingToUndo:
            table: Sequence[Mapping[str, Any]] = ()
            with contextlib.suppress(errors.CloudAgentError):
                table = (await self._task(marks, task_id)).get("candidates") or ()
            if not table:
                raise
            return await undo([found["task_id"] for found in table])

    async def _task(self, marks: Mapping[str, Marked], task_id: str) -> Any:
        return await self.call("get_task", marks["get_task"], {"task_id": task_id, "log_lines": 0})

    async def resume_task(self, task_id: str, directory: Path) -> SessionHome:
        """A task's session, put where this machine's Claude Code finds it. Raises errors under `SessionRefused`.

        Of a candidate, by its own id.
        """
        session = await self._session(task_id)
        return await in_thread(lambda: self._bring_home(session, task_id, directory))

    async def known_commits(self, commits: Sequence[str]) -> list[str]:
        """Those of the commits that the server has, with their history, from earlier uploads of the same account.

        Raises `NoRoute` for a server that is too old to take uploads.
        """
        response = await self._send("POST", "/uploads/known", json={"commits": list(commits)})
        if response.is_success:
            try:
                said = _json_of(response)["known"]
                return [commit for commit in commits if commit in said]
            except (KeyError, TypeError):
                raise _stranger(response) from None
        if response.status_code == 405:
            raise errors.NoRoute()
        raise self._refusal(response)

    async def upload(
        self, bundle: bytes, *, base_sha: str, notes: Sequence[str], told: Callable[[int], Awaitable[None]]
    ) -> str:
        """Upload a bundle of `base_sha`, empty where the server has that commit; the upload's id.

        `notes` are for the log of tasks that start from it. `told` hears how many bytes have gone. One that broke off
        has left nothing there. Raises `UploadIncomplete` and `UploadNotFound` when the server has no longer what
        the bundle leaves out.
        """

        async def parts() -> AsyncIterator[bytes]:
            for start in range(0, len(bundle), PART_BYTES):
                await told(start)
                yield bundle[start : start + PART_BYTES]
            await told(len(bundle))

        kept = [_note(note) for note in notes]
        if len(kept) > NOTES_MAX:
            kept[NOTES_MAX - 1 :] = [f"Of {len(kept) - NOTES_MAX + 1} more things the agent gets less than is here."]
        response = await self._send(
            "POST",
            "/uploads",
            waits_s=CHECK_S,
            within_s=DOWNLOAD_S,
            content=parts(),
            also={
                "Content-Type": "application/x-git-bundle",
                "Content-Length": str(len(bundle)),
                BASE_HEADER: base_sha,
                NOTES_HEADER: quote(json.dumps(kept)),
            },
        )
        if not response.is_success:
            raise self._refusal(response)
        try:
            said = _json_of(response)
            upload_id, sha256 = str(said["upload_id"]), said["sha256"]
        except (KeyError, TypeError):
            raise _stranger(response) from None
        if sha256 != hashlib.sha256(bundle).hexdigest() or not _ID.fullmatch(upload_id):
            raise errors.ServerUnreachable(
                "The server received something else than was uploaded.",
                remedy="Try again; what is in between changes it.",
            )
        return upload_id

    async def health(self) -> Health:
        """Whether it is there, for `ca doctor`; no key is sent."""
        response = await self._send("GET", "/health", below="", keyless=True)
        if not response.is_success:
            raise refusal(response)
        try:
            return Health(cut(clean(_json_of(response)["version"]), 50) or "")
        except (KeyError, TypeError, AttributeError):
            raise _stranger(response) from None

    def _bring_home(self, session: bytes, task_id: str, directory: Path) -> SessionHome:
        return bring_home(session, task_id=task_id, directory=directory, environment=self._environment)

    async def _session(self, task_id: str) -> bytes:
        """As the server collected it, and not a byte else."""
        if not _ID.fullmatch(task_id):
            raise errors.TaskNotFound()
        response = await self._send("GET", f"/tasks/{task_id}/session", within_s=DOWNLOAD_S, limit=SESSION_MAX)
        if response.is_success and response.headers.get("repr-digest") == repr_digest(response.content):
            return response.content
        if response.is_success:
            raise errors.SessionTampered(
                "The session did not arrive as the server has it.", remedy="Try again; look at what stands in between."
            )
        refused = self._refusal(response)
        if isinstance(refused, errors.NoRoute):
            raise errors.ServerOutdated("The cloudagent server is older than this program, and hands out no sessions.")
        raise refused

    async def _bundle(self, task_id: str, kind: Literal["input", "result"]) -> bytes | None:
        response = await self._send(
            "GET", f"/tasks/{task_id}/bundle", params={"kind": kind}, within_s=DOWNLOAD_S, limit=BUNDLE_LIMIT
        )
        if not response.is_success:
            raise self._refusal(response)
        return None if response.status_code == 204 else response.content

    async def _send(
        self,
        method: str,
        path: str,
        *,
        below: str = "/api/v1",
        waits_s: float = 0.0,
        within_s: float | None = None,
        limit: int = ANSWER_LIMIT,
        keyless: bool = False,
        also: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> httpx2.Response:
        """The whole answer, whatever its status. Raises `ServerUnreachable` when there is none in time."""
        base, headers = address_of(self._url), {} if keyless else self._headers()
        if self._http is None:
            # Redirects are not followed: they would take the key, or a prompt, to wherever they lead.
            self._http = httpx2.AsyncClient(follow_redirects=False)
        silent = SILENT_S + waits_s
        request = self._http.build_request(
            method,
            f"{base}{below}{path}",
            headers={"Accept": "application/json", **headers, **(also or {})},
            timeout=httpx2.Timeout(silent, connect=CONNECT_S),
            **arguments,
        )
        try:
            # One that sends a byte now and then would never be silent.
            with anyio.fail_after(within_s or CONNECT_S + 2 * silent):
                response = await self._http.send(request, stream=True)
                try:
                    content = bytearray()
                    async for part in response.aiter_bytes():
                        content += part
                        if len(content) > limit:
                            raise _stranger(response)
                finally:
                    await response.aclose()
        except (httpx2.TimeoutException, TimeoutError) as error:
            raise errors.ServerUnreachable("The cloudagent server did not answer in time.") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise errors.ServerUnreachable() from error
        # Without the headers that tell how it was packed: it is unpacked.
        kept = {name: response.headers[name] for name in ("content-type", "repr-digest") if name in response.headers}
        return httpx2.Response(response.status_code, headers=kept, content=bytes(content))

    def _refusal(self, response: httpx2.Response) -> errors.CloudAgentError:
        refused = refusal(response)
        if not isinstance(refused, errors.Unauthorized):
            return refused
        if self._key is None:
            return errors.Unauthorized("CLOUDAGENT_API_KEY is not set, and the server wants a key.", remedy=KEY_REMEDY)
        return errors.Unauthorized("The server does not take the key in CLOUDAGENT_API_KEY.", remedy=KEY_REMEDY)

    def _headers(self) -> dict[str, str]:
        if self._key is None:
            return {}
        key = self._key.get_secret_value().strip()
        if not re.fullmatch(r"[ -~]+", key):
            raise errors.Unauthorized("CLOUDAGENT_API_KEY holds characters that no key has.", remedy=KEY_REMEDY)
        return {"Authorization": f"Bearer {key}"}


def _note(note: str) -> str:
    """Without what no JSON may hold; a file's name may."""
    text = clean(note.encode("utf-8", "replace").decode())
    return text if len(text) <= NOTE_LENGTH else f"{text[: NOTE_LENGTH - 1]}…"


def address_of(url: str) -> str:
    """The server's address, without what people paste along with it. Raises `ServerUnreachable` for what is none."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable, parts = False, urlsplit("")
    if not usable or "@" in parts.netloc or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise errors.ServerUnreachable(
            "CLOUDAGENT_URL is not the address of a server.",
            remedy="Set it to what `ca serve` printed, such as https://agents.example.com, without user or key.",
        )
    path = parts.path.rstrip("/")
    for ending in ("/mcp", "/api/v1"):
        path = path.removesuffix(ending)
    return f"{parts.scheme}://{parts.netloc}{path}"


def refusal(response: httpx2.Response) -> errors.CloudAgentError:
    """The server's error as the same class that it raised there; or what else it is that answers."""
    try:
        said = json.loads(response.content)
        code, detail, remedy, field = (said[name] for name in ("code", "detail", "remedy", "field"))
        texts = [cut(clean(text), 2000) or "" for text in (detail, remedy)]
        kind = _kinds().get(code)
        if kind is None:
            # Of a server that is newer than this program.
            kind = type("FromServer", (errors.CloudAgentError,), {"code": cut(clean(code), 100)})
        error = kind(texts[0], remedy=texts[1])
        error.field = None if field is None else cut(clean(field), 200)
        return error
    except (ValueError, KeyError, TypeError, AttributeError):
        return _stranger(response)


def _stranger(response: httpx2.Response) -> errors.ServerUnreachable:
    """Whatever answered is no cloudagent server; what it says is not repeated."""
    status = response.status_code
    if response.is_redirect or 300 <= status < 400:
        return errors.ServerUnreachable(
            f"What answers at CLOUDAGENT_URL sends elsewhere (status {status}), and nothing was sent there.",
            remedy="Set CLOUDAGENT_URL to the address that it leads to, often the same with https://.",
        )
    if status in (401, 403, 407):
        what = "Something in front of the server, such as a proxy, refuses"
    elif status >= 500:
        what = "Something in front of the server cannot reach it"
    else:
        what = "What answers at CLOUDAGENT_URL is no cloudagent server"
    return errors.ServerUnreachable(
        f"{what} (status {status})." if status >= 300 else f"{what}.",
        remedy="Check CLOUDAGENT_URL, that `ca serve` runs there, and what stands in between; `ca doctor` tells more.",
    )


def _json_of(response: httpx2.Response) -> Any:
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError):
        raise _stranger(response) from None


def _kinds() -> dict[str, type[errors.CloudAgentError]]:
    return {kind.code: kind for kind in reversed(_with_children(errors.CloudAgentError))}


def _with_children(kind: type[errors.CloudAgentError]) -> list[type[errors.CloudAgentError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _with_children(child))]
