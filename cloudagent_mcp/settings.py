"""The only reader of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from cloudagent_storage.errors import InvalidInput

if TYPE_CHECKING:
    from cloudagent_storage.secrets import Keyring


class Settings(BaseModel):
    """What the environment says, each variable under its own name in lower case. See `.env.example`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    cloudagent_home: Path = Field(default_factory=lambda: Path(platformdirs.user_data_dir("cloudagent")))
    """The data folder: database, queue, sandboxes, keys."""
    database_url: SecretStr | None = None
    """postgresql://… or sqlite:///FILE; a SQLite file in the data folder where unset."""
    queue_url: SecretStr | None = None
    redis_url: SecretStr | None = None
    """redis://…, or sqlite:///FILE for `queue_url`; a file in the data folder where both are unset."""
    sandbox_provider: str = "local"
    novita_api_key: SecretStr | None = None
    novita_domain: str | None = None
    novita_api_url: str | None = None
    novita_sandbox_url: str | None = None
    e2b_api_key: SecretStr | None = None
    e2b_domain: str | None = None
    e2b_api_url: str | None = None
    e2b_sandbox_url: str | None = None
    """Of the sandbox providers: `PROVIDERS` in cloudagent_queue.sandboxes says which one uses which."""
    sandbox_template: str | None = None
    sandbox_session_minutes: int = Field(default=60, ge=5, le=1440)
    """The longest life of a remote sandbox: what the account's plan allows."""
    sandbox_prices: Path | None = None
    """A file with prices of sandboxes, in place of list prices; `sandboxes/prices.toml` tells its form."""
    sandbox_egress: str = "registries"
    """The hosts that sandboxes may reach beside those of the model and the repository; `open` for any."""
    sandbox_egress_tasks: Literal["none", "user", "any"] = "user"
    """Whose tasks may ask for more of them: nobody's, those of this machine's user, or everybody's."""
    sandbox_memory_mb: int | None = Field(default=None, ge=0, le=1_000_000_000)
    sandbox_pids: int | None = Field(default=None, ge=0, le=4_000_000)
    sandbox_disk_mb: int | None = Field(default=None, ge=0, le=1_000_000_000)
    """What one local sandbox may take; 0 is without limit. `sandboxes/limits.py` has the defaults."""
    admin_api_key: SecretStr | None = None
    encryption_key: SecretStr | None = None
    """Seals credentials at rest; separated by commas, newest first. A key file in the data folder where it is unset."""
    system_anthropic_api_key: SecretStr | None = None
    """For the tasks of all accounts that bring no credential for the model."""
    system_github_token: SecretStr | None = None
    """For the tasks of all accounts that bring no token for GitHub."""
    public_url: str | None = None
    """Where people reach a server that is bound beyond loopback."""
    worker_concurrency: int = Field(default=10, ge=1, le=1000)
    account_running_max: int | None = Field(default=None, ge=1, le=100_000)
    """How many tasks one account may have running at once, in the whole installation."""
    retention_days: float = Field(default=90, ge=0, allow_inf_nan=False)
    """How long the logs, diffs and bundles of finished tasks are kept; 0 is for ever."""
    retention_mb: int = Field(default=10_000, ge=0)
    """How much of them is kept for one account, in millions of bytes; 0 is without limit."""
    cloudagent_url: str | None = None
    cloudagent_api_key: SecretStr | None = None
    """Where `ca` finds its server; unset, it works in this very process."""

    environment: Mapping[str, str] = Field(default_factory=dict, repr=False, exclude=True)
    """All of it, for the variables that an agent or git may see. Nobody else looks at it."""

    @field_validator("sandbox_egress")
    @classmethod
    def _can_be_kept(cls, value: str) -> str:
        from cloudagent_queue.allowed_hosts import check_setting

        try:
            check_setting(value)
        except InvalidInput as error:
            raise ValueError(error.message) from None
        return value

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the process's environment, or the one given. Raises `InvalidInput` that names the variable."""
        env = dict(os.environ if environment is None else environment)
        named = {name: env[name.upper()] for name in cls.model_fields if env.get(name.upper())}
        try:
            return cls.model_validate({**named, "environment": env})
        except ValidationError as error:
            variable = str(error.errors()[0]["loc"][0]).upper()
            raise InvalidInput(
                f"The environment variable {variable} has a value that cannot be used.",
                remedy="Correct it; `.env.example` describes every variable.",
                field=variable,
            ) from None

    @property
    def store_url(self) -> str:
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.cloudagent_home.absolute() / 'cloudagent.db'}"

    @property
    def task_queue_url(self) -> str:
        if (url := self.queue_url or self.redis_url) is not None:
            return url.get_secret_value()
        return f"sqlite:///{self.cloudagent_home.absolute() / 'queue.db'}"

    @property
    def embedded(self) -> bool:
        """Is the worker ours to start? It is where the queue is a file: no other machine could take from it."""
        return self.task_queue_url.startswith("sqlite:")

    @cached_property
    def keyring(self) -> Keyring:
        from cloudagent_storage.secrets import Keyring

        if self.encryption_key is not None:
            return Keyring([key.strip() for key in self.encryption_key.get_secret_value().split(",") if key.strip()])
        return Keyring.from_file(self.cloudagent_home / "encryption.key")

    def pick(self, names: tuple[str, ...] | list[str]) -> dict[str, str]:
        """Those variables of the environment that are set."""
        return {name: self.environment[name] for name in names if self.environment.get(name)}

    @property
    def git_environment(self) -> dict[str, str]:
        """What git may know of its user: where keys and credential helpers are."""
        return self.pick(["HOME", "PATH", "LANG", "USER", "SSH_AUTH_SOCK", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"])

    @property
    def worker_environment(self) -> dict[str, str]:
        """What the embedded worker's process is given: the operator's settings, and no credentials of anybody's.

        Those that a task may use were sealed with it.
        """
        others = {
            "environment",
            "admin_api_key",
            "cloudagent_api_key",
            "system_anthropic_api_key",
            "system_github_token",
        }
        own = [name.upper() for name in type(self).model_fields if name not in others]
        return {**self.git_environment, **self.pick(own), "CLOUDAGENT_HOME": str(self.cloudagent_home.absolute())}

    def make_home(self) -> None:
        """Create the data folder, readable by its owner alone."""
        self.cloudagent_home.mkdir(parents=True, exist_ok=True, mode=0o700)
