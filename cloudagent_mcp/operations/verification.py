"""What a task was verified by, run once more: on its own result, or on a repository as it is now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cloudagent_mcp.operations import Caller, operation
from cloudagent_mcp.operations.credentials import Credentials
from cloudagent_mcp.operations.submission import find_source
from cloudagent_mcp.operations.tasks import Submitted, TaskId, advise
from cloudagent_queue.candidates import Sealing
from cloudagent_queue.repository import Source, is_remote, read_config, with_ref
from cloudagent_storage.errors import NoChanges, NothingToVerifyBy, NotReady
from cloudagent_storage.records import BlobKind, EventDraft, Idempotency, Task, TaskSpec, branch_name, new_id

if TYPE_CHECKING:
    from cloudagent_storage.secrets import Keyring
    from cloudagent_storage.store import Store


class Verification:
    """Submits tasks that only verify."""

    def __init__(
        self,
        store: Callable[[], Store],
        keyring: Callable[[], Keyring],
        *,
        credentials: Credentials,
        ring: Callable[[str], None],
    ) -> None:
        """`store` and `keyring` are opened when they are first needed; `ring` raises nothing."""
        self._open_store = store
        self._keyring = keyring
        self._credentials = credentials
        self._ring = ring

    @operation("POST", "/tasks/{task_id}/verify", title="Verify again", open_world=True, status=202, tool=False)
    def verify_task(
        self,
        caller: Caller,
        *,
        task_id: TaskId,
        repository: Annotated[
            str | None, Field(description="What to verify, as submit_task takes it. Default: the task's own result.")
        ] = None,
        base_ref: str | None = None,
        idempotency_key: Annotated[str | None, Field(min_length=1, max_length=255)] = None,
    ) -> Submitted:
        """Run the verify command of a task that has ended once more: a new task with the same set-up and no agent.

        Raises `NothingToVerifyBy`, `NotReady`, `NoChanges`, `TaskExpired`, and what submit_task raises.
        """
        store, account_id = self._open_store(), caller.account_id
        earlier = store.candidates.choose(account_id, task_id)
        spec = store.tasks.spec(account_id, earlier.task_id)
        if not earlier.status.terminal:
            raise NotReady()
        again, blobs = new_id("task"), dict[BlobKind, bytes]()
        if repository is None:
            source, blobs["start"] = self._result_of(caller, earlier, spec, for_task=again)
        else:
            source = find_source(caller, repository, base_ref, store.uploads)
        if spec.verify is None and not _may_say(source):
            raise NothingToVerifyBy()
        idempotency = None
        if idempotency_key is not None:
            digest = hashlib.sha256(json.dumps(["verify", task_id, repository is None]).encode()).hexdigest()
            idempotency = Idempotency(key=idempotency_key, digest=digest)
        changed = {
            "prompt": f"Verify {task_id} once more.",
            "title": f"Verify: {spec.title}"[:200],
            "agent": "none",
            "retries": 0,  # there is nobody who could mend what fails
            "repository": source.repository,
            "base_ref": spec.base_ref if repository is None else base_ref,
        }
        if source.bundle is not None:
            blobs["input"] = source.bundle
        task = store.tasks.add(
            account_id,
            spec.model_copy(update=changed),
            task_id=again,
            base_sha=source.base_sha,
            config=source.config,
            manifests=source.manifests,
            git_credentials=Sealing(self._keyring(), {}, self._credentials.for_git(caller, None)).for_git(again),
            blobs=blobs,
            lines=[EventDraft(kind="status", message=f"Queued, to verify {task_id} once more."), *source.warnings],
            idempotency=idempotency,
            parent_task_id=task_id,
        )
        self._ring(task.task_id)
        return Submitted.model_validate({**dict(advise(task)), "replayed": task.task_id != again})

    def _result_of(self, caller: Caller, task: Task, spec: TaskSpec, *, for_task: str) -> tuple[Source, bytes]:
        """What the task started from, and its result as another task's start."""
        store = self._open_store()
        result = store.blobs.get(caller.account_id, task.task_id, "result")
        if result is None:
            raise NoChanges()
        bundle = store.blobs.get(caller.account_id, task.task_id, "input")
        config, manifests = store.tasks.settings(caller.account_id, task.task_id)
        return Source(spec.repository, bundle, task.base_sha, config, manifests), with_ref(
            result, branch_name(for_task)
        )


def _may_say(source: Source) -> bool:
    """Does the repository have a verify command of its own, as far as is known here?"""
    if source.bundle is None:
        return is_remote(source.repository)
    return source.config is not None and read_config(source.config).verify is not None
