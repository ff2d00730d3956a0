"""What is out of order: something we depend on, a sandbox, or this program."""

from __future__ import annotations

from cloudagent_storage.errors.root import CloudAgentError


class Unavailable(CloudAgentError):
    """Something that this depends on does not answer."""

    code = "unavailable"
    remedy = "Run `ca doctor`."


class DatabaseUnavailable(Unavailable):
    """The database does not answer."""

    code = "database_unavailable"
    remedy = "Check DATABASE_URL, and that the server runs; `ca doctor` tells more. Try again."


class DatabaseBusy(DatabaseUnavailable):
    """Every connection to the database is in use."""

    code = "database_busy"
    remedy = "Try again in a moment; if it stays so, raise max_connections in Postgres or run fewer processes."


class StorageFull(DatabaseUnavailable):
    """The disk is full: nothing new is accepted, and nothing that was accepted is lost."""

    code = "storage_full"
    remedy = (
        "Free space on the disk of the data folder or of the database, or keep less with RETENTION_DAYS and "
        "RETENTION_MB; then try again."
    )


class QueueUnavailable(Unavailable):
    """The queue does not answer."""

    code = "queue_unavailable"
    remedy = "Check QUEUE_URL or REDIS_URL, and that the server runs; `ca doctor` tells more."


class ServerUnreachable(Unavailable):
    """The cloudagent server does not answer."""

    code = "server_unreachable"
    remedy = "Check CLOUDAGENT_URL, and that `ca serve` runs there."


class ServerOutdated(Unavailable):
    """The cloudagent server is older than this program."""

    code = "server_outdated"
    remedy = "Ask its operator to update it; `ca doctor` tells both versions."


class GitMissing(Unavailable):
    """git is not installed."""

    code = "git_missing"
    remedy = "Install git and make sure that it is on the PATH."


class PortTaken(Unavailable):
    """The port is in use, or may not be bound."""

    code = "port_taken"
    remedy = "Choose another with --port; 0 takes a free one."


class ProviderBroken(Unavailable):
    """The sandbox provider does not do what is asked of every provider."""

    code = "provider_broken"
    remedy = (
        "Tasks may fail or be lost with this provider; please report it, with the output of `ca doctor --provider`."
    )


class SandboxUnavailable(Unavailable):
    """No sandbox can be made on this machine."""

    code = "sandbox_unavailable"
    remedy = (
        "Install bubblewrap (`apt install bubblewrap`) and allow unprivileged user namespaces. "
        "Only on a machine that you can afford to lose: SANDBOX_PROVIDER=unsafe-process runs agents without a sandbox."
    )


class ProviderBusy(SandboxUnavailable):
    """The sandbox provider takes no new sandbox at the moment."""

    code = "provider_busy"
    remedy = "Wait, or name another provider in SANDBOX_PROVIDER as well."

    def __init__(
        self, message: str | None = None, *, remedy: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_s = retry_after_s
        """How long the provider asks to be left alone, if it says so."""


class TemplateNotFound(SandboxUnavailable):
    """The sandbox provider has no template of that name."""

    code = "template_not_found"
    remedy = (
        "Correct SANDBOX_TEMPLATE, or build one with `ca template build`. It belongs to one account and one region."
    )


class TemplateBuildFailed(SandboxUnavailable):
    """The sandbox provider could not build the template."""

    code = "template_build_failed"
    remedy = "Try again: what was built is kept there. If it fails at the same step, report it with these lines."


class SandboxError(CloudAgentError):
    """A sandbox failed."""

    code = "sandbox_error"


class SandboxGone(SandboxError):
    """The sandbox does not exist any more."""

    code = "sandbox_lost"
    remedy = "Submit the task again."


class SandboxUnreachable(SandboxError):
    """The sandbox does not answer, but may still live."""

    code = "sandbox_unreachable"


class LeaseLost(CloudAgentError):
    """Another attempt owns this task now."""

    code = "lease_lost"


class Internal(CloudAgentError):
    """Something unexpected happened; the details are in the server's log."""

    code = "internal"
