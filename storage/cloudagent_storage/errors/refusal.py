"""What was asked for is not there, not now, or not allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from cloudagent_storage.errors.root import CloudAgentError


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


class UploadNotFound(NotFound):
    """There is no upload with that id; none is kept for longer than a day."""

    code = "upload_not_found"
    remedy = "Upload it again: `ca task create` in the folder does so."
    field = "repository"


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


class SeveralAgents(NotNow):
    """That task has candidates, each with an agent of its own, and none itself."""

    code = "several_agents"
    remedy = "Send it to one of its candidates; get_task names them."
    field = "task_id"


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


class NothingToVerifyBy(NotNow):
    """The task has no verify command."""

    code = "nothing_to_verify_by"
    remedy = "Submit it with `verify`, or set that in the repository's .cloudagent.toml."


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


class ApplyRefused(NotNow):
    """A result was not applied; nothing was written."""

    code = "apply_refused"
    outcome: ClassVar[str] = "refused"

    def __init__(
        self,
        message: str | None = None,
        *,
        remedy: str | None = None,
        field: str | None = None,
        files: Sequence[tuple[str, str]] = (),
    ) -> None:
        """`files` are the paths in the result that it is about, each with why."""
        super().__init__(message, remedy=remedy, field=field)
        self.files = tuple(files)

    def as_dict(self) -> dict[str, Any]:
        """As every error, and with the outcome and the files, of which the first fifty are enough to act."""
        files = [{"path": path, "why": why} for path, why in self.files[:50]]
        return {**super().as_dict(), "outcome": self.outcome, "files": files}


class ApplyConflict(ApplyRefused):
    """Some files changed here as well as in the task; nothing was written."""

    code = "conflict"
    outcome = "conflict"
    remedy = "Commit or stash your changes to these files, or merge the task's branch yourself."


class PreviewOutdated(ApplyRefused):
    """What would be done now is not what that preview showed; nothing was written."""

    code = "preview_outdated"
    remedy = "Look at a new preview (dry_run), and pass its token."
    field = "preview"


class UnsafeChange(ApplyRefused):
    """The result holds a change that must not be written to a working tree; nothing was written."""

    code = "unsafe_change"
    remedy = "Read the diff; what is safe in it can be taken over by hand."


class ConfirmationNeeded(ApplyRefused):
    """The result changes files that can make a machine execute things; nothing was written."""

    code = "confirmation_needed"
    remedy = "Ask your user to read their diff; then name each in allow_sensitive."
    field = "allow_sensitive"
    dangers: tuple[tuple[str, str], ...] = ()
    """What else whoever is asked should know of the result, each path with why."""


class TargetNotAllowed(ApplyRefused):
    """A result cannot be applied to that directory."""

    code = "target_not_allowed"
    remedy = "Pass the working tree of the repository that the task started from."
    field = "directory"


class TargetExists(ApplyRefused):
    """A branch or a folder of that name is there already, and is not touched."""

    code = "target_exists"
    remedy = "Name another one."


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
