"""What clients send of the folders that they work in: `POST /api/v1/uploads`, and what of it is there already."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import unquote

import anyio
import anyio.to_thread
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloudagent_mcp.operations import Caller, check_arguments, check_text, in_thread
from cloudagent_mcp.rest import json_body, problem
from cloudagent_mcp.untrusted import clean, cut
from cloudagent_mcp.upload_headers import BASE_HEADER, NOTE_LENGTH, NOTES_HEADER, NOTES_MAX
from cloudagent_queue.repository import import_upload
from cloudagent_queue.repository.bundles import BUNDLE_LIMIT
from cloudagent_storage.errors import (
    CloudAgentError,
    Internal,
    InvalidJson,
    InvalidUpload,
    LimitReached,
    OutOfRange,
    RepositoryTooLarge,
)

if TYPE_CHECKING:
    from cloudagent_storage.store import Store

log = logging.getLogger(__name__)

IMPORTS_AT_ONCE = 2
"""Each takes as much memory as its bundle, twice."""
PER_ACCOUNT = 3
"""Uploads that an account may have under way in one process."""
SILENT_S = 60.0
"""How long a client may send nothing."""


class Answer(NamedTuple):
    """What an upload is called from now on, and what of it has arrived."""

    upload_id: str
    sha256: str
    size: int


class _Known(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    commits: list[str] = Field(max_length=1000)


class Uploads:
    """Receives, checks and keeps."""

    def __init__(self, store: Callable[[], Store]) -> None:
        self._store = store
        self._imports = anyio.CapacityLimiter(IMPORTS_AT_ONCE)
        self._under_way: dict[str, int] = {}

    def known(self, caller: Caller, commits: Sequence[str]) -> list[str]:
        """Those of the commits on which an upload of the caller's may be built."""
        return self._store().uploads.known(caller.account_id, commits)

    async def receive(
        self, caller: Caller, parts: AsyncIterator[bytes], *, length: int | None, base: str | None, notes: Sequence[str]
    ) -> Answer:
        """Take a bundle, of `length` bytes as far as is known before; an empty one stands for the upload of `base`.

        Nothing is kept of what does not arrive as a whole. Raises what `import_upload` raises, `UploadNotFound`,
        `StorageFull`, and `LimitReached`.
        """
        if length is not None and length > BUNDLE_LIMIT:
            raise _too_large()
        mine = self._under_way.get(caller.account_id, 0)
        if mine >= PER_ACCOUNT:
            raise LimitReached(
                f"{PER_ACCOUNT} uploads of yours are under way.", remedy="Wait for one of them to end, then try again."
            )
        self._under_way[caller.account_id] = mine + 1
        try:
            with tempfile.TemporaryFile(prefix="cloudagent-upload-") as file:
                sha256, size = await _spool(parts, file)
                if size == 0 and base is not None:
                    found = await in_thread(lambda: self._store().uploads.again(caller.account_id, base, notes))
                    return Answer(found.upload_id, sha256, 0)
                upload_id = await anyio.to_thread.run_sync(
                    lambda: self._keep(caller, file, notes), limiter=self._imports
                )
                return Answer(upload_id, sha256, size)
        finally:
            self._under_way[caller.account_id] -= 1
            if not self._under_way[caller.account_id]:
                del self._under_way[caller.account_id]

    def _keep(self, caller: Caller, file: IO[bytes], notes: Sequence[str]) -> str:
        file.seek(0)
        uploads, account_id = self._store().uploads, caller.account_id
        found = import_upload(file.read(), lambda commits: uploads.holding(account_id, commits))
        kept = uploads.keep(
            account_id,
            found.bundle,
            base_sha=found.base_sha,
            commits=found.commits,
            notes=notes,
            config=found.config,
            manifests=found.manifests,
            root=found.root,
        )
        return kept.upload_id


async def _spool(parts: AsyncIterator[bytes], file: IO[bytes]) -> tuple[str, int]:
    """Write all that comes to a file: its sha256, and its size."""
    digest, size = hashlib.sha256(), 0
    while True:
        try:
            with anyio.fail_after(SILENT_S):
                part = await anext(parts, None)
        except TimeoutError:
            raise InvalidUpload("Nothing has arrived for too long.", remedy="Upload it again.") from None
        if part is None:
            return digest.hexdigest(), size
        size += len(part)
        if size > BUNDLE_LIMIT:
            raise _too_large()
        digest.update(part)
        # A part is some kilobytes, and goes into the page cache.
        file.write(part)


def upload_routes(uploads: Uploads, caller: Callable[[Request], Caller]) -> list[Route]:
    """The routes. `caller` authenticates, or raises."""

    async def upload(request: Request) -> Response:
        length = request.headers.get("content-length", "")
        async with aclosing(request.stream()) as parts:
            done = await uploads.receive(
                caller(request),
                parts,
                length=int(length) if length.isascii() and length.isdigit() else None,
                base=request.headers.get(BASE_HEADER),
                notes=_notes_in(request.headers.get(NOTES_HEADER)),
            )
        return JSONResponse(done._asdict(), status_code=201)

    async def known(request: Request) -> Response:
        who = caller(request)
        asked = check_arguments(_Known, await json_body(request))
        found = await in_thread(lambda: uploads.known(who, asked["commits"]))
        return JSONResponse({"known": found})

    return [
        Route("/uploads", _answered(upload), methods=["POST"], name="upload"),
        Route("/uploads/known", _answered(known), methods=["POST"], name="known_uploads"),
    ]


def _answered(endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except CloudAgentError as error:
            return problem(error)
        except ClientDisconnect:
            return problem(InvalidUpload("It broke off.", remedy="Upload it again."))
        except Exception:
            log.exception("%s failed in a way that nobody foresaw", request.url.path)
            return problem(Internal())

    return answer


def _notes_in(header: str | None) -> list[str]:
    if header is None:
        return []
    try:
        found = json.loads(unquote(header, errors="strict"))
    except (ValueError, RecursionError):
        raise InvalidJson(f"The header {NOTES_HEADER} is no percent-encoded JSON.") from None
    texts = cast("list[object]", found) if isinstance(found, list) else [None]
    notes = [note for note in texts if isinstance(note, str)]
    if len(notes) < len(texts):
        raise InvalidJson(f"The header {NOTES_HEADER} is no list of texts.")
    if len(notes) > NOTES_MAX:
        raise OutOfRange(f"The header {NOTES_HEADER} has more than {NOTES_MAX} texts.")
    check_text(NOTES_HEADER, notes)
    return [cut(clean(note), NOTE_LENGTH) or "" for note in notes]


def _too_large() -> RepositoryTooLarge:
    return RepositoryTooLarge(
        f"The upload is larger than {BUNDLE_LIMIT // 1_000_000} MB, which is the limit.",
        remedy="Name what the agent does not need in .gitignore, or push the repository and pass its address.",
    )
