"""What a repository says of itself in `.cloudagent.toml`: how it is set up and verified, and within which limits.

The file is read from the commit that a task starts from, before a sandbox exists, and is as hostile as the repository:
it is bounded, nothing in it is run on the host, and what a submit says wins over it.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cloudagent_queue import git
from cloudagent_storage.errors import InvalidRepositoryConfig
from cloudagent_storage.records import RETRIES_MAX, TaskSpec

CONFIG_FILE = ".cloudagent.toml"
SIZE_LIMIT = 16 * 1024
"""Bytes. The parser's time grows with the square of a key's length: at this size it is half a second at worst."""

_VARIABLES_MAX = 100
_VALUE_MAX = 4_000
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
# What the agent and its runner are started with, or find their model, its credential and their programs by. Whoever
# needs one of them for a command can write it in front of that command.
_RESERVED = re.compile(
    r"(ANTHROPIC|CLAUDE|CLOUDAGENT|AWS|CLOUD_ML|GOOGLE|GIT|GH|LD|DYLD|BUN|SSL_CERT|NODE_TLS|XDG)_.*|.*_PROXY"
    r"|GITHUB_TOKEN|NODE_OPTIONS|NODE_EXTRA_CA_CERTS|API_TIMEOUT_MS|MAX_THINKING_TOKENS|IS_SANDBOX"
    r"|PATH|HOME|TMPDIR|SHELL|ENV|BASH_ENV|IFS",
    re.IGNORECASE,
)
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
_HOST = rf"^(\*\.)?{_LABEL}(\.{_LABEL})*(:{_PORT})?$"
_REASON = re.compile(r"(?:[A-Za-z /-]|'=')+")
"""What the parser says, where it repeats nothing of the file."""

Command = Annotated[str, Field(min_length=1, max_length=10_000)]
Host = Annotated[str, Field(max_length=260, pattern=_HOST)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class Limits(_Part):
    """The most that a task in this repository may take."""

    timeout_minutes: Annotated[float, Field(gt=0, le=1440)] | None = None
    max_turns: Annotated[int, Field(ge=1, le=10_000)] | None = None
    max_budget_usd: Annotated[float, Field(gt=0, le=10_000)] | None = None


class RepositoryConfig(_Part):
    """The settings of a repository, each within its bounds."""

    setup: Command | None = None
    """A shell command that is run in the repository before the agent."""
    verify: Command | None = None
    """A shell command that passes if a result is right."""
    retries: Annotated[int, Field(ge=0, le=RETRIES_MAX)] | None = None
    """How often a failing verify goes back to the agent."""
    environment: Mapping[str, str] = Field(default={}, max_length=_VARIABLES_MAX)
    """Variables for set-up, agent and verify. They are as public as the repository."""
    egress: Annotated[tuple[Host, ...], Field(strict=False, max_length=200)] | None = None
    """The hosts that its processes want to reach, as `SandboxSpec` writes them; whether they may, others decide."""
    template: Annotated[str, Field(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$")] | None = None
    """What a sandbox starts from, by its provider's name."""
    limits: Limits = Limits()

    @property
    def named(self) -> str:
        """Which settings there are, for a line of a log; empty where there are none."""
        return ", ".join(name for name in type(self).model_fields if name in self.model_fields_set)

    def applied_to(self, spec: TaskSpec) -> TaskSpec:
        """What a task is run as. What its submit says wins; limits are the lower ones of both."""
        limits, budget = self.limits, self.limits.max_budget_usd
        return spec.model_copy(
            update={
                "setup": self.setup if spec.setup is None else spec.setup,
                "verify": self.verify if spec.verify is None else spec.verify,
                "retries": self.retries if spec.retries is None else spec.retries,
                "timeout_minutes": _lower(spec.timeout_minutes, limits.timeout_minutes),
                "max_turns": _lower(spec.max_turns, limits.max_turns),
                "max_budget_usd": _lower(spec.max_budget_usd, None if budget is None else budget / spec.budget_shares),
            }
        )


