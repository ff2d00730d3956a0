"""The operations as Python calls: in this very process, or over REST with the same names, arguments and answers."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx2
from anyio.from_thread import start_blocking_portal

from cloudagent_mcp import apply
from cloudagent_mcp.app import App
from cloudagent_mcp.operations import marks_of
from cloudagent_mcp.operations.backlog import Backlog
from cloudagent_mcp.operations.messages import Messages
from cloudagent_mcp.operations.schedules import Schedules
from cloudagent_mcp.operations.tasks import Tasks
from cloudagent_mcp.settings import Settings
from cloudagent_storage import errors
from cloudagent_storage.records import ID_LENGTH

MARKS = marks_of(Tasks, Messages, Schedules, Backlog)
PAGES_SEARCHED = 10


class Client(Protocol):
    """Calls operations by name; answers are what REST answers, as plain JSON values."""

    def call(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """Raises the errors of the error tree."""
        ...

    def apply(self, task_id: str, **arguments: Any) -> dict[str, Any]:
        """`apply_task` on this machine, wherever the task is kept."""
        ...

    def resolve(self, prefix: str) -> str:
        """The task whose id begins so. Raises `TaskNotFound` or `AmbiguousId`."""
        ...

    def close(self) -> None: ...


def open_client(settings: Settings) -> Client:
    """The server that `CLOUDAGENT_URL` names, or this process."""
    return HttpClient(settings) if settings.cloudagent_url else LocalClient(App(settings))


def log_lines(
    api: Client,
    name: str,
    *,
    after: int = 0,
    level: str | None = None,
    kinds: tuple[str, ...] = (),
    follow: bool = False,
) -> Iterator[dict[str, Any]]:
    """A task's log lines from `after` on; with `follow` until it has ended."""
    while True:
        # Looked at first: what is in the log after the end was seen is all that there will ever be.
        ended = not follow or api.call("get_task", task_id=name, log_lines=0)["completed_at"] is not None
        page = api.call("get_task_logs", task_id=name, after=after, level=level, kinds=list(kinds), limit=1000)
        yield from page["lines"]
        after = page["next_after"]
        if not page["more"]:
            if ended:
                return
            time.sleep(0.3)


def resolve_schedule(api: Client, name: str) -> str:
    """The id of the schedule of that id, name or unique beginning of an id, with or without `sch_`.

    Raises `ScheduleNotFound`, and `AmbiguousId` when there are several.
    """
    schedules = api.call("list_schedules")["schedules"]
    bare = name.removeprefix("sch_")
    named = [found["schedule_id"] for found in schedules if name in (found["schedule_id"], found["name"])]
    begun = [
        found["schedule_id"] for found in schedules if len(bare) >= 4 and found["schedule_id"][4:].startswith(bare)
    ]
    match named or begun:
        case [only]:
            return only
        case []:
            raise errors.ScheduleNotFound()
        case _:
            raise errors.AmbiguousId("Several schedules are called so.", field="schedule_id")


class LocalClient:
    """Works in this process, on the database of the data folder; the worker is a process of its own."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._portal_context = start_blocking_portal()
        self._portal = self._portal_context.__enter__()

    def call(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        operation = self._app.operations[name]
        call = functools.partial(operation.call, self._app.local_caller(), arguments)
        answer = self._portal.start_task_soon(call).result()
        return answer.model_dump(mode="json")

    def apply(self, task_id: str, **arguments: Any) -> dict[str, Any]:
        return self.call("apply_task", task_id=task_id, **arguments)

    def resolve(self, prefix: str) -> str:
        return self._app.store.tasks.resolve(self._app.local_caller().account_id, prefix)

    def close(self) -> None:
        self._portal_context.__exit__(None, None, None)
        self._app.close()


class HttpClient:
    """Works on a server. Raises `ServerUnreachable` when it does not answer."""

    def __init__(self, settings: Settings) -> None:
        key = settings.cloudagent_api_key.get_secret_value() if settings.cloudagent_api_key else ""
        self._http = httpx2.Client(
            base_url=f"{str(settings.cloudagent_url).rstrip('/')}/api/v1",
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(70.0, connect=5.0),
        )
        self._state_folder = settings.cloudagent_home / "apply"

    def call(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        marked = MARKS[name]
        given = {key: value for key, value in arguments.items() if value is not None}
        path = marked.path.format(**given)
        rest = {key: value for key, value in given.items() if f"{{{key}}}" not in marked.path}
        if marked.method in ("GET", "DELETE"):
            query = {key: str(value).lower() if isinstance(value, bool) else value for key, value in rest.items()}
            return self._send(marked.method, path, params=query).json()
        return self._send(marked.method, path, json=rest).json()

    def apply(self, task_id: str, **arguments: Any) -> dict[str, Any]:
        folder = Path.cwd() / (arguments.get("directory") or ".")
        if arguments.get("undo"):
            return apply.undo(folder, task_id=task_id, state_folder=self._state_folder).model_dump(mode="json")
        task = self.call("get_task", task_id=task_id, log_lines=0)
        result = self._bundle(task_id, "result")
        assert result is not None
        outcome = apply.apply(
            folder,
            task_id=task_id,
            branch=task["branch"],
            base_sha=task["base_sha"],
            input_bundle=self._bundle(task_id, "input"),
            result_bundle=result,
            state_folder=self._state_folder,
            dry_run=bool(arguments.get("dry_run")),
            allow_sensitive=arguments.get("allow_sensitive") or (),
        )
        return {"task_id": task_id, "base_sha": task["base_sha"], **outcome.model_dump(mode="json")}

    def resolve(self, prefix: str) -> str:
        bare = prefix.removeprefix("task_")
        if len(bare) >= ID_LENGTH:
            return f"task_{bare}"
        found: set[str] = set()
        cursor: str | None = None
        for _ in range(PAGES_SEARCHED):
            page = self.call("list_tasks", limit=100, cursor=cursor)
            found |= {task["task_id"] for task in page["tasks"] if task["task_id"][5:].startswith(bare)}
            if (cursor := page["next_cursor"]) is None:
                break
        if not found:
            raise errors.TaskNotFound()
        if len(found) > 1:
            raise errors.AmbiguousId()
        return found.pop()

    def close(self) -> None:
        self._http.close()

    def _bundle(self, task_id: str, kind: Literal["input", "result"]) -> bytes | None:
        response = self._send("GET", f"/tasks/{task_id}/bundle", params={"kind": kind})
        return None if response.status_code == 204 else response.content

    def _send(self, method: str, path: str, **arguments: Any) -> httpx2.Response:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx2.HTTPError as error:
            raise errors.ServerUnreachable() from error
        if response.is_success:
            return response
        raise _refusal(response)


def _refusal(response: httpx2.Response) -> errors.CloudAgentError:
    """The server's error as the same class that it raised there."""
    try:
        said = response.json()
        kinds = {kind.code: kind for kind in _all_errors(errors.CloudAgentError)}
        kind = kinds[said["code"]]
        return kind(said["detail"], remedy=said["remedy"], field=said["field"])
    except (ValueError, KeyError, TypeError):
        return errors.ServerUnreachable(
            f"Whatever answers there is no cloudagent server (status {response.status_code})."
        )


def _all_errors(kind: type[errors.CloudAgentError]) -> list[type[errors.CloudAgentError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _all_errors(child))]
