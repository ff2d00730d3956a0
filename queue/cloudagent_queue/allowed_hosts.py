"""Which hosts a task's sandbox may reach: what its operator allows, and what the task cannot do without.

The operator's setting is a list of words and entries, separated by commas:

    registries     the public registries of the usual languages and distributions, `REGISTRIES`
    HOST           an entry as `sandboxes/egress.py` has it
    open           alone: every host, and the network of the worker's machine with it
    none           alone: only what follows

The host of the model and that of the repository come on top, and what the task itself asks for, if it may.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal
from urllib.parse import urlsplit

from cloudagent_queue.agents import Agent
from cloudagent_queue.sandboxes.egress import check_egress, parse_rule
from cloudagent_storage.errors import EgressNotAllowed, InvalidEgress
from cloudagent_storage.records import TaskSpec

WhoMayAsk = Literal["none", "user", "any"]
"""Whose tasks may ask for hosts: nobody's; those of the worker's own user; those of everybody, and repositories."""

REGISTRIES = tuple(
    ".".join(reversed(name.split(".")))
    for name in (
        # Written back to front, so that they stand together by their owners.
        *("org.pypi", "org.pythonhosted.files"),
        *("org.npmjs.registry", "com.yarnpkg.registry"),
        *("io.crates", "io.crates.index", "io.crates.static"),
        *("org.golang.proxy", "org.golang.sum"),
        *("org.rubygems", "org.rubygems.index"),
        *("org.apache.maven.repo", "org.maven.repo1"),
        *("org.debian.deb", "org.debian.security"),
        *("com.ubuntu.archive", "com.ubuntu.security", "com.ubuntu.ports"),
    )
)
_BESIDE_GITHUB = (
    "api.github.com",
    "codeload.github.com",
    "objects.githubusercontent.com",
    "raw.githubusercontent.com",
    "release-assets.githubusercontent.com",
)
_SCP = re.compile(r"[^\s@/]+@(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):.+")


def check_setting(setting: str) -> Sequence[str] | None:
    """The entries that an operator's setting means; None for every host. Raises `InvalidEgress`."""
    words = [word.strip() for word in setting.split(",") if word.strip()]
    if words == ["open"]:
        return None
    if words == ["none"]:
        return ()
    if {"open", "none"} & set(words):
        raise InvalidEgress("`open` and `none` stand alone.")
    entries = [entry for word in words for entry in (REGISTRIES if word == "registries" else (word,))]
    return list(dict.fromkeys(str(parse_rule(entry)) for entry in entries))


def check_asked(hosts: Sequence[str], who: WhoMayAsk, *, own_user: bool) -> tuple[str, ...]:
    """The hosts that a task asks for, normalised, if it may.

    `own_user` says that they come from the user of the worker's machine, and not from elsewhere or from a repository.
    Raises `EgressNotAllowed` and `InvalidEgress`.
    """
    checked = check_egress(hosts)
    if checked and not (who == "any" or (who == "user" and own_user)):
        raise EgressNotAllowed
    return checked


def egress_for(setting: str, agent: Agent, env: Mapping[str, str], spec: TaskSpec) -> tuple[str, ...] | None:
    """The allow-list of a task's sandbox, for `SandboxSpec.egress`; None for every host.

    `env` is the environment that its agent gets; `spec.egress` is what `check_asked` answered. Raises `InvalidEgress`.
    """
    if (allowed := check_setting(setting)) is None:
        return None
    needed = [*agent.hosts(env), *_hosts_of(spec.repository)]
    return tuple(dict.fromkeys([*(str(parse_rule(entry)) for entry in needed), *allowed, *check_egress(spec.egress)]))


def _hosts_of(repository: str) -> Sequence[str]:
    """Where a repository's web side is; the agent has no key for ssh."""
    if found := _SCP.fullmatch(repository):
        host = found[1]
    elif "://" in repository:
        url = urlsplit(repository)
        if url.scheme == "https" and url.port is not None:
            host = f"{_in_url(url.hostname)}:{url.port}"
        else:
            host = _in_url(url.hostname)
    else:
        return ()
    return (host, *_BESIDE_GITHUB) if host.lower() == "github.com" else (host,)


def _in_url(host: str | None) -> str:
    return f"[{host}]" if host and ":" in host else host or ""
