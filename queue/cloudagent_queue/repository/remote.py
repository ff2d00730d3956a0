"""A repository at an https or ssh address becomes a bundle, through a bare cache that makes the second time fast."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from cloudagent_queue import git
from cloudagent_queue.repository.bundles import BASE_BRANCH, BUNDLE_LIMIT, HARMLESS_FLAWS
from cloudagent_queue.repository.config import config_in
from cloudagent_queue.repository.manifests import manifests_in
from cloudagent_queue.repository.working_tree import near_names, root_of
from cloudagent_storage.errors import (
    RefNotFound,
    RepositoryEmpty,
    RepositoryNotAllowed,
    RepositoryTooLarge,
    RepositoryUnreachable,
)
from cloudagent_storage.records import LOCAL_ACCOUNT

ANSWER_WITHIN_S = 20.0
"""How long a server may take to list its refs."""

# What git and its helpers say, and what it means. The first that fits counts.
_REASONS: Sequence[tuple[str, str]] = (
    (r"could not resolve|name or service not known|name resolution", "Its host name does not resolve."),
    (r"host key verification|certificate|\b(SSL|TLS)\b", "The identity of its host could not be verified."),
    (
        r"authentication failed|could not read (user|pass)|permission denied|access denied|error: 40[13]",
        "Access was denied; a private repository looks the same as one that does not exist.",
    ),
    (r"not found|does not exist|not appear to be a git|error: 404|error: 410", "It was not found there."),
    (r"error: 30[12378]", "It has moved; pass its new address."),
    (r"refused|timed out|unreachable|failed to connect|reset by peer|too slow|no route", "Its host does not answer."),
)


@dataclass(frozen=True)
class Fetched:
    """What was found at an address."""

    bundle: bytes
    """A branch, tag or commit with its whole history."""
    base_sha: str
    config: bytes | None
    """The `.cloudagent.toml` that is in it, checked."""
    manifests: str
    root: str
    """The first commit of its history."""


def fetch(
    address: str,
    *,
    base_ref: str | None,
    cache_folder: Path,
    env: Mapping[str, str],
    timeout_s: float,
    tokens: Mapping[str, str] = MappingProxyType({}),
    account_id: str = LOCAL_ACCOUNT,
    protocols: Sequence[str] = ("https", "ssh"),
    give_up: threading.Event | None = None,
) -> Fetched:
    """What is at an address now.

    `env` is what git may know of its user: HOME and SSH_AUTH_SOCK lead to credential helpers and keys. `tokens` are by
    host: one is sent to its very host only, over https, and then nothing of `env` is tried in its place; what it brings
    is cached for this account alone. Setting `give_up` ends it early, as unreachable.

    Raises `RepositoryUnreachable` with the reason, `RepositoryEmpty`, `RepositoryNotAllowed`, `RefNotFound` with the
    nearest names, `RepositoryTooLarge`, and `InvalidRepositoryConfig`.
    """
    deadline = time.monotonic() + timeout_s
    cache_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    url = urlsplit(address)
    token = tokens.get(url.netloc.lower()) if url.scheme == "https" else None
    name = address if token is None else f"{account_id} {address}"
    folder = cache_folder / f"{hashlib.sha256(name.encode()).hexdigest()}.git"
    try:
        with FileLock(folder.with_suffix(".lock"), timeout=timeout_s):
            cache = _Cache(folder, address, env, deadline, protocols, token, give_up)
            try:
                return cache.bundle(base_ref)
            except git.GitFailed as error:
                refusal = _refusal(error)
                if refusal is not None or (give_up is not None and give_up.is_set()):
                    raise (refusal or RepositoryUnreachable()) from None
            # No reason that we know: the cache itself may be broken.
            shutil.rmtree(folder, ignore_errors=True)
            try:
                return cache.bundle(base_ref)
            except git.GitFailed as error:
                raise (_refusal(error) or RepositoryUnreachable()) from None
    except git.TooMuchOutput:
        remedy = "Pass the address of a smaller repository; this one's history is too large."
        raise RepositoryTooLarge(remedy=remedy) from None
    except Timeout:
        raise RepositoryUnreachable(
            "Another task has been fetching it for too long.", remedy="Try again later."
        ) from None


class _Cache:
    """A bare repository that holds what was fetched from one address."""

    def __init__(
        self,
        folder: Path,
        address: str,
        env: Mapping[str, str],
        deadline: float,
        protocols: Sequence[str],
        token: str | None,
        give_up: threading.Event | None,
    ) -> None:
        self._give_up = give_up
        self._folder = folder
        self._address = address
        self._env = env
        self._deadline = deadline
        self._protocols = protocols
        self._settings = [("fetch.fsckObjects", "true"), ("http.lowSpeedLimit", "1000"), ("http.lowSpeedTime", "20")]
        self._settings += [(f"fetch.fsck.{flaw}", "ignore") for flaw in HARMLESS_FLAWS]
        if token is not None:
            host = f"http.https://{urlsplit(address).netloc}/"
            basic = base64.b64encode(f"x-access-token:{token}".encode()).decode()
            # The empty values take away what the worker's own configuration has for this host. git would send the
            # header on to wherever it is redirected.
            self._settings += [(f"{host}.extraHeader", ""), (f"{host}.extraHeader", f"Authorization: Basic {basic}")]
            self._settings += [(f"{host}.followRedirects", "false"), ("credential.helper", "")]

    def bundle(self, base_ref: str | None) -> Fetched:
        if not self._folder.is_dir():
            self._make()
        commit = self._fetch(base_ref)
        config, manifests = config_in(self._local, commit), manifests_in(self._local, commit)
        self._local("update-ref", BASE_BRANCH, commit)
        bundle = self._local("bundle", "create", "--quiet", "-", BASE_BRANCH, max_bytes=BUNDLE_LIMIT).out
        return Fetched(bundle, commit, config, manifests, root_of(self._local, commit))

    def _make(self) -> None:
        fresh = self._folder.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        git.run("init", "--quiet", "--bare", "--template=", ".", folder=fresh)
        fresh.rename(self._folder)

    def _fetch(self, base_ref: str | None) -> str:
        """Make sure that the commit and its history are here, and tell its id."""
        listing = self._remote("ls-remote", "--symref", "--", self._address, timeout_s=ANSWER_WITHIN_S).text
        refs: dict[str, str] = {}
        default: str | None = None
        for line in listing.splitlines():
            value, _, name = line.partition("\t")
            if value.startswith("ref: ") and name == "HEAD":
                default = value.removeprefix("ref: ")
            elif re.fullmatch(r"[0-9a-f]{40,64}", value):
                refs[name] = value
        if not refs:
            raise RepositoryEmpty()
        names = [name.split("/", 2)[2] for name in refs if re.match(r"refs/(heads|tags)/.*(?<!\^\{\})$", name)]
        if base_ref is None:
            source = default if default in refs else "HEAD" if "HEAD" in refs else None
            if source is None:
                raise RefNotFound("The repository has no default branch.", remedy=near_names("main", names))
        else:
            candidates = (base_ref, f"refs/heads/{base_ref}", f"refs/tags/{base_ref}")
            source = next((name for name in candidates if name in refs and not name.endswith("^{}")), None)
        if source is not None:
            wanted = refs[source]
            kept = f"refs/remotes/origin/{source.removeprefix('refs/')}"
            if self._commit(kept) is None or self._local("rev-parse", kept).text != wanted:
                self._download(f"+{source}:{kept}")
            return self._commit(kept) or self._no_commit()
        if base_ref is not None and re.fullmatch(r"[0-9a-f]{7,64}", base_ref):
            if (found := self._commit(base_ref)) is None:
                self._download("+refs/heads/*:refs/remotes/origin/heads/*", "+refs/tags/*:refs/remotes/origin/tags/*")
                found = self._commit(base_ref)
            if found is not None:
                return found
        raise RefNotFound(remedy=near_names(base_ref or "main", names))

    def _download(self, *refspecs: str) -> None:
        options = ["--quiet", "--force", "--prune", "--no-tags", "--no-write-fetch-head", "--no-recurse-submodules"]
        self._remote("fetch", *options, "--", self._address, *refspecs)

    def _commit(self, name: str) -> str | None:
        done = self._local("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", ok=(0, 1, 128))
        return done.text if done.exit_code == 0 else None

    def _no_commit(self) -> str:
        raise RefNotFound("That ref names no commit.")

    def _local(self, *arguments: str, **options: Any) -> git.Done:
        return git.run(*arguments, folder=self._folder, timeout_s=self._left(), **options)

    def _remote(self, *arguments: str, timeout_s: float | None = None) -> git.Done:
        return git.run(
            *arguments,
            folder=self._folder,
            configured_by=self._env,
            settings=self._settings,
            protocols=self._protocols,
            timeout_s=min(self._left(), timeout_s or self._left()),
            give_up=self._give_up,
        )

    def _left(self) -> float:
        return max(0.1, self._deadline - time.monotonic())


def _refusal(error: git.GitFailed) -> RepositoryUnreachable | RepositoryNotAllowed | None:
    """What a failure of git means for the user, without a word of git's, which may hold addresses and secrets."""
    if error.exit_code is None:
        return RepositoryUnreachable("It did not answer, or did not arrive, in time.")
    if re.search(r"transport '.*' not allowed", error.stderr):
        return RepositoryNotAllowed()
    for pattern, reason in _REASONS:
        if re.search(pattern, error.stderr, re.IGNORECASE):
            return RepositoryUnreachable(reason)
    return None
