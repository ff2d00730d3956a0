"""The one error tree. A class's docstring is its default message; `code` is stable and part of the public interface.

* CloudAgentError
  x InvalidInput                what the caller sent cannot be used
    + UnknownArgument, MissingArgument, WrongType, OutOfRange
    + InvalidCharacter, InvalidUnicode, InvalidCursor, InvalidJson
    + PromptEmpty, PromptTooLong
    + UnknownProvider, IdempotencyMismatch
    + InvalidEgress, EgressNotAllowed
    + schedule
      - InvalidCron, NeverFires, TooFrequent, UnknownTimezone
    + repository
      - RepositoryNotAllowed, RepositoryNotFound, RepositoryUnreachable, RepositoryEmpty, CredentialsInUrl
      - InvalidRef, RefNotFound, RepositoryTooLarge, InvalidRepositoryConfig
  x NotFound
    + TaskNotFound, ScheduleNotFound, KeyNotFound, AmbiguousId, NoRoute
  x NotNow                      right, but not in this state
    + NotReady, NoChanges, AlreadyApplied, NothingToUndo, Busy
    + TaskEnded, QuestionClosed
    + TaskExpired
    + ApplyConflict, UnsafeChange, ConfirmationNeeded, TargetNotAllowed
    + LimitReached
  x CredentialMissing
  x Unauthorized, Forbidden, ForbiddenHost
  x Unavailable                 something we depend on does not answer
    + DatabaseUnavailable       whatever was to be done may be tried again
      - DatabaseBusy, StorageFull
    + QueueUnavailable, ServerUnreachable, GitMissing, PortTaken
    + ProviderBroken            its sandboxes do not do what the contract of all providers asks for
    + SandboxUnavailable        no sandbox can be made at all
      - ProviderBusy            not now: later, or by another provider
      - TemplateNotFound
      - TemplateBuildFailed
  x SandboxError                about one sandbox
    + SandboxGone               it is confirmed dead: make a new one
    + SandboxUnreachable        it may live, and the work is in it: never replace it
  x LeaseLost                   another attempt owns the task now: let go, change nothing
  x Internal

Every error says what happened (`message`), what to do next (`remedy`), and which argument is meant (`field`).
A message never holds the value that the caller sent, a path of the server, or a secret.
"""

from __future__ import annotations

from typing import Any, ClassVar


class CloudAgentError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "internal"
    remedy: str = "Try again; if it happens again, run `ca doctor`."
    field: str | None = None

    def __init__(self, message: str | None = None, *, remedy: str | None = None, field: str | None = None) -> None:
        self.message = message or " ".join((type(self).__doc__ or "").split())
        if remedy is not None:
            self.remedy = remedy
        if field is not None:
            self.field = field
        super().__init__(self.message)

    def as_dict(self) -> dict[str, Any]:
        """The error as every face shows it: code, detail, remedy, field."""
        return {"code": self.code, "detail": self.message, "remedy": self.remedy, "field": self.field}


class InvalidInput(CloudAgentError):
    """What was sent cannot be used."""

    code = "invalid_input"
    remedy = "Correct the argument and call again."


class UnknownArgument(InvalidInput):
    """There is no argument of that name."""

    code = "unknown_argument"
    remedy = "Leave it out."


class MissingArgument(InvalidInput):
    """A required argument is missing."""

    code = "missing_argument"
    remedy = "Pass it."


class WrongType(InvalidInput):
    """An argument has the wrong type."""

    code = "wrong_type"


class OutOfRange(InvalidInput):
    """An argument lies outside its range."""

    code = "out_of_range"


class InvalidCharacter(InvalidInput):
    """The text holds a NUL character."""

    code = "invalid_character"
    remedy = "Remove the NUL character and call again."


class InvalidUnicode(InvalidInput):
    """The text holds half of a surrogate pair and is no valid Unicode."""

    code = "invalid_unicode"
    remedy = "Send well-formed Unicode text."


class InvalidCursor(InvalidInput):
    """That cursor is not one that this list handed out."""

    code = "invalid_cursor"
    remedy = "Leave the cursor out to start from the beginning."


class InvalidJson(InvalidInput):
    """The body is no valid JSON."""

    code = "invalid_json"
    remedy = "Send one JSON object, each name once, without NaN or Infinity."


class PromptEmpty(InvalidInput):
    """The prompt is empty."""

    code = "prompt_empty"
    remedy = "Say in plain words what the agent should do."
    field = "prompt"


