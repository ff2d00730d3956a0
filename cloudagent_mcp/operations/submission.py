"""What is asked for with a task, checked: the same for a submit and for a schedule, which submits later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloudagent_mcp.operations import Caller
from cloudagent_mcp.operations.candidates import several
from cloudagent_mcp.untrusted import clean
from cloudagent_queue import repository
from cloudagent_queue.allowed_hosts import WhoMayAsk, check_asked
from cloudagent_queue.repository import Source, read_source, warnings_of
from cloudagent_storage.errors import (
    InvalidInput,
    OutOfRange,
    PromptEmpty,
    PromptTooLong,
    RepositoryNotAllowed,
    RepositoryNotFound,
    UnknownProvider,
)
from cloudagent_storage.records import TaskSpec

if TYPE_CHECKING:
    from cloudagent_storage.store.uploads import Uploads

PROMPT_MAX = 100_000


@dataclass(frozen=True)
class Allowed:
    """What its operator lets tasks ask for."""

    providers: Sequence[str]
    """Where sandboxes come from, the preferred one first."""
    egress: WhoMayAsk
    """Whose tasks may ask for hosts that the operator did not list."""


def check_task(asked: Mapping[str, Any], allowed: Allowed, *, own_user: bool) -> TaskSpec:
    """The arguments of `submit_task`, which are of the right types and within their limits already, as a task.

    `own_user` says that the user of this machine asks. Its repository is not looked at.
    Raises errors under `InvalidInput`.
    """
    prompt: str = asked["prompt"]
    if not clean(prompt).strip():  # also of what nobody sees, such as spaces without a width
        raise PromptEmpty()
    if len(prompt) > PROMPT_MAX:
        raise PromptTooLong(f"The prompt has {len(prompt)} characters; the limit is {PROMPT_MAX}.")
    if any(not tag.strip() or len(tag) > 100 for tag in asked["tags"]):
        raise OutOfRange("A tag has 1 to 100 characters.", field="tags")
    if asked["provider"] is not None and asked["provider"] not in allowed.providers:
        raise UnknownProvider(remedy=f"Choose one of: {', '.join(allowed.providers)}.")
    chosen = {
        "title": title_of(prompt, asked["title"]),
        "tags": tuple(asked["tags"]),
        "egress": check_asked(asked["egress"], allowed.egress, own_user=own_user),
        "repository": "none",
        **several(asked, allowed.providers),
    }
    return TaskSpec.model_validate({**asked, **chosen})


def going_on(asked: Mapping[str, Any], earlier: TaskSpec) -> dict[str, Any]:
    """The arguments for a task that goes on from another one: of what is left out, what stays as it was."""
    each = {"model": asked["models"], "provider": asked["providers"]}
    stays = {
        name: getattr(earlier, name)
        for name in ("model", "provider", "verify", "retries", "setup")
        if asked[name] is None and not each.get(name)
    }
    return {**asked, **stays, "base_ref": earlier.base_ref, "egress": asked["egress"] or list(earlier.egress)}


def title_of(prompt: str, title: str | None = None) -> str:
    """A task's short name: the one that was given, or its prompt's first line."""
    return (title or prompt.strip().splitlines()[0][:80]).strip() or "Untitled"


def find_source(
    caller: Caller,
    name: str | None,
    base_ref: str | None,
    uploads: Uploads | None = None,
    allow_secrets: Sequence[str] | None = None,
) -> Source:
    """What a caller means by `repository`, read as far as it is on this machine.

    `allow_secrets` is for `bundle_working_tree`. Without `uploads` there has to be something that can be read again
    later. Raises errors under `InvalidInput`, and `UploadNotFound`.
    """
    if base_ref is not None:
        repository.check_ref(base_ref)
    if name is None:
        if not caller.local or caller.folder is None:
            return Source("none")
        try:
            return read_source(str(caller.folder), base_ref, allow_secrets)
        except RepositoryNotFound:
            return Source("none")
    if (upload_id := repository.upload_in(name)) is not None:
        if uploads is None:
            raise RepositoryNotAllowed(
                "An upload is gone after a day, and a schedule goes on.",
                remedy="Pass an https:// or ssh:// address, git@host:path, or none.",
            )
        if base_ref is not None:
            raise InvalidInput("An upload is one commit: there is no other to start from.", field="base_ref")
        upload, bundle = uploads.take(caller.account_id, upload_id)
        warnings = warnings_of(upload.notes)
        return Source(
            name, bundle, upload.base_sha, upload.config, upload.manifests, key=upload.root, warnings=warnings
        )
    address = repository.check_address(name, local_paths_allowed=caller.local)
    if address == "none" and base_ref is not None:
        raise InvalidInput("There is no ref to start from without a repository.", field="base_ref")
    if address == "none" or repository.is_remote(address):
        return Source(address)
    return read_source(str((caller.folder or Path.cwd()) / Path(address).expanduser()), base_ref, allow_secrets)