def read_config(data: bytes | None) -> RepositoryConfig:
    """The content of a `.cloudagent.toml`; without one, nothing is set.

    Raises `InvalidRepositoryConfig` with the key as its `field`, or with the line and column of what is no TOML.
    """
    if data is None:
        return RepositoryConfig()
    if len(data) > SIZE_LIMIT:
        raise _too_large()
    try:
        found = tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _broken("is no UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise _broken(f"is no TOML: {_where(str(error))}") from None
    except (ValueError, RecursionError):  # a number of thousands of digits; arrays in arrays in arrays
        raise _broken("is no TOML that can be read: a value is too long or too deep") from None
    try:
        config = RepositoryConfig.model_validate(found)
    except ValidationError as error:
        _refuse(error)
    _check_variables(config.environment)
    for name, text in (("setup", config.setup), ("verify", config.verify)):
        if text is not None and "\0" in text:
            raise _bad(name, "holds a NUL character")
    return config


def config_in(run: Callable[..., git.Done], tree: str) -> bytes | None:
    """A tree's `.cloudagent.toml`, as `run`, which is git in a repository that has it, tells; None without one.

    Raises `InvalidRepositoryConfig` for one that is no plain file, is too large, or cannot be used.
    """
    entry = run("ls-tree", "-z", "-l", "--full-tree", tree, "--", CONFIG_FILE).text.rstrip("\0")
    if not entry:
        return None
    mode, _, name, size = entry.partition("\t")[0].split()
    if mode not in ("100644", "100755"):  # a link, which leads wherever it likes, a folder, a submodule
        raise _broken("is no plain file")
    if int(size) > SIZE_LIMIT:
        raise _too_large()
    data = run("cat-file", "blob", name, max_bytes=SIZE_LIMIT).out
    read_config(data)
    return data


def _lower(asked: Any, bound: Any) -> Any:
    return bound if asked is None else asked if bound is None else min(asked, bound)


def _check_variables(environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        field = f"environment.{_shown(name)}"
        if not _VARIABLE.fullmatch(name):
            raise _bad(field, "is no name of a variable")
        if _RESERVED.fullmatch(name):
            raise _bad(
                field,
                "is not the repository's to set",
                remedy="Write it in front of the command that needs it, in `setup` or `verify`.",
            )
        if len(value) > _VALUE_MAX:
            raise _bad(field, f"is longer than {_VALUE_MAX} characters")
        if "\0" in value:
            raise _bad(field, "holds a NUL character")


def _refuse(error: ValidationError) -> NoReturn:
    first = error.errors(include_url=False, include_input=False)[0]
    path = first["loc"]
    field = ".".join(_shown(str(part)) for part in path)
    kind, context = first["type"], first.get("ctx", {})
    if kind == "extra_forbidden":
        known = Limits.model_fields if path[0] == "limits" else RepositoryConfig.model_fields
        near = difflib.get_close_matches(str(path[-1])[:100], known, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"The settings are: {', '.join(known)}."
        raise _bad(field, "is no setting", remedy=remedy) from None
    bounds = {
        "greater_than_equal": ("must be at least {}", "ge"),
        "greater_than": ("must be more than {}", "gt"),
        "less_than_equal": ("must be at most {}", "le"),
        "string_too_short": ("must have at least {} character", "min_length"),
        "string_too_long": ("must have at most {} characters", "max_length"),
        "too_long": ("must have at most {} entries", "max_length"),
    }
    if kind in bounds:
        words, bound = bounds[kind]
        raise _bad(field, words.format(context[bound])) from None
    if kind == "finite_number":
        raise _bad(field, "must be a finite number") from None
    if kind == "string_pattern_mismatch":
        wanted = "host, host:port or *.domain" if path[0] == "egress" else "a name"
        raise _bad(field, f"does not have the form of {wanted}") from None
    types = {"string": "text", "int": "a whole number", "float": "a number", "tuple": "a list"}
    raise _bad(field, f"must be {types.get(kind.partition('_')[0], 'a table')}") from None


def _where(said: str) -> str:
    """The parser's sentence, without anything of the file's."""
    reason, _, place = said.rpartition(" (at ")
    reason = reason if _REASON.fullmatch(reason) else "Something cannot be read"
    return f"{reason}, at {place.rstrip(')')}"


def _shown(name: str) -> str:
    """A key as it can be shown safely."""
    return "".join(c if re.match(r"[\w.-]", c, re.ASCII) else "?" for c in name[:40])


def _broken(what: str) -> InvalidRepositoryConfig:
    return InvalidRepositoryConfig(f"The repository's {CONFIG_FILE} {what}.")


def _too_large() -> InvalidRepositoryConfig:
    return _broken(f"is larger than {SIZE_LIMIT // 1024} KB")


def _bad(field: str, what: str, *, remedy: str | None = None) -> InvalidRepositoryConfig:
    return InvalidRepositoryConfig(f"In the repository's {CONFIG_FILE}, {field} {what}.", remedy=remedy, field=field)