class PromptTooLong(InvalidInput):
    """The prompt is too long."""

    code = "prompt_too_long"
    remedy = "Shorten it, or put the material into a file of the repository and refer to it."
    field = "prompt"


class UnknownProvider(InvalidInput):
    """There is no sandbox provider of that name."""

    code = "unknown_provider"
    field = "provider"


class IdempotencyMismatch(InvalidInput):
    """That idempotency key was used before, with other arguments."""

    code = "idempotency_mismatch"
    remedy = "Use a fresh key for a new task, or repeat the first call's arguments exactly."
    field = "idempotency_key"


class InvalidEgress(InvalidInput):
    """That is no host that can be listed."""

    code = "invalid_egress"
    remedy = "Write host, host:port or *.domain, such as `api.example.com`, without a scheme or a path."
    field = "egress"


class EgressNotAllowed(InvalidInput):
    """A task may not ask for hosts here."""

    code = "egress_not_allowed"
    remedy = "Leave `egress` out, or have the operator list the hosts in SANDBOX_EGRESS or set SANDBOX_EGRESS_TASKS."
    field = "egress"


class InvalidCron(InvalidInput):
    """The cron line cannot be used."""

    code = "invalid_cron"
    remedy = "Write five fields: minute, hour, day of month, month, day of week, such as `0 3 * * 1-5`."
    field = "cron"


class NeverFires(InvalidInput):
    """No day fits the cron line."""

    code = "never_fires"
    remedy = "Correct day of month and month: the 30th of February never comes."
    field = "cron"


class TooFrequent(InvalidInput):
    """Some due times of the cron line are less than 5 minutes apart."""

    code = "too_frequent"
    remedy = "Leave at least 5 minutes between two due times, as in `*/5 * * * *`."
    field = "cron"


class UnknownTimezone(InvalidInput):
    """There is no time zone of that name."""

    code = "unknown_timezone"
    remedy = "Pass a name of the IANA database, such as Europe/Berlin, or UTC."
    field = "timezone"


class RepositoryNotAllowed(InvalidInput):
    """That kind of repository address is not allowed."""

    code = "repository_not_allowed"
    remedy = "Pass an https:// or ssh:// address, git@host:path, a local folder, or none."
    field = "repository"


class RepositoryNotFound(InvalidInput):
    """There is no git repository at that place."""

    code = "repository_not_found"
    remedy = "Check the path; `git init` and a first commit make a folder a repository."
    field = "repository"


class RepositoryUnreachable(InvalidInput):
    """The repository could not be fetched."""

    code = "repository_unreachable"
    remedy = "Check the address and your access to it with `git ls-remote`."
    field = "repository"


class RepositoryEmpty(InvalidInput):
    """The repository has no commit yet."""

    code = "repository_empty"
    remedy = "Make a first commit, or pass repository=none."
    field = "repository"


class RepositoryTooLarge(InvalidInput):
    """The repository is larger than may be sent."""

    code = "repository_too_large"
    remedy = "Remove large files from its history, or pass a remote address instead of a local folder."
    field = "repository"


class CredentialsInUrl(InvalidInput):
    """The repository's address holds a user name or password."""

    code = "credentials_in_url"
    remedy = "Remove it from the address and use git's credential helper, or an ssh address."
    field = "repository"


class InvalidRef(InvalidInput):
    """That is no valid name of a branch, tag or commit."""

    code = "invalid_ref"
    remedy = "Pass the name of a branch or tag, or a commit's id."
    field = "base_ref"


class RefNotFound(InvalidInput):
    """The repository has no branch, tag or commit of that name."""

    code = "ref_not_found"
    remedy = "Pass the name of a branch or tag that exists."
    field = "base_ref"


class InvalidRepositoryConfig(InvalidInput):
    """The repository's `.cloudagent.toml` cannot be used."""

    code = "invalid_repository_config"
    remedy = "Correct the file; docs/repository-settings.md tells what may stand in it."


class NotFound(CloudAgentError):
    """There is nothing of that name."""

    code = "not_found"
    remedy = "Check the name."


class TaskNotFound(NotFound):
    """There is no task with that id."""

    code = "task_not_found"
    remedy = "List the tasks with list_tasks (`ca task list`)."
    field = "task_id"


class KeyNotFound(NotFound):
    """There is no API key with that id."""

    code = "key_not_found"
    remedy = "List the keys with `ca key list`."
    field = "key"


