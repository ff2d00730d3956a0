"""A task that has ended with a diff, without an agent that made it."""

from __future__ import annotations

from typing import Any

from cloudagent_mcp.app import App
from cloudagent_queue.seal import seal
from cloudagent_storage.records import LOCAL_ACCOUNT, Artifacts, Result, TaskSpec, TaskStatus, branch_name
from tests.support.sessions import session

DIFF = """\
diff --git a/calc.py b/calc.py
index 1..2 100644
--- a/calc.py
+++ b/calc.py
@@ -1,2 +1,2 @@
 def add(a, b):
-    return a - b
+    return a + b
"""


def ended(app: App, *, account_id: str = LOCAL_ACCOUNT, diff: str | None = DIFF, **spec: Any) -> str:
    """The id of a task that completed, with this diff and a conversation; what it was asked for, as `spec` says."""
    app.store.accounts.ensure(account_id)
    asked = {"prompt": "Fix add", "title": "Fix add", **spec}
    task = app.store.tasks.add(account_id, TaskSpec.model_validate(asked), base_sha="0" * 40, source_key="root")
    task_id = task.task_id
    assert app.store.tasks.claim(task_id, worker="w", lease_s=60) is not None
    end(app, task_id, account_id=account_id, diff=diff)
    return task_id


def end(app: App, task_id: str, *, account_id: str = LOCAL_ACCOUNT, diff: str | None = DIFF) -> None:
    """A worker's first attempt completes a task with this diff and a conversation."""
    kept = seal(app.settings.keyring, session(), account_id=account_id, task_id=task_id, attempt=1)
    app.store.blobs.put(task_id, "session", kept, attempt=1)
    result = None
    if diff is not None:
        app.store.blobs.put(task_id, "diff", diff.encode(), attempt=1)
        app.store.tasks.update(task_id, 1, touches=["calc.py"])
        artifacts = Artifacts(branch=branch_name(task_id), files_changed=1, insertions=1, deletions=1)
        result = Result(artifacts=artifacts)
    app.store.tasks.finish(task_id, 1, status=TaskStatus.COMPLETED, result=result)


def at_work(app: App, *touches: str, account_id: str = LOCAL_ACCOUNT) -> str:
    """The id of a task that a worker has, and whose agent touches these files of the same repository."""
    spec = TaskSpec(prompt="x", title="x")
    task_id = app.store.tasks.add(account_id, spec, source_key="root").task_id
    assert app.store.tasks.claim(task_id, worker="w", lease_s=600) is not None
    app.store.tasks.follow(task_id, 1, [], log_offset=1, lease_s=600, touches=touches or None)
    return task_id
