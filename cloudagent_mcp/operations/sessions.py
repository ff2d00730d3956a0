"""The conversations that tasks leave behind: brought home, or gone on with by another task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from cloudagent_mcp.operations import Caller
from cloudagent_mcp.session_home import SessionHome, bring_home, unpack
from cloudagent_queue.agents.claude_session import as_session, read_conversation, without_costs
from cloudagent_queue.redact import Redactor
from cloudagent_queue.repository import Source, with_ref
from cloudagent_queue.seal import seal, unseal
from cloudagent_storage.errors import NoSession, NotReady, SessionRefused
from cloudagent_storage.records import BlobKind, Task, TaskSpec, branch_name

if TYPE_CHECKING:
    from cloudagent_storage.secrets import Keyring
    from cloudagent_storage.store import Store


@dataclass(frozen=True)
class Earlier:
    """What another task needs to go on from one that has ended."""

    spec: TaskSpec
    source: Source
    blobs: Mapping[BlobKind, bytes]
    """Its conversation, and where its branch stands."""


class Sessions:
    """The sessions of tasks that have ended."""

    def __init__(self, store: Callable[[], Store], keyring: Callable[[], Keyring]) -> None:
        """Both are opened when they are first needed."""
        self._store = store
        self._keyring = keyring

    def session(self, caller: Caller, task_id: str, candidate: int | None = None) -> bytes:
        """A task's session as it was collected, or its best or that candidate's: untrusted.

        Raises what `earlier` raises.
        """
        task_id = self._ended(caller, task_id, candidate).task_id
        sealed = self._store().blobs.get(caller.account_id, task_id, "session")
        if sealed is None:
            raise NoSession()
        return unseal(self._keyring(), sealed, account_id=caller.account_id, task_id=task_id)

    def bring_home(self, caller: Caller, task_id: str, directory: Path) -> SessionHome:
        """Put it where the caller's own Claude Code finds it; see `bring_home` in session_home.py."""
        session = self.session(caller, task_id)
        return bring_home(session, task_id=task_id, directory=directory, environment=caller.environment)

    def earlier(self, caller: Caller, task_id: str, *, for_task: str) -> Earlier:
        """What the task of the id `for_task` is to start with, to go on from another's branch and conversation.

        Of one with candidates the best is gone on from.
        Raises `TaskNotFound`, `TaskExpired`, `NotReady`, and errors under `SessionRefused`.
        """
        task, store = self._ended(caller, task_id), self._store()
        task_id = task.task_id
        blobs: dict[BlobKind, bytes] = {
            "conversation": self._sealed(caller, for_task, without_costs(self.session(caller, task_id)))
        }
        if (result := store.blobs.get(caller.account_id, task_id, "result")) is not None:
            blobs["start"] = with_ref(result, branch_name(for_task))
        config, manifests = store.tasks.settings(caller.account_id, task_id)
        spec, bundle = (
            store.tasks.spec(caller.account_id, task_id),
            store.blobs.get(caller.account_id, task_id, "input"),
        )
        key = store.tasks.source_key(caller.account_id, task_id)
        return Earlier(spec, Source(spec.repository, bundle, task.base_sha, config, manifests, key=key), blobs)

    def again(self, caller: Caller, task_id: str, for_task: str) -> Mapping[BlobKind, bytes]:
        """What a task was submitted with to go on from, for the one that tries it once more."""
        blobs: dict[BlobKind, bytes] = {}
        account_id = caller.account_id
        if (sealed := self._store().blobs.get(account_id, task_id, "conversation")) is not None:
            owner = self._store().tasks.get(account_id, task_id).submitted_as
            session = unseal(self._keyring(), sealed, account_id=account_id, task_id=owner)
            blobs["conversation"] = self._sealed(caller, for_task, session)
        if (start := self._store().blobs.get(account_id, task_id, "start")) is not None:
            blobs["start"] = with_ref(start, branch_name(for_task))
        return blobs

    def taken_along(self, caller: Caller, packed: str, *, for_task: str, secrets: Sequence[str]) -> bytes:
        """A conversation that a caller had elsewhere, for a task to go on with; see `take_along` in session_home.py.

        It becomes a session of its own, so that it can come home beside the one that it was. Without `secrets`.
        Raises `SessionMalformed` and `SessionTooLarge`.
        """
        try:
            found = read_conversation(unpack(packed), folder="/", new_id=str(uuid4()))
        except SessionRefused as error:
            error.field, error.remedy = "session", "Submit it without a session."
            raise
        session = as_session(found.session_id, found.data.decode())
        return self._sealed(caller, for_task, Redactor(secrets).data(session))

    def _sealed(self, caller: Caller, task_id: str, session: bytes) -> bytes:
        return seal(self._keyring(), session, account_id=caller.account_id, task_id=task_id, attempt=0)

    def _ended(self, caller: Caller, task_id: str, candidate: int | None = None) -> Task:
        task = self._store().candidates.choose(caller.account_id, task_id, candidate)
        if not task.status.terminal:
            raise NotReady()
        return task
