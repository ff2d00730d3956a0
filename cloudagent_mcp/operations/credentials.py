"""Which credentials a task gets: its own before its user's, before the operator's, before the server's environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from cloudagent_mcp.operations import Caller
from cloudagent_queue.agents import Agent
from cloudagent_storage.errors import CredentialMissing

GITHUB_VARIABLES = ("GH_TOKEN", "GITHUB_TOKEN")
"""Where its user's tools look for a token, in the order in which GitHub's own does."""


def secret(description: str) -> Any:
    """An argument that goes in and never comes out: printable, without spaces, as a header could carry it."""
    return Field(max_length=1000, pattern="^[!-~]+$", description=description, json_schema_extra={"writeOnly": True})


@dataclass(frozen=True)
class Credentials:
    """The operator's, which serve the tasks of all accounts that bring none."""

    anthropic_api_key: str | None = field(default=None, repr=False)
    github_token: str | None = field(default=None, repr=False)
    github_host: str = "github.com"
    """The one host to which a GitHub token is ever sent."""

    def for_agent(self, caller: Caller, agent: Agent, own_key: str | None) -> dict[str, str]:
        """The variables that a task's agent gets. Raises `CredentialMissing` when none of them reaches a model."""
        found = {name: caller.environment[name] for name in agent.environment if caller.environment.get(name)}
        if own_key is not None:
            return agent.with_key(found, own_key)
        if self.anthropic_api_key is not None and not (caller.local and _suffices(agent, found)):
            return agent.with_key(found, self.anthropic_api_key)
        agent.check_credential(found)
        return found

    def for_git(self, caller: Caller, own_token: str | None) -> dict[str, str]:
        """The tokens with which a task's repository may be fetched, each under the host that it is for."""
        of_user = arguments_of(caller.environment).get("github_token") if caller.local else None
        token = own_token or of_user or self.github_token
        return {} if token is None else {self.github_host: token}


def arguments_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The arguments of `submit_task` that say what a user's environment has, for a server that does not see it."""
    given = {name: environment.get(name, "").strip() for name in ("ANTHROPIC_API_KEY", *GITHUB_VARIABLES)}
    token = next((given[name] for name in GITHUB_VARIABLES if given[name]), "")
    found = {"anthropic_api_key": given["ANTHROPIC_API_KEY"], "github_token": token}
    return {name: value for name, value in found.items() if value}


def _suffices(agent: Agent, environment: dict[str, str]) -> bool:
    try:
        agent.check_credential(environment)
    except CredentialMissing:
        return False
    return True
