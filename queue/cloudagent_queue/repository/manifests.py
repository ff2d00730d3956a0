"""What a set-up depends on, as two digests: of the files that decide what it installs, and of all of it."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

from cloudagent_queue import git

# Lock files and manifests; and what a set-up command commonly runs, so that a change of that is a change of the set-up.
_PATTERNS: Sequence[str] = (
    *["package.json", "package-lock.json", "npm-shrinkwrap.json", "pnpm-lock.yaml", "pnpm-workspace.yaml", "yarn.lock"],
    *["bun.lock", "bun.lockb", "deno.lock", ".npmrc", ".yarnrc*", ".nvmrc", ".node-version"],
    *["pyproject.toml", "uv.lock", "poetry.lock", "pdm.lock", "Pipfile", "Pipfile.lock", "*requirements*.txt"],
    *["constraints*.txt", "setup.py", "setup.cfg", "tox.ini", "environment.y*ml", ".python-version"],
    *["Cargo.toml", "Cargo.lock", "rust-toolchain*", "go.mod", "go.sum", "Gemfile", "Gemfile.lock", ".ruby-version"],
    *["composer.json", "composer.lock", "mix.exs", "mix.lock", "pom.xml", "build.gradle*", "gradle.lockfile"],
    *["Makefile", "GNUmakefile", "makefile", "justfile", "Justfile", "Taskfile.y*ml", ".tool-versions", "mise.toml"],
    *["*.sh", "Dockerfile", "apt.txt", "Brewfile"],
)
_FOLDERS_AT_ONCE = 200
_FOLDERS_MAX = 2_000


def manifests_in(run: Callable[..., git.Done], tree: str) -> str:
    """A digest (sha256, in hex) of such files of a tree, at its top and in the folders there.

    `run` is git in a repository that has the tree.
    """
    top = _entries(run("ls-tree", "-z", "--full-tree", tree))
    found = {path: name for path, (kind, name) in top.items() if kind == "blob" and _matches(path)}
    folders = [path for path, (kind, _) in sorted(top.items()) if kind == "tree"][:_FOLDERS_MAX]
    for start in range(0, len(folders), _FOLDERS_AT_ONCE):
        inside = [f"{path}/" for path in folders[start : start + _FOLDERS_AT_ONCE]]
        for path, (kind, name) in _entries(run("ls-tree", "-z", "--full-tree", tree, "--", *inside)).items():
            if kind == "blob" and _matches(path.rpartition("/")[2]):
                found[path] = name
    return _digest(sorted(found.items()))


def setup_key(
    *,
    repository: str,
    provider: str,
    template: str | None,
    setup: str,
    environment: Mapping[str, str],
    manifests: str | None,
) -> str:
    """A digest of all that the files of a sandbox after its set-up depend on; the same key, the same files.

    `repository` is a part of it since a sandbox after its set-up holds that repository's files.
    """
    return _digest([repository, provider, template, setup, sorted(environment.items()), manifests])


def _entries(listing: git.Done) -> dict[str, tuple[str, str]]:
    """Paths, each with the kind and the id of what is there."""
    found: dict[str, tuple[str, str]] = {}
    for entry in listing.text.split("\0"):
        about, separator, path = entry.partition("\t")
        if separator:
            _, kind, name = about.split(" ")
            found[path] = (kind, name)
    return found


def _matches(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _PATTERNS)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
