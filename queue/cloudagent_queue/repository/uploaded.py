"""A bundle that somebody elsewhere has uploaded: looked at in a quarantine, and made whole before it is kept."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloudagent_queue import git
from cloudagent_queue.repository.bundles import (
    BASE_BRANCH,
    BUNDLE_LIMIT,
    HARMLESS_FLAWS,
    MEMORY_LIMIT,
    Header,
    read_header,
)
from cloudagent_queue.repository.config import config_in
from cloudagent_queue.repository.manifests import manifests_in
from cloudagent_queue.repository.working_tree import root_of
from cloudagent_storage.errors import InvalidUpload, RepositoryTooLarge, UploadIncomplete

COMMITS_KEPT = 1000
"""How many of an upload's commits, the newest, are remembered as what a later one may be built on."""

_PREREQUISITES_MAX = 256
_STRICT = "--strict=" + ",".join(f"{flaw}=ignore" for flaw in HARMLESS_FLAWS)


@dataclass(frozen=True)
class Uploaded:
    """What was in an upload."""

    bundle: bytes
    """Whole: it needs nothing else, also where what was sent left out what was there before."""
    base_sha: str
    commits: tuple[str, ...]
    """`base_sha` and those before it, the newest first, as many as are remembered."""
    root: str
    """The first commit of its history."""
    config: bytes | None
    """The `.cloudagent.toml` that is in it, checked."""
    manifests: str


def import_upload(sent: bytes, find: Callable[[Sequence[str]], bytes | None]) -> Uploaded:
    """Check a bundle that was sent, which is hostile, and put back what it leaves out.

    `find` gives an earlier upload of the same account that has all of these commits. Raises `InvalidUpload` for
    anything but one commit on `BASE_BRANCH` with all that it needs, each object as git accepts it; `UploadIncomplete`
    when it is built on what is not there; `RepositoryTooLarge`, and `InvalidRepositoryConfig`.
    """
    try:
        header = read_header(sent)
        ((base, ref),) = header.refs
        if ref != BASE_BRANCH or len(header.prerequisites) > _PREREQUISITES_MAX:
            raise ValueError("not the ref, or not the number of commits, that was expected")
    except ValueError as error:
        raise InvalidUpload() from error
    earlier = find(header.prerequisites) if header.prerequisites else None
    if header.prerequisites and earlier is None:
        raise UploadIncomplete()
    with tempfile.TemporaryDirectory(prefix="cloudagent-upload-") as name:
        run = functools.partial(git.run, folder=Path(name), max_memory=MEMORY_LIMIT, timeout_s=600)
        try:
            _import(run, header, sent[header.pack_at :], earlier)
            run("update-ref", BASE_BRANCH, base)  # git takes nothing but a commit for a branch
            commits = run("rev-list", f"--max-count={COMMITS_KEPT}", base).text.split("\n")
        except (ValueError, git.GitFailed) as error:
            raise InvalidUpload() from error
        root = root_of(run, base)
        config, manifests = config_in(run, base), manifests_in(run, base)
        whole = sent
        if earlier is not None:
            try:
                whole = run("bundle", "create", "--quiet", "-", BASE_BRANCH, max_bytes=BUNDLE_LIMIT).out
            except git.TooMuchOutput:
                raise RepositoryTooLarge() from None
    return Uploaded(whole, base, tuple(commits), root, config, manifests)


def _import(run: Callable[..., git.Done], header: Header, pack: bytes, earlier: bytes | None) -> None:
    run("init", "--quiet", "--bare", "--template=", f"--object-format={header.object_format}", ".")
    if earlier is not None:
        before = read_header(earlier)
        if before.object_format != header.object_format:
            raise ValueError("not the format of what it is built on")
        run("index-pack", "--fix-thin", "--stdin", stdin=earlier[before.pack_at :])
    # Not `git bundle unbundle` or `git fetch`: they do not check a bundle's objects. With --strict all that these link
    # to has to be there as well.
    run("index-pack", _STRICT, "--fix-thin", "--stdin", stdin=pack)
