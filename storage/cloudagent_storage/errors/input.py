"""What the caller sent cannot be used."""

from __future__ import annotations

from cloudagent_storage.errors.root import CloudAgentError


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


class StartGiven(InvalidInput):
    """A task that goes on from another one starts where that one ended."""

    code = "start_given"
    remedy = "Leave repository, base_ref and session out; or leave out continue_task_id."
    field = "repository"


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


class NotInDiff(InvalidInput):
    """The task's diff has no such file, or no such line."""

    code = "not_in_diff"
    remedy = "Look at get_task_diff (`ca task diff --lines`)."
    field = "comments"


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


class RepositoryNotPushed(InvalidInput):
    """The server cannot fetch what is here: some of it is on this machine alone."""

    code = "repository_not_pushed"
    remedy = "Commit and push it; or pass base_ref to start from a commit that is pushed, or repository=none."
    field = "repository"


class SecretsFound(InvalidInput):
    """Files that git does not know yet look like secrets; nothing was submitted."""

    code = "secrets_found"
    remedy = (
        "Name them in .gitignore, and they stay at home; or have your user name each in allow_secrets, to go along."
    )
    field = "allow_secrets"
    files: tuple[str, ...] = ()


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


class InvalidUpload(InvalidInput):
    """What was uploaded is no whole git bundle of one commit that git accepts."""

    code = "invalid_upload"
    remedy = "Upload what `git bundle create` made of the branch cloudagent-base; `ca task create` does all of it."


class UploadIncomplete(InvalidInput):
    """The upload is built on commits that are not there, or not any more."""

    code = "upload_incomplete"
    remedy = "Upload the whole of it."


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