class ScheduleNotFound(NotFound):
    """There is no schedule with that id."""

    code = "schedule_not_found"
    remedy = "List the schedules with list_schedules (`ca schedule list`)."
    field = "schedule_id"


class AmbiguousId(NotFound):
    """Several tasks begin with that prefix."""

    code = "ambiguous_id"
    remedy = "Type a few more characters of the id."
    field = "task_id"


class NoRoute(NotFound):
    """There is nothing at that address."""

    code = "no_route"
    remedy = "The routes are listed in the README, section REST."


class NotNow(CloudAgentError):
    """That is not possible in the present state."""

    code = "not_now"
    remedy = "Look at the task's status."


class NotReady(NotNow):
    """The task has no result yet."""

    code = "not_ready"
    remedy = "Wait for it with get_task(wait_seconds=50) (`ca task wait`)."
    field = "task_id"


class TaskExpired(NotNow):
    """The task's log and files were pruned; only what get_task shows is left."""

    code = "task_expired"
    remedy = "Submit the task again if its result is still wanted; RETENTION_DAYS and RETENTION_MB say what is kept."
    field = "task_id"


class TaskEnded(NotNow):
    """The task has ended, and nobody is there to hear."""

    code = "task_ended"
    remedy = "Submit a new task, or try this one once more with retry_task."


class QuestionClosed(NotNow):
    """That question is not open any more: it was answered, given up, or its sandbox has died."""

    code = "question_closed"
    remedy = "Look at the task with get_task; leave question_id out to tell its agent something all the same."
    field = "question_id"


class NoChanges(NotNow):
    """The task changed no file."""

    code = "no_changes"
    remedy = "Read what the agent said with get_task_logs (`ca task logs`)."
    field = "task_id"


class AlreadyApplied(NotNow):
    """The working tree already holds this task's result."""

    code = "already_applied"
    remedy = "Nothing is left to do; `undo` takes it back."
    field = "task_id"


class NothingToUndo(NotNow):
    """No applied result of this task is recorded for this directory."""

    code = "nothing_to_undo"
    remedy = "Look for the backup ref with `git for-each-ref refs/cloudagent`."
    field = "task_id"


class Busy(NotNow):
    """Another apply or undo is working on this directory."""

    code = "busy"
    remedy = "Try again when it has ended."


class ApplyConflict(NotNow):
    """Some files changed here as well as in the task; nothing was written."""

    code = "conflict"
    remedy = "Commit or stash your changes to these files, or merge the task's branch yourself."


class UnsafeChange(NotNow):
    """The result holds a change that must not be written to a working tree; nothing was written."""

    code = "unsafe_change"
    remedy = "Read the diff; what is safe in it can be taken over by hand."


class ConfirmationNeeded(NotNow):
    """The result changes files that can make a machine execute things; nothing was written."""

    code = "confirmation_needed"
    remedy = "Ask your user to read their diff; then name each in allow_sensitive."
    field = "allow_sensitive"
    files: tuple[str, ...] = ()
    """Their paths, as far as whoever refuses knows them."""


class TargetNotAllowed(NotNow):
    """A result cannot be applied to that directory."""

    code = "target_not_allowed"
    remedy = "Pass the working tree of the repository that the task started from."
    field = "directory"


class LimitReached(NotNow):
    """The account has as many of these as it may have."""

    code = "limit_reached"
    remedy = "Delete one that is not needed any more, or change it instead."


class CredentialMissing(CloudAgentError):
    """There is no credential for the model."""

    code = "credential_missing"
    remedy = "Set ANTHROPIC_API_KEY, or run `claude setup-token` and set CLAUDE_CODE_OAUTH_TOKEN to what it prints."


class Unauthorized(CloudAgentError):
    """The key is missing or not valid."""

    code = "unauthorized"
    remedy = (
        "Send `Authorization: Bearer KEY`: a key of yours that `ca key create` printed, "
        "or the server's own, which `ca serve` printed at its first start."
    )


class Forbidden(CloudAgentError):
    """That is for whoever operates the server."""

    code = "forbidden"
    remedy = "Ask the operator, who has the server's ADMIN_API_KEY."


class ForbiddenHost(CloudAgentError):
    """The request's Host or Origin is not one that this server serves."""

    code = "forbidden_host"
    remedy = "Use the address that the server printed; behind a proxy, set PUBLIC_URL."


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
