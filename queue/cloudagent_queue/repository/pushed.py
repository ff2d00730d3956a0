"""A folder of the user's, as a server elsewhere can fetch it: an address and a commit, or why it cannot."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cloudagent_queue.repository.address import check_address, is_remote
from cloudagent_queue.repository.working_tree import LocalRepository, to_leave_out
from cloudagent_storage.errors import (
    CredentialsInUrl,
    RepositoryEmpty,
    RepositoryNotAllowed,
    RepositoryNotPushed,
)

REMOTE = "origin"


@dataclass(frozen=True)
class Pushed:
    """Where a server finds what is here."""

    address: str
    """https or ssh, without user and password where it is https."""
    base_ref: str | None
    """A commit, or what the caller named and this repository does not know."""


def find_pushed(folder: Path, *, base_ref: str | None, allow_secrets: Collection[str] = ()) -> Pushed:
    """What a server can fetch of the repository that `folder` lies in: `base_ref`, or else all that is here.

    Nothing is fetched or pushed: what counts is what this repository knows of its remote `origin`. Of
    files that look like secrets only those in `allow_secrets` matter. Raises
    `RepositoryNotFound`, `RepositoryEmpty`, and `RepositoryNotPushed` when something is on this machine alone.
    """
    repository = LocalRepository.find(folder)
    address = _address(repository)
    if base_ref is None:
        commit = repository.commit("HEAD")
        if commit is None:
            raise RepositoryEmpty()
        if count := _uncommitted(repository, allow_secrets):
            raise RepositoryNotPushed(
                f"{count} {'file is' if count == 1 else 'files are'} not committed, and the server would not see "
                f"{'it' if count == 1 else 'them'}."
            )
    else:
        commit = repository.commit(f"refs/heads/{base_ref}") or repository.commit(base_ref)
        if commit is None:
            # A branch that was never fetched here; the server says if there is none.
            return Pushed(address, base_ref)
    holding = ["for-each-ref", "--count=1", "--contains", commit, f"refs/remotes/{REMOTE}/"]
    if not repository.run(*holding).out:
        raise RepositoryNotPushed(
            "The commit to start from is not pushed to origin, as far as is known here.",
            remedy="Push it, or `git fetch` if it is there; or pass base_ref to start from a commit that is pushed.",
        )
    return Pushed(address, commit)


def _uncommitted(repository: LocalRepository, allow_secrets: Collection[str]) -> int:
    """How many files differ from the last commit, of those that a task on this machine would get."""
    if repository.bare:
        return 0
    listing = ["--no-optional-locks", "status", "--porcelain=v1", "-z", "--no-renames", "--untracked-files=all"]
    out = repository.run(*listing, timeout_s=300).out.decode("utf-8", "surrogateescape")
    changed = {entry[3:] for entry in out.split("\0")[:-1]}
    return len(changed - (set(to_leave_out(repository)) - set(allow_secrets)))


def _address(repository: LocalRepository) -> str:
    url = repository.run("config", "--get", f"remote.{REMOTE}.url", ok=(0, 1)).text
    if not url:
        raise RepositoryNotPushed(
            "The repository has no remote named origin that the server could fetch it from.",
            remedy="Add one and push, pass the address as `repository`, or repository=none.",
        )
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and "@" in parts.netloc:
            # A user, and perhaps a token: the server has its own.
            url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        address = check_address(url, local_paths_allowed=False)
    except (RepositoryNotAllowed, CredentialsInUrl, ValueError):
        address = "none"
    if not is_remote(address):
        raise RepositoryNotPushed(
            "The repository's remote origin has no https or ssh address of the public internet.",
            remedy="Pass the address under which the server can fetch it as `repository`, or repository=none.",
        )
    return address
