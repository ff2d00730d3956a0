"""The one error tree. A class's docstring is its default message; `code` is stable and part of the public interface.

* CloudAgentError
  x InvalidInput                what the caller sent cannot be used
    + UnknownArgument, MissingArgument, WrongType, OutOfRange
    + InvalidCharacter, InvalidUnicode, InvalidCursor, InvalidJson
    + PromptEmpty, PromptTooLong
    + UnknownProvider, IdempotencyMismatch, StartGiven
    + InvalidEgress, EgressNotAllowed
    + NotInDiff                 a comment is about nothing that the task has changed
    + schedule
      - InvalidCron, NeverFires, TooFrequent, UnknownTimezone
    + repository
      - RepositoryNotAllowed, RepositoryNotFound, RepositoryUnreachable, RepositoryEmpty, CredentialsInUrl
      - RepositoryNotPushed, SecretsFound, InvalidUpload, UploadIncomplete
      - InvalidRef, RefNotFound, RepositoryTooLarge, InvalidRepositoryConfig
  x NotFound
    + TaskNotFound, ScheduleNotFound, KeyNotFound, UploadNotFound, AmbiguousId, NoRoute
  x NotNow                      right, but not in this state
    + NotReady, TaskEnded, SeveralAgents, QuestionClosed, NoChanges, AlreadyApplied, NothingToUndo, Busy
    + TaskExpired, NothingToVerifyBy
    + ApplyRefused                a result is not written; with its outcome, and the files that it is about
      - ApplyConflict, PreviewOutdated
      - UnsafeChange, ConfirmationNeeded, TargetNotAllowed, TargetExists
    + LimitReached
    + SessionRefused              a conversation is not brought home
      - NoSession, SessionTampered, SessionForeign, SessionTooLarge, SessionMalformed
      - SessionDiverged, SessionPlaceUnsafe
  x CredentialMissing
  x Unauthorized, Forbidden, ForbiddenHost
  x Unavailable                 something we depend on does not answer
    + DatabaseUnavailable       whatever was to be done may be tried again
      - DatabaseBusy, StorageFull
    + QueueUnavailable, ServerUnreachable, ServerOutdated, GitMissing, PortTaken
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

from .failure import *
from .input import *
from .refusal import *
from .root import *
from .session import *
