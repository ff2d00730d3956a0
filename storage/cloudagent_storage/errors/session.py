"""A conversation that is not brought home, and why."""

from __future__ import annotations

from cloudagent_storage.errors.refusal import NotNow


class SessionRefused(NotNow):
    """The task's session is not brought home."""

    code = "session_refused"
    remedy = "The task's result is not affected: apply it as usual, and read what was said with get_task_logs."
    field = "task_id"


class NoSession(SessionRefused):
    """The task has left no session: its agent said nothing, or its sandbox was lost."""

    code = "no_session"


class SessionTampered(SessionRefused):
    """The task's session is not what the server collected, or was collected under a key that is gone."""

    code = "session_tampered"
    remedy = "Find out who else can write to the database; or put the earlier key back into ENCRYPTION_KEY."


class SessionForeign(SessionRefused):
    """The session that is kept with the task is another task's, or was never collected by this server."""

    code = "session_foreign"


class SessionTooLarge(SessionRefused):
    """The task's session is larger than is brought home."""

    code = "session_too_large"


class SessionMalformed(SessionRefused):
    """The task's session is no conversation of Claude Code's."""

    code = "session_malformed"


class SessionDiverged(SessionRefused):
    """There is a session of this id here already, with turns that this one does not have; it was left alone."""

    code = "session_diverged"
    remedy = "Resume the one that is here; or move its file away first, and repeat this."


class SessionPlaceUnsafe(SessionRefused):
    """Where Claude Code keeps its sessions there is a symlink, or something that is no file; nothing was written."""

    code = "session_place_unsafe"
    remedy = "Look at `projects` in Claude Code's own folder (~/.claude, or CLAUDE_CONFIG_DIR), and remove what is odd."
