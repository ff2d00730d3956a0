"""`ca mcp` with CLOUDAGENT_URL: a server's tools over stdio, with what is local done here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import anyio
import pytest
import uvicorn
from mcp import Client
from mcp.types import ResourceTemplateReference, TextContent, TextResourceContents
from pydantic import create_model
from starlette.routing import Route

from cloudagent_mcp import __version__
from cloudagent_mcp.app import App
from cloudagent_mcp.bridge import Bridge
from cloudagent_mcp.doctor import Finding, examine
from cloudagent_mcp.operations import Caller
from cloudagent_mcp.server import http_app, mcp_server
from cloudagent_mcp.settings import Settings
from cloudagent_storage.errors import CloudAgentError
from cloudagent_storage.records import bound_for_git
from tests.support.elsewhere import ADMIN, call, refusal, stdio, structured
from tests.support.worlds import World, git

pytestmark = pytest.mark.anyio

ADDRESS = "https://github.com/you/project.git"


async def test_the_bridge_offers_what_a_local_server_offers_and_keeps_no_database(
    user: dict[str, str], world: World, repo: Path
) -> None:
    async with stdio(user, repo) as bridge, Client(mcp_server(world.app(repo), remote=False)) as local:
        for there, here in (
            ((await bridge.list_tools()).tools, (await local.list_tools()).tools),
            ((await bridge.list_prompts()).prompts, (await local.list_prompts()).prompts),
        ):
            assert [item.model_dump() for item in there] == [item.model_dump() for item in here]
        assert bridge.instructions == local.instructions
        await bridge.call_tool("list_tasks", {})
    assert not list(Path(user["CLOUDAGENT_HOME"]).glob("*.db"))


async def test_a_task_is_the_servers_and_its_accounts_alone(user: dict[str, str], world: World, repo: Path) -> None:
    async with stdio(user, repo) as client:
        task = structured(await client.call_tool("submit_task", {"prompt": "x", "repository": "none", "tags": ["a"]}))
        seen = structured(await client.call_tool("get_task", {"task_id": task["task_id"]}))
        assert (seen["status"], seen["tags"], seen["queue"]["position"]) == ("queued", ["a"], 1)
        log = (await client.call_tool("get_task_logs", {"task_id": task["task_id"]})).content[0]
        assert isinstance(log, TextContent) and "Queued." in log.text and "untrusted output" in log.text
        asked = {"name": "n", "cron": "0 3 * * *", "task": {"prompt": "x", "repository": "none"}}
        schedule = structured(await client.call_tool("create_schedule", asked))
        changed = {"schedule_id": schedule["schedule_id"], "enabled": False, "task": {"title": "T"}}
        assert structured(await client.call_tool("update_schedule", changed))["task"]["title"] == "T"
        assert structured(await client.call_tool("delete_schedule", {"schedule_id": schedule["schedule_id"]}))
        assert refusal(await client.call_tool("get_queue", {}))["code"] == "forbidden"
        assert structured(await client.call_tool("cancel_task", {"task_id": task["task_id"]}))["changed"]
        assert structured(await client.call_tool("list_tasks", {}))["total"] == 1
    async with Client(mcp_server(world.app(repo), remote=False)) as operator:
        assert structured(await operator.call_tool("list_tasks", {}))["total"] == 0
    async with stdio({**user, "CLOUDAGENT_API_KEY": ADMIN}, repo) as operator:
        assert refusal(await operator.call_tool("get_task", {"task_id": task["task_id"]}))["code"] == "task_not_found"


async def test_a_task_that_goes_on_from_another_is_not_given_the_folders_repository(
    user: dict[str, str], repo: Path
) -> None:
    (repo / "notes.txt").write_text("not pushed\n")  # for which a task of this folder's would be refused
    async with stdio(user, repo) as client:
        task = structured(await client.call_tool("submit_task", {"prompt": "x", "repository": "none"}))
        follow_up = {"prompt": "y", "continue_task_id": task["task_id"]}
        assert refusal(await client.call_tool("submit_task", follow_up))["code"] == "not_ready"
        assert structured(await client.call_tool("cancel_task", {"task_id": task["task_id"]}))["changed"]
        assert refusal(await client.call_tool("submit_task", follow_up))["code"] == "no_session"


async def test_a_task_is_delegated_read_as_a_resource_completed_and_not_followed(
    user: dict[str, str], world: World, repo: Path
) -> None:
    async with stdio(user, repo) as client:
        tasks: list[dict[str, Any]] = []
        async with anyio.create_task_group() as group:
            group.start_soon(client.call_tool, "delegate", {"prompt": "Mend it", "repository": "none"})
            with anyio.fail_after(30):
                while not (tasks := structured(await client.call_tool("list_tasks", {}))["tasks"]):
                    await anyio.sleep(0.05)
            group.cancel_scope.cancel()  # no worker takes it: the call is cut, and the task stays
        task_id = tasks[0]["task_id"]
        uri = f"task://{task_id}"
        (content,) = (await client.read_resource(uri)).contents
        assert isinstance(content, TextResourceContents) and json.loads(content.text)["task_id"] == task_id
        reference = ResourceTemplateReference(uri="task://{task_id}")
        completed = await client.complete(reference, {"name": "task_id", "value": task_id[:9]})
        assert task_id in completed.completion.values
        async with client.listen(resource_subscriptions=[uri]) as subscription:
            assert not subscription.honored.resource_subscriptions


async def test_bad_input_is_refused_here_in_the_same_words(user: dict[str, str], world: World, repo: Path) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("submit_task", {"promt": "x"}),
        ("submit_task", {"prompt": 5}),
        ("submit_task", {"prompt": "", "repository": "none"}),
        ("submit_task", {"prompt": "x", "repository": "ext::sh -c id"}),
        ("submit_task", {"prompt": "x", "repository": "https://me:secret@example.com/x.git"}),
        ("submit_task", {"prompt": "x", "repository": "no/such/folder"}),
        ("submit_task", {"prompt": "x", "repository": "https://example.com/x", "base_ref": "-x"}),
        ("get_task", {"task_id": "../../health"}),
        ("get_task", {"task_id": "a?b=c#d"}),
        ("get_task", {"task_id": ""}),
        ("get_task", {"task_id": "task_x", "wait_seconds": 51}),
        ("get_task", {"task_id": "task_x", "wait_seconds": 50}),
        ("wait_tasks", {"task_ids": ["task_x"]}),
        ("get_schedule", {"schedule_id": "x/../y"}),
        ("create_schedule", {"name": "n", "cron": "0 3 * * *", "task": {"prompt": "x", "repository": "ext::x"}}),
        ("create_schedule", {"name": "n", "cron": "0 3 * * *", "task": {"promt": "x", "repository": "none"}}),
        ("create_schedule", {"name": "n", "cron": "never", "task": {"prompt": "x", "repository": "none"}}),
    ]
    async with stdio(user, repo) as bridge, Client(mcp_server(world.app(repo), remote=False)) as local:
        for name, arguments in cases:
            there, here = await bridge.call_tool(name, arguments), await local.call_tool(name, arguments)
            assert refusal(there) == refusal(here), (name, arguments)


async def test_a_wait_ends_with_the_change_tells_how_it_goes_and_can_be_given_up(
    user: dict[str, str], repo: Path
) -> None:
    told: list[tuple[float, float | None, str | None]] = []

    async def progress(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, total, message))

    async with stdio(user, repo) as client:
        asked = {"prompt": "x", "repository": "none", "title": "A long one"}
        ids = [structured(await client.call_tool("submit_task", asked))["task_id"] for _ in range(2)]
        with anyio.move_on_after(1.0) as given_up:
            await client.call_tool("get_task", {"task_id": ids[0], "wait_seconds": 50})
        assert given_up.cancelled_caught
        assert structured(await client.call_tool("get_task", {"task_id": ids[0]}))["status"] == "queued"
        found: dict[str, Any] = {}

        async def wait(name: str, arguments: dict[str, Any]) -> None:
            found[name] = structured(await client.call_tool(name, arguments, progress_callback=progress))

        with anyio.fail_after(45):
            async with anyio.create_task_group() as group:
                group.start_soon(wait, "get_task", {"task_id": ids[0], "wait_seconds": 50})
                group.start_soon(wait, "wait_tasks", {"task_ids": ids, "timeout_seconds": 50})
                while len(told) < 2:
                    await anyio.sleep(0.05)
                for task_id in ids:
                    await client.call_tool("cancel_task", {"task_id": task_id})
        assert found["get_task"]["status"] == "cancelled" and found["wait_tasks"]["finished"]
    assert all(total == 50 and done <= 50 and "A long one: queued" in (text or "") for done, total, text in told)


async def test_a_wait_that_nothing_ends_is_over_in_time(
    user: dict[str, str], repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudagent_mcp.bridge.STEP_S", 0.3)
    bridge = Bridge(Settings.read(user))
    task = await call(bridge, "submit_task", repo, prompt="x", repository="none")
    started = time.monotonic()
    found = await call(bridge, "get_task", repo, task_id=task.task_id, wait_seconds=1)
    assert found.status == "queued" and time.monotonic() - started >= 1
    started = time.monotonic()
    waited = await call(bridge, "wait_tasks", repo, task_ids=[task.task_id], timeout_seconds=1)
    assert not waited.finished and time.monotonic() - started >= 1
    await bridge.server.close()


# -- the repository here --------------------------------------------------------------------------------------------


@pytest.fixture
def pushed(repo: Path) -> Path:
    """A repository whose one commit is, as far as is known here, on GitHub."""
    git(repo, "remote", "add", "origin", ADDRESS)
    git(repo, "update-ref", "refs/remotes/origin/main", "HEAD")
    return repo


async def submitted(user: dict[str, str], folder: Path, **arguments: Any) -> Any:
    bridge = Bridge(Settings.read(user))
    try:
        task = await call(bridge, "submit_task", folder, prompt="x", **arguments)
        return task.repository, task.base_ref
    finally:
        await bridge.server.close()


async def test_a_folder_becomes_the_address_and_the_commit_that_the_server_can_fetch(
    user: dict[str, str], pushed: Path, tmp_path: Path
) -> None:
    head = git(pushed, "rev-parse", "HEAD")
    (pushed / "ignored.log").write_text("x")
    (pushed / ".env").write_text("PASSWORD=x")  # stays at home on this machine, too
    (pushed / "deep").mkdir()
    for folder, arguments in (
        (pushed, {}),
        (pushed / "deep", {}),
        (tmp_path, {"repository": str(pushed)}),
        (tmp_path, {"repository": "repo"}),
        (pushed, {"base_ref": "main"}),
        (pushed, {"base_ref": head[:10]}),
    ):
        assert await submitted(user, folder, **arguments) == (ADDRESS, head), (folder, arguments)
    assert await submitted(user, pushed, base_ref="only-there") == (ADDRESS, "only-there")
    assert await submitted(user, pushed, repository="none") == ("none", None)
    assert await submitted(user, tmp_path) == ("none", None)
    other = "https://github.com/you/other.git"
    assert await submitted(user, pushed, repository=other, base_ref="v1") == (other, "v1")


async def test_what_is_here_alone_is_uploaded_but_for_a_schedule(user: dict[str, str], pushed: Path) -> None:
    base = git(pushed, "rev-parse", "HEAD")
    (pushed / "calc.py").write_text("changed\n")
    place, base_ref = await submitted(user, pushed)
    assert place.startswith("upload:upl_") and base_ref is None
    asked = {"name": "n", "cron": "0 3 * * *", "task": {"prompt": "x"}}
    for change, said in (
        (lambda: None, "1 file is not committed"),
        (lambda: (pushed / "new.py").write_text("new\n"), "2 files are not committed"),
        (lambda: git(pushed, "add", "-A"), "2 files are not committed"),
        (lambda: git(pushed, "commit", "-q", "-m", "second"), "not pushed to origin"),
    ):
        change()
        bridge = Bridge(Settings.read(user))
        with pytest.raises(CloudAgentError, match=said) as caught:
            await call(bridge, "create_schedule", pushed, **asked)
        assert (caught.value.code, caught.value.field) == ("repository_not_pushed", "task.repository")
        assert "base_ref" in caught.value.remedy or "Push it" in caught.value.remedy
        await bridge.server.close()
    assert (await submitted(user, pushed))[0].startswith("upload:upl_")
    assert (await submitted(user, pushed, base_ref="main"))[0].startswith("upload:upl_")
    assert await submitted(user, pushed, base_ref=base) == (ADDRESS, base)


@pytest.mark.parametrize(
    ("origin", "address"),
    [
        ("git@github.com:you/project.git", "git@github.com:you/project.git"),
        ("ssh://git@github.com/you/project.git", "ssh://git@github.com/you/project.git"),
        ("https://me:ghp_secret@github.com/you/project.git", ADDRESS),
        ("https://me@github.com/you/project.git", ADDRESS),
        ("http://me:ghp_secret@github.com/you/project.git", None),
        ("/srv/git/project.git", None),
        ("file:///srv/git/project.git", None),
        ("ext::sh -c id", None),
        ("https://git.internal/x.git", None),
        ("", None),
    ],
)
async def test_the_servers_address_of_the_repository_is_origins_without_a_password(
    user: dict[str, str], repo: Path, origin: str, address: str | None
) -> None:
    if origin:
        git(repo, "remote", "add", "origin", origin)
    git(repo, "update-ref", "refs/remotes/origin/main", "HEAD")
    if address is not None:
        assert await submitted(user, repo) == (address, git(repo, "rev-parse", "HEAD"))
        return
    # There is none that a server could use: it is uploaded.
    assert (await submitted(user, repo))[0].startswith("upload:upl_")


# -- credentials ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "agents", "gits"),
    [
        ([], "sk-the-servers", None),
        (["--send-credentials"], "sk-the-users-own", {"github.com": "ghp_the-users-own"}),
    ],
)
async def test_credentials_go_to_the_server_only_if_its_user_asked_for_it(
    user: dict[str, str], world: World, repo: Path, options: list[str], agents: str, gits: dict[str, str] | None
) -> None:
    async with stdio(user, repo, *options) as client:
        task = structured(await client.call_tool("submit_task", {"prompt": "x", "repository": "none"}))
        asked = {"name": "n", "cron": "0 3 * * *", "task": {"prompt": "x", "repository": "none"}}
        assert structured(await client.call_tool("create_schedule", asked))["name"] == "n"
        own = {"prompt": "x", "repository": "none", "anthropic_api_key": "sk-of-the-task"}
        second = structured(await client.call_tool("submit_task", own))
    app = world.app()

    def sealed(task_id: str) -> tuple[Any, Any]:
        claim = app.store.tasks.claim(task_id, worker="w", lease_s=60)
        assert claim is not None and claim.credentials is not None
        opened = json.loads(app.settings.keyring.open(claim.credentials, bound_to=task_id))
        if claim.git_credentials is None:
            return opened, None
        return opened, json.loads(app.settings.keyring.open(claim.git_credentials, bound_to=bound_for_git(task_id)))

    assert sealed(task["task_id"]) == ({"ANTHROPIC_API_KEY": agents}, gits)
    assert sealed(second["task_id"]) == ({"ANTHROPIC_API_KEY": "sk-of-the-task"}, gits)


async def test_a_wrong_key_is_told_as_what_it_is(user: dict[str, str], repo: Path) -> None:
    for given, said in (("cag_wrong-canary", "does not take the key"), (None, "is not set")):
        environment = {name: value for name, value in user.items() if name != "CLOUDAGENT_API_KEY"}
        if given is not None:
            environment["CLOUDAGENT_API_KEY"] = given
        bridge = Bridge(Settings.read(environment))
        with pytest.raises(CloudAgentError, match=said) as caught:
            await call(bridge, "list_tasks", repo)
        await bridge.server.close()
        assert caught.value.code == "unauthorized" and "CLOUDAGENT_API_KEY" in caught.value.message
        assert "canary" not in caught.value.message + caught.value.remedy


async def test_an_address_may_be_pasted_as_it_was_printed(user: dict[str, str], repo: Path) -> None:
    for ending in ("/", "/mcp", "/mcp/", "/api/v1"):
        bridge = Bridge(Settings.read({**user, "CLOUDAGENT_URL": user["CLOUDAGENT_URL"] + ending}))
        assert (await call(bridge, "list_tasks", repo)).total == 0
        await bridge.server.close()


class OlderApp(App):
    """A server of a version that could less."""

    def ensure_worker(self) -> None: ...


@contextlib.contextmanager
def older_server(world: World, *, without: str, argument: str) -> Generator[str]:
    """A server without an operation, and with one whose submit does not know an argument."""
    app = OlderApp(world.settings)
    operations, submit_task = app.operations, app.tasks.submit_task
    del operations[without]
    known = operations["submit_task"].arguments
    fields: Any = {n: (f.annotation, f) for n, f in known.model_fields.items() if n != argument}

    def submit(caller: Caller, **given: Any) -> Any:
        return submit_task(caller, **given, **{argument: []})

    operations["submit_task"] = dataclasses.replace(
        operations["submit_task"],
        arguments=create_model("older", __config__=known.model_config, **fields),
        call_checked=submit,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(http_app(app, key=ADMIN, host="127.0.0.1", port=port), log_config=None, lifespan="on")
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(15)
            app.close()


async def test_an_older_server_is_told_from_a_wrong_call(world: World, tmp_path: Path) -> None:
    with older_server(world, without="retry_task", argument="egress") as url:
        user = {"CLOUDAGENT_URL": url, "CLOUDAGENT_API_KEY": ADMIN, "CLOUDAGENT_HOME": str(tmp_path / "user")}
        bridge = Bridge(Settings.read(user))
        task = await call(bridge, "submit_task", tmp_path, prompt="x", repository="none", tags=["a"])
        assert task.tags == ("a",)  # what it knows works, also where this version has more to say
        with pytest.raises(CloudAgentError) as caught:
            await call(bridge, "submit_task", tmp_path, prompt="x", repository="none", egress=["example.com"])
        assert (caught.value.code, caught.value.field) == ("server_outdated", "egress")
        assert "egress of submit_task" in caught.value.message
        with pytest.raises(CloudAgentError) as caught:
            await call(bridge, "retry_task", tmp_path, task_id=task.task_id)
        assert caught.value.code == "server_outdated" and "does not know retry_task" in caught.value.message
        with pytest.raises(CloudAgentError) as caught:
            await call(bridge, "get_task", tmp_path, task_id="task_" + "a" * 26)
        assert caught.value.code == "task_not_found"
        await bridge.server.close()


# -- ca doctor --------------------------------------------------------------------------------------------------------


def findings(user: dict[str, str], **changes: str) -> dict[str, Finding]:
    return {found.name: found for found in examine(Settings.read({**user, **changes}))}


async def test_the_doctor_of_a_client_looks_at_its_server(user: dict[str, str]) -> None:
    found = findings(user)
    assert all(finding.ok for finding in found.values()), found
    assert list(found) == ["data folder", "git", "server", "key", "prompts"]
    assert f"version {__version__}" in found["server"].message and user["CLOUDAGENT_URL"] in found["server"].message
    found = findings(user, CLOUDAGENT_API_KEY="wrong")
    assert found["server"].ok and not found["key"].ok and "CLOUDAGENT_API_KEY" in found["key"].message
    found = findings(user, CLOUDAGENT_URL="http://127.0.0.1:1")
    assert not found["server"].ok and not found["key"].ok and "CLOUDAGENT_URL" in (found["server"].remedy or "")


async def test_a_server_that_takes_no_uploads_is_told_what_would_be_lost(
    world: World, pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_routes(*_: object) -> list[Route]:
        return []

    monkeypatch.setattr("cloudagent_mcp.server.upload_routes", no_routes)
    with older_server(world, without="retry_task", argument="egress") as url:
        user = {"CLOUDAGENT_URL": url, "CLOUDAGENT_API_KEY": ADMIN, "CLOUDAGENT_HOME": str(tmp_path / "user")}
        assert (await submitted(user, pushed))[0] == ADDRESS
        (pushed / "calc.py").write_text("changed\n")
        with pytest.raises(CloudAgentError, match="1 file is not committed") as caught:
            await submitted(user, pushed)
        assert caught.value.code == "repository_not_pushed" and "takes no uploads" in caught.value.remedy
