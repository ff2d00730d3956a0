"""What a task's `repository` means on this machine, said so that a server elsewhere finds it.

What is pushed is named; what is here alone is uploaded, with all that is not committed.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path

import anyio.from_thread

from cloudagent_mcp.operations import in_thread
from cloudagent_mcp.remote_server import RemoteServer
from cloudagent_queue import repository
from cloudagent_queue.repository import WorkingTree, bundle_working_tree
from cloudagent_storage.errors import (
    NoRoute,
    RepositoryNotFound,
    RepositoryNotPushed,
    UploadIncomplete,
    UploadNotFound,
)

Tell = Callable[[float, float, str], Awaitable[None]]
"""Told how many bytes have gone, of how many, and what happens."""


async def for_server(
    server: RemoteServer,
    folder: Path,
    name: object,
    base_ref: object,
    *,
    may_upload: bool,
    allow_secrets: Sequence[str] | None = (),
    tell: Tell | None = None,
) -> Mapping[str, str | None]:
    """`repository` and `base_ref` for a server, of what somebody who works in `folder` means by them.

    `allow_secrets` is for `bundle_working_tree`. What is no text is left to be refused there. Without `may_upload` all
    has to be pushed. Raises errors under `InvalidInput`, and what `RemoteServer` raises.
    """
    if not isinstance(name, str | None) or not isinstance(base_ref, str | None):
        return {}
    if base_ref is not None:
        repository.check_ref(base_ref)
    if name is not None:
        if repository.upload_in(name) is not None:
            return {"repository": name}
        address = repository.check_address(name, local_paths_allowed=True)
        if address == "none" or repository.is_remote(address):
            return {"repository": address}
        folder = folder / Path(address).expanduser()
    try:
        pushed = await in_thread(
            lambda: repository.find_pushed(folder, base_ref=base_ref, allow_secrets=allow_secrets or ())
        )
    except RepositoryNotFound:
        if name is not None:
            raise
        return {"repository": "none"}
    except RepositoryNotPushed as refusal:
        if not may_upload:
            raise
        upload_id = await _upload(server, folder, base_ref, allow_secrets, refusal, tell)
        return {"repository": f"upload:{upload_id}", "base_ref": None}
    return {"repository": pushed.address} | ({"base_ref": pushed.base_ref} if pushed.base_ref else {})


async def _upload(
    server: RemoteServer,
    folder: Path,
    base_ref: str | None,
    allow_secrets: Sequence[str] | None,
    refusal: RepositoryNotPushed,
    tell: Tell | None,
) -> str:
    """The id of an upload that holds what is in the folder."""

    def held(commits: Sequence[str]) -> Collection[str]:
        return anyio.from_thread.run(server.known_commits, commits)

    bundle = functools.partial(bundle_working_tree, folder, base_ref=base_ref, allow_secrets=allow_secrets)
    try:
        tree = await in_thread(lambda: bundle(held=held))
        try:
            return await _send(server, tree, tell)
        except (UploadIncomplete, UploadNotFound):
            # What the server had when it was asked is gone by now.
            whole = await in_thread(bundle)
            return await _send(server, whole, tell)
    except NoRoute:
        raise RepositoryNotPushed(
            refusal.message,
            remedy=f"{refusal.remedy} The server is older than this program and takes no uploads; "
            "its operator could update it.",
        ) from None


async def _send(server: RemoteServer, tree: WorkingTree, tell: Tell | None) -> str:
    size = len(tree.bundle)

    async def told(sent: int) -> None:
        if tell is not None:
            step = "Uploading" if sent < size else "Uploaded, and the server checks it:"
            await tell(sent, size, f"{step} {sent / 1e6:.1f} of {size / 1e6:.1f} MB")

    if tell is not None:
        for note in tree.notes:
            await tell(0, max(1, size), note)
    return await server.upload(tree.bundle, base_sha=tree.base_sha, notes=tree.notes, told=told)
