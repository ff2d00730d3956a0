"""What a client asks the person at it, in both eras: an agent's question, and whether to write sensitive files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import anyio
import httpx2
import pytest
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp.types import CallToolResult, ElicitRequestParams, ElicitResult

from cloudagent_mcp.operations import Caller
from cloudagent_mcp.server import mcp_server
from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.errors import TaskNotFound
from cloudagent_storage.records import LOCAL_ACCOUNT, Question, TaskSpec
from cloudagent_storage.store import Store
from tests.integration.test_http_server import KEY, url
from tests.support.git_repos import Workshop, make_repository
from tests.support.stored import ask, claimed, queued, with_result
from tests.support.worlds import World

pytestmark = pytest.mark.anyio
__all__ = ["url"]

EITHER_ERA = pytest.mark.parametrize("mode", ["auto", "legacy"])
Era = Literal["auto", "legacy"]


@dataclass
class Person:
    """Answers forms as they come, and remembers them."""

    says: Callable[[ElicitRequestParams], ElicitResult]
    saw: list[ElicitRequestParams] = field(default_factory=list[ElicitRequestParams])

    async def __call__(self, context: Any, params: ElicitRequestParams) -> ElicitResult:
        self.saw.append(params)
        return self.says(params)

    @property
    def form(self) -> dict[str, Any]:
        """The schema of the only form."""
        (params,) = self.saw
        return cast("Any", params).requested_schema


def accepts(**content: Any) -> Person:
    return Person(lambda _: ElicitResult(action="accept", content=content))


def turns_away(action: Literal["decline", "cancel"]) -> Person:
    # What a client sends along with a refusal is no answer.
    return Person(lambda _: ElicitResult(action=action, content={"answer": "this", "agree": True}))


def structured(result: CallToolResult) -> dict[str, Any]:
    return cast("dict[str, Any]", result.structured_content)


def waiting(store: Store, text: str = "Which one?") -> tuple[str, int]:
    claim = claimed(store)
    ask(store, claim.task.task_id, claim.attempt, text)
    return claim.task.task_id, claim.attempt


def answers(store: Store, task_id: str, attempt: int) -> list[tuple[str | None, str]]:
    return [(message.answers, message.text) for message in store.tasks.signals(task_id, attempt).messages]


@EITHER_ERA
async def test_a_question_reaches_the_person_as_a_form_and_the_answer_the_agent(world: World, mode: Era) -> None:
    app, person = world.app(), accepts(answer="that")
    task_id, attempt = waiting(app.store)
    async with Client(mcp_server(app, remote=False), mode=mode, elicitation_callback=person) as client:
        task = structured(await client.call_tool("get_task", {"task_id": task_id, "wait_seconds": 50}))
    assert (task["status"], task["question"]) == ("running", None)
    assert answers(app.store, task_id, attempt) == [("q_1", "that")]
    assert person.form["properties"]["answer"]["enum"] == ["this", "that"]
    assert "Which one?" in cast("Any", person.saw[0]).message and "Fix the bug" in cast("Any", person.saw[0]).message


@EITHER_ERA
@pytest.mark.parametrize("action", ["decline", "cancel"])
async def test_a_form_that_is_turned_away_answers_nothing_and_is_not_shown_again(
    world: World, mode: Era, action: Literal["decline", "cancel"]
) -> None:
    app, person = world.app(), turns_away(action)
    task_id, attempt = waiting(app.store)
    async with Client(mcp_server(app, remote=False), mode=mode, elicitation_callback=person) as client:
        task = structured(await client.call_tool("get_task", {"task_id": task_id, "wait_seconds": 50}))
        assert len(person.saw) == 1
        assert (task["status"], task["question"]) == ("waiting", "Which one?")
        assert "send_message" in task["next_action"] and "'q_1'" in task["next_action"]
        assert answers(app.store, task_id, attempt) == []
        await client.call_tool("get_task", {"task_id": task_id})
        assert len(person.saw) == 2, "another call asks again"


@EITHER_ERA
async def test_a_client_that_cannot_ask_is_told_how_the_model_answers(world: World, mode: Era) -> None:
    app = world.app()
    task_id, attempt = waiting(app.store)
    async with Client(mcp_server(app, remote=False), mode=mode) as client:
        task = structured(await client.call_tool("get_task", {"task_id": task_id}))
        assert task["asked"]["choices"] == ["this", "that"]
        assert f"send_message(task_id='{task_id}', question_id='q_1'" in task["next_action"]
        pending = structured(await client.call_tool("list_pending_questions", {}))["questions"]
        assert [question["task_id"] for question in pending] == [task_id]
        said = {"task_id": task_id, "question_id": "q_1", "message": "this"}
        for _ in range(2):
            sent = structured(await client.call_tool("send_message", said))
            assert (sent["answered"], sent["status"]) == (True, "running")
        refused = await client.call_tool("send_message", {**said, "message": "that"})
        assert refused.is_error and structured(refused)["code"] == "question_closed"
    assert answers(app.store, task_id, attempt) == [("q_1", "this")]


@EITHER_ERA
async def test_a_question_that_comes_up_during_a_wait_ends_it(world: World, mode: Era) -> None:
    app, person = world.app(), accepts(answer="this")
    store = app.store
    claims = [claimed(store) for _ in range(2)]
    ids = [claim.task.task_id for claim in claims]
    found: list[dict[str, Any]] = []
    async with Client(mcp_server(app, remote=False), mode=mode, elicitation_callback=person) as client:
        async with anyio.create_task_group() as group:

            async def wait() -> None:
                found.append(structured(await client.call_tool("wait_tasks", {"task_ids": ids})))

            group.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            with anyio.fail_after(30):
                await anyio.to_thread.run_sync(ask, store, ids[1], claims[1].attempt, "Now?")
                while not found:
                    await anyio.sleep(0.05)
    assert not found[0]["finished"] and len(person.saw) == 1
    assert answers(store, ids[1], claims[1].attempt) == [("q_1", "this")]


@EITHER_ERA
async def test_an_answer_that_somebody_else_gave_first_stands(world: World, mode: Era) -> None:
    app = world.app()
    task_id, attempt = waiting(app.store)

    def slow(_: ElicitRequestParams) -> ElicitResult:
        app.store.messages.add(LOCAL_ACCOUNT, task_id, "this")
        then = Question(question_id="q_2", text="And now?")
        app.store.tasks.follow(task_id, attempt, [], log_offset=2, lease_s=60, question=then)
        return ElicitResult(action="accept", content={"answer": "that"})

    async with Client(mcp_server(app, remote=False), mode=mode, elicitation_callback=Person(slow)) as client:
        task = structured(await client.call_tool("get_task", {"task_id": task_id}))
    assert (task["status"], task["question"]) == ("waiting", "And now?"), "that is another question"
    assert answers(app.store, task_id, attempt) == [("q_1", "this")]


async def test_what_an_agent_asks_is_shown_without_what_steers_a_terminal(world: World) -> None:
    app, person = world.app(), accepts(answer="this")
    task_id, _ = waiting(app.store, "Red \x1b[31m or \u202eeulb?")
    async with Client(mcp_server(app, remote=False), elicitation_callback=person) as client:
        await client.call_tool("get_task", {"task_id": task_id})
    assert "Red [31m or eulb?" in cast("Any", person.saw[0]).message


async def test_a_state_that_this_server_did_not_seal_is_refused(world: World) -> None:
    app = world.app()
    task_id, attempt = waiting(app.store)
    async with Client(mcp_server(app, remote=False), elicitation_callback=accepts(answer="this")) as client:
        answer = ElicitResult(action="accept", content={"answer": "this"})
        with pytest.raises(MCPError, match="requestState"):
            await client.session.call_tool(
                "get_task",
                {"task_id": task_id},
                input_responses={f"{task_id}.q_1": answer},
                request_state=f'{{"{task_id}.q_1": ["{task_id}", "q_1"]}}',
                allow_input_required=True,
            )
    assert answers(app.store, task_id, attempt) == []


async def test_another_accounts_task_is_no_task_to_the_operations(world: World) -> None:
    app = world.app()
    task_id, attempt = waiting(app.store)
    app.store.accounts.ensure("other")
    for name, arguments in (("send_message", {"message": "this"}), ("get_task", {})):
        with pytest.raises(TaskNotFound):
            await app.operations[name].call(Caller(account_id="other"), {"task_id": task_id, **arguments})
    found = await app.operations["list_pending_questions"].call(Caller(account_id="other"), {})
    assert found.questions == () and answers(app.store, task_id, attempt) == []


@pytest.mark.parametrize(
    ("message", "code"),
    [("", "out_of_range"), (" \n", "invalid_input"), ("a\0", "invalid_character"), ("x" * 20_001, "out_of_range")],
)
async def test_a_message_that_says_nothing_or_too_much_is_refused(world: World, message: str, code: str) -> None:
    app = world.app()
    task_id = queued(app.store)
    async with Client(mcp_server(app, remote=False)) as client:
        refused = await client.call_tool("send_message", {"task_id": task_id, "message": message})
        assert structured(refused)["code"] == code
        kept = structured(await client.call_tool("send_message", {"task_id": task_id, "message": "Use tabs."}))
        assert (kept["status"], kept["answered"]) == ("queued", False)
        await client.call_tool("cancel_task", {"task_id": task_id})
        ended = structured(await client.call_tool("send_message", {"task_id": task_id, "message": "Late."}))
        assert ended["code"] == "task_ended" and "retry_task" in ended["remedy"]


async def test_many_long_questions_are_cut_to_what_a_model_can_read(world: World) -> None:
    app = world.app()
    for _ in range(60):
        waiting(app.store, "Why? " * 700)
    async with Client(mcp_server(app, remote=False)) as client:
        result = await client.call_tool("list_pending_questions", {})
    assert len(cast("Any", result.content[0]).text) <= 30_000
    assert structured(result)["more"] and structured(result)["questions"]


# -- over HTTP --------------------------------------------------------------------------------------------------------


@EITHER_ERA
async def test_over_http_the_modern_era_asks_and_the_older_one_says_how_to_answer(
    url: str, world: World, mode: Era
) -> None:
    store = world.app().store
    task_id, attempt = waiting(store)
    person = accepts(answer="that")
    async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as http:
        transport = streamable_http_client(f"{url}/mcp", http_client=http)
        async with Client(transport, mode=mode, elicitation_callback=person) as client:
            task = structured(await client.call_tool("get_task", {"task_id": task_id}))
    if mode == "auto":
        assert (task["status"], answers(store, task_id, attempt)) == ("running", [("q_1", "that")])
    else:
        assert (task["status"], person.saw) == ("waiting", []) and "send_message" in task["next_action"]


# -- sensitive files --------------------------------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "shop", {"a.txt": "a\n"})


def finished(store: Store, shop: Path, folder: Path, files: dict[str, str]) -> str:
    """A task that has completed with these files, of that repository."""
    result = Workshop(folder, bundle_working_tree(shop, base_ref=None).bundle).result(files)
    return with_result(store, result, TaskSpec(prompt="x", title="x", repository=str(shop)))


SENSITIVE = {"a.txt": "b\n", ".envrc": "touch owned\n", ".vscode/tasks.json": "{}\n", "Makefile": "all:\n"}


@EITHER_ERA
@pytest.mark.parametrize("named", [[], [".envrc", ".vscode/tasks.json"]], ids=["unnamed", "named by the model"])
async def test_sensitive_files_are_written_when_the_person_agrees(
    world: World, shop: Path, tmp_path: Path, mode: Era, named: list[str]
) -> None:
    app, person = world.app(shop), accepts(agree=True)
    task_id = finished(app.store, shop, tmp_path / "workshop", SENSITIVE)
    async with Client(mcp_server(app, remote=False), mode=mode, elicitation_callback=person) as client:
        result = await client.call_tool("apply_task", {"task_id": task_id, "allow_sensitive": named})
    assert structured(result)["outcome"] == "applied", result.content
    assert (shop / ".envrc").read_text() == "touch owned\n"
    message = cast("Any", person.saw[0]).message
    assert len(person.saw) == 1 and ".vscode/tasks.json: an editor may run it" in message and "a.txt" not in message
    needs_consent, others = message.split("You should know of these, too")
    assert ".envrc: runs when a shell enters" in needs_consent and "Makefile: runs with `make`" in others


@EITHER_ERA
@pytest.mark.parametrize("named", [[], [".envrc", ".vscode/tasks.json"]], ids=["unnamed", "named by the model"])
@pytest.mark.parametrize(
    "person",
    [turns_away("decline"), turns_away("cancel"), accepts(agree=False), accepts(), accepts(agree="true")],
    ids=["declined", "cancelled", "not ticked", "empty", "no boolean"],
)
async def test_without_the_persons_consent_nothing_is_written_whatever_the_model_names(
    world: World, shop: Path, tmp_path: Path, mode: Era, person: Person, named: list[str]
) -> None:
    app, person = world.app(shop), Person(person.says)
    task_id = finished(app.store, shop, tmp_path / "workshop", SENSITIVE)
    async with Client(mcp_server(app, remote=False), mode=mode, elicitation_callback=person) as client:
        result = await client.call_tool("apply_task", {"task_id": task_id, "allow_sensitive": named})
    assert result.is_error and structured(result)["code"] == "confirmation_needed"
    assert "ca task apply" in structured(result)["remedy"] and len(person.saw) == 1
    assert structured(result)["outcome"] == "refused"
    assert sorted(path.name for path in shop.iterdir()) == [".git", "a.txt"]
    assert (shop / "a.txt").read_text() == "a\n"


@EITHER_ERA
async def test_where_nobody_can_be_asked_the_refusal_names_the_argument(
    world: World, shop: Path, tmp_path: Path, mode: Era
) -> None:
    app = world.app(shop)
    task_id = finished(app.store, shop, tmp_path / "workshop", SENSITIVE)
    async with Client(mcp_server(app, remote=False), mode=mode) as client:
        refused = structured(await client.call_tool("apply_task", {"task_id": task_id}))
        assert refused["code"] == "confirmation_needed" and "allow_sensitive" in refused["remedy"]
        named = {"task_id": task_id, "allow_sensitive": [".envrc", ".vscode/tasks.json"]}
        assert structured(await client.call_tool("apply_task", named))["outcome"] == "applied"


@EITHER_ERA
async def test_nobody_is_asked_about_ordinary_files_or_a_dry_run(
    world: World, shop: Path, tmp_path: Path, mode: Era
) -> None:
    app, person = world.app(shop), accepts(agree=True)
    ordinary = finished(app.store, shop, tmp_path / "workshop", {"a.txt": "b\n"})
    sensitive = finished(app.store, shop, tmp_path / "other", SENSITIVE)
    async with Client(mcp_server(app, remote=False), mode=mode, elicitation_callback=person) as client:
        dry = structured(await client.call_tool("apply_task", {"task_id": sensitive, "dry_run": True}))
        assert dry["outcome"] == "would_apply" and ".envrc" in dry["message"]
        assert structured(await client.call_tool("apply_task", {"task_id": ordinary}))["outcome"] == "applied"
    assert person.saw == []


# -- secrets ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_secrets(shop: Path) -> Path:
    for name in (".env", "deploy.key"):
        (shop / name).write_text("canary\n")
    return shop


@EITHER_ERA
@pytest.mark.parametrize("named", [[], [".env", "deploy.key"]], ids=["unnamed", "named by the model"])
async def test_what_looks_like_a_secret_goes_along_when_the_person_agrees_and_not_because_the_model_says_so(
    world: World, with_secrets: Path, mode: Era, named: list[str]
) -> None:
    app, person = world.app(with_secrets), accepts(agree=True)
    asked = {"prompt": "x", "allow_secrets": named}
    async with Client(mcp_server(app, remote=False), mode=mode, elicitation_callback=person) as client:
        task = structured(await client.call_tool("submit_task", asked))
    (shown,) = person.saw
    assert ".env" in cast("Any", shown).message and "deploy.key" in cast("Any", shown).message
    bundle = app.store.blobs.get(LOCAL_ACCOUNT, task["task_id"], "input")
    assert bundle is not None
    assert {".env", "deploy.key"} <= {
        path.name for path in Workshop(with_secrets.parent / "w", bundle).folder.iterdir()
    }
    refuses = turns_away("decline")
    async with Client(mcp_server(app, remote=False), mode=mode, elicitation_callback=refuses) as client:
        refused = structured(await client.call_tool("submit_task", asked))
    assert refused["code"] == "secrets_found" and ".gitignore" in refused["remedy"] and len(refuses.saw) == 1
    assert app.store.tasks.list(LOCAL_ACCOUNT).total == 1
