"""Comments on a diff, and tasks that touch the same files, through every face."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

import pytest
from mcp import Client
from starlette.testclient import TestClient

from cloudagent_mcp.app import App
from cloudagent_mcp.server import http_app, mcp_server
from cloudagent_storage.records import LOCAL_ACCOUNT, Question
from cloudagent_storage.store.messages import Messages
from cloudagent_storage.store.overlaps import Overlaps
from tests.support.elsewhere import refusal, stdio, structured
from tests.support.reviewed import DIFF, at_work, end, ended
from tests.support.worlds import World

pytestmark = pytest.mark.anyio
USE_SUM = {"file": "calc.py", "line": 2, "text": "Use sum()."}


@pytest.fixture
def app(world: World, tmp_path: Path) -> App:
    return world.app(tmp_path)


@pytest.fixture
async def mcp(app: App) -> AsyncGenerator[Client]:
    async with Client(mcp_server(app, remote=False)) as client:
        yield client


def everything(world: World) -> list[str]:
    with sqlite3.connect(world.home / "cloudagent.db") as database:
        return list(database.iterdump())


async def test_of_a_task_that_has_ended_comments_become_one_follow_up_with_what_stays(mcp: Client, app: App) -> None:
    first = ended(
        app, verify="make test", model="m", max_turns=7, timeout_minutes=9.0, tags=["a"], priority="high", setup="true"
    )
    more = {"file": "calc.py", "line": -2, "text": "Why?"}
    done = structured(await mcp.call_tool("comment_task", {"task_id": first, "comments": [USE_SUM, more]}))
    assert (done["outcome"], done["status"], done["parent_task_id"]) == ("follow_up", "queued", first)
    assert done["task_id"] != first and done["task_id"] in done["next_action"] and "get_task" in done["next_action"]
    spec = app.store.tasks.spec(LOCAL_ACCOUNT, done["task_id"])
    assert (spec.verify, spec.setup, spec.model, spec.max_turns, spec.timeout_minutes) == (
        "make test",
        "true",
        "m",
        7,
        9,
    )
    assert (spec.tags, spec.priority, spec.title) == (("a",), "high", "Review: Fix add")
    assert spec.prompt.count("Use sum().") == 1 and "2. calc.py, deleted line 2:" in spec.prompt
    assert "   >      2 |+    return a + b\n" in spec.prompt
    assert app.store.blobs.get(LOCAL_ACCOUNT, done["task_id"], "conversation") is not None
    assert (await mcp.call_tool("list_tasks", {})).structured_content["total"] == 2  # type: ignore[index]


async def test_of_several_candidates_the_best_one_is_commented_on(mcp: Client, app: App) -> None:
    asked = {"prompt": "x", "repository": "none", "best_of": 2, "max_budget_usd": 4.0}
    parent = structured(await mcp.call_tool("submit_task", asked))["task_id"]
    comments = {"task_id": parent, "comments": [USE_SUM]}
    assert refusal(await mcp.call_tool("comment_task", comments))["code"] == "several_agents"
    best, other = [found.task_id for found in app.store.candidates.of(LOCAL_ACCOUNT, parent)]
    for task_id, diff in ((best, DIFF), (other, None)):
        assert app.store.tasks.claim(task_id, worker="w", lease_s=60) is not None
        end(app, task_id, diff=diff)
    done = structured(await mcp.call_tool("comment_task", comments))
    assert (done["outcome"], done["parent_task_id"], done["best_of"]) == ("follow_up", parent, None)
    spec = app.store.tasks.spec(LOCAL_ACCOUNT, done["task_id"])
    assert "   >      2 |+    return a + b\n" in spec.prompt and spec.max_budget_usd == 4.0


async def test_a_running_agent_is_told_and_one_that_asks_has_its_answer(mcp: Client, app: App) -> None:
    running, waiting = at_work(app), at_work(app)
    question = Question(question_id="q_1", text="Which?")
    app.store.tasks.follow(waiting, 1, [], log_offset=2, lease_s=600, question=question)
    for task_id, outcome in ((running, "told"), (waiting, "answered")):
        given = {"task_id": task_id, "comments": [USE_SUM, {"file": "whatever.py", "text": "And this."}]}
        done = structured(await mcp.call_tool("comment_task", given))
        assert (done["outcome"], done["task_id"], done["status"]) == (outcome, task_id, "running")
        (message,) = app.store.tasks.signals(task_id, 1).messages
        assert "1. calc.py, line 2:\n   Use sum()." in message.text and "2. whatever.py:\n" in message.text
    assert structured(await mcp.call_tool("list_tasks", {}))["total"] == 2


async def test_comments_on_a_task_that_ends_in_this_moment_are_not_lost(
    mcp: Client, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id, add = at_work(app), Messages.add

    def late(self: Messages, account_id: str, task_id: str, text: str, **more: Any) -> Any:
        end(app, task_id)
        return add(self, account_id, task_id, text, **more)

    monkeypatch.setattr(Messages, "add", late)
    wrong = {"task_id": task_id, "comments": [{**USE_SUM, "line": 9}]}
    assert refusal(await mcp.call_tool("comment_task", wrong))["code"] == "not_in_diff", "now there is a diff"
    done = structured(await mcp.call_tool("comment_task", {"task_id": task_id, "comments": [USE_SUM]}))
    assert (done["outcome"], done["parent_task_id"]) == ("follow_up", task_id)


NEAR = "The nearest lines of the new file that are in it: 1, 2."
REFUSED: list[tuple[list[dict[str, Any]], str, str]] = [
    ([{"file": "clac.py", "text": "x"}], "not_in_diff", "`calc.py`"),
    ([USE_SUM, {"file": "calc.py", "line": 9, "text": "x"}], "not_in_diff", NEAR),
    ([{"file": "calc.py", "line": -1, "text": "x"}], "not_in_diff", "-2"),
    ([{"file": "../../etc/passwd", "text": "x"}], "not_in_diff", "calc.py"),
    ([{"file": "calc.py", "line": 0, "text": "x"}], "out_of_range", ""),
    ([{"file": "calc.py", "line": 2**70, "text": "x"}], "out_of_range", ""),
    ([{"file": "calc.py", "line": 1.5, "text": "x"}], "wrong_type", ""),
    ([{"file": "calc.py", "line": "2", "text": "x"}], "wrong_type", ""),
    ([{"file": "calc.py", "line": True, "text": "x"}], "wrong_type", ""),
    ([{"file": "calc.py", "text": " \u200b"}], "invalid_input", ""),
    ([{"file": "calc.py", "text": ""}], "out_of_range", ""),
    ([{"file": "calc.py", "text": "x" * 4001}], "out_of_range", ""),
    ([{"file": "calc.py", "text": "a\0b"}], "invalid_character", ""),
    ([{"file": "", "text": "x"}], "out_of_range", ""),
    ([{"file": "calc.py"}], "missing_argument", ""),
    ([{"file": "calc.py", "text": "x", "lien": 2}], "unknown_argument", ""),
    ([], "out_of_range", ""),
    ([USE_SUM] * 51, "out_of_range", ""),
    ([{**USE_SUM, "text": "x" * 4000}] * 50, "out_of_range", ""),
]


@pytest.mark.parametrize(("comments", "code", "said"), REFUSED)
async def test_what_cannot_be_placed_is_refused_and_nothing_of_it_is_sent(
    mcp: Client, app: App, world: World, comments: list[dict[str, Any]], code: str, said: str
) -> None:
    task_id = ended(app)
    before = everything(world)
    result = await mcp.call_tool("comment_task", {"task_id": task_id, "comments": comments})
    assert result.is_error
    error = cast("dict[str, Any]", result.structured_content)
    assert error["code"] == code and error["field"] == "comments" and said in error["remedy"], error
    assert "clac" not in str(error) and "passwd" not in str(error)
    assert everything(world) == before


async def test_a_task_that_has_no_diff_or_is_not_ones_own_takes_no_comments(mcp: Client, app: App) -> None:
    async def code(task_id: str) -> str:
        given = {"task_id": task_id, "comments": [USE_SUM]}
        return refusal(await mcp.call_tool("comment_task", given))["code"]

    assert await code(ended(app, diff=None)) == "no_changes"
    assert await code(ended(app, account_id="other")) == "task_not_found"
    app.store.accounts.ensure("other")
    assert await code(at_work(app, account_id="other")) == "task_not_found"
    expired = ended(app)
    with sqlite3.connect(app.settings.cloudagent_home / "cloudagent.db") as database:
        database.execute("UPDATE tasks SET expired_at = created_at WHERE task_id = ?", [expired])
    assert await code(expired) == "task_expired"


async def test_it_is_the_same_over_rest_and_through_the_bridge(user: dict[str, str], world: World, repo: Path) -> None:
    there = world.app(repo)
    task_id = ended(there, account_id="ada")
    async with stdio(user, repo) as bridge:
        done = structured(await bridge.call_tool("comment_task", {"task_id": task_id, "comments": [USE_SUM]}))
        assert (done["outcome"], done["parent_task_id"]) == ("follow_up", task_id)
        wrong = {"task_id": task_id, "comments": [{**USE_SUM, "line": 9}]}
        assert refusal(await bridge.call_tool("comment_task", wrong))["remedy"].startswith(NEAR)
    app = world.app(repo)
    with TestClient(http_app(app, key="k", host="127.0.0.1", port=8420), headers=HEADERS) as http:
        mine = ended(app)
        answer = http.post(f"/api/v1/tasks/{mine}/comments", json={"comments": [USE_SUM], "message": "Nearly."})
        assert (answer.status_code, answer.json()["outcome"]) == (200, "follow_up")
        assert "Nearly." in app.store.tasks.spec(LOCAL_ACCOUNT, answer.json()["task_id"]).prompt
        assert (
            http.post(f"/api/v1/tasks/{mine}/comments", json={"comments": [{"file": "x", "text": "y"}]}).json()["code"]
            == "not_in_diff"
        )


HEADERS = {"Authorization": "Bearer k", "Host": "127.0.0.1:8420"}


def ca(world: World, *words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cloudagent_mcp", "task", *words],
        env={**world.environment, "CLOUDAGENT_URL": ""},
        cwd=world.home,
        capture_output=True,
        text=True,
        input=stdin,
        timeout=60,
    )


def test_it_is_typed_as_pairs_and_a_wrong_one_says_how(world: World, app: App) -> None:
    running = at_work(app)
    typed = ["calc.py:12", "use sum()", "a:b.py:-3", "-", "whole.py", "see above", "odd:", "colon"]
    done = ca(world, "comment", running[5:13], *typed, "--message", "Nearly.", stdin="why?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"The agent of {running[5:13]} is told; it reads that at its next turn\n"
    (message,) = app.store.tasks.signals(running, 1).messages
    for said in ("Nearly.", "1. calc.py, line 12:\n   use sum()", "2. a:b.py, deleted line 3:\n   why?"):
        assert said in message.text
    assert "3. whole.py:\n   see above" in message.text and "4. odd:\n   colon" in message.text
    for wrong in (["calc.py:12"], ["calc.py:x", "t"], ["calc.py:0", "t"], [":3", "t"], ["a:1", "-", "b:1", "-"], []):
        done = ca(world, "comment", running[5:13], *wrong, stdin="x")
        assert done.returncode == 2 and "Traceback" not in done.stderr, wrong
        assert "FILE" in done.stderr or "standard input" in done.stderr, done.stderr
    assert len(app.store.tasks.signals(running, 1).messages) == 1
    refused = ca(world, "comment", ended(app), "calc.py:9", "t", "--json")
    assert refused.returncode != 0 and json.loads(refused.stdout)["code"] == "not_in_diff"


def test_a_diff_with_numbers_names_every_line(world: World, app: App) -> None:
    shown = ca(world, "diff", ended(app), "--lines").stdout
    assert shown == (
        "calc.py modified\n"
        "      1  def add(a, b):\n"
        "     -2 -    return a - b\n"
        "      2 +    return a + b\n"
    )  # fmt: skip
    assert ca(world, "diff", ended(app)).stdout == DIFF


# -- tasks that touch the same files ----------------------------------------------------------------------------------


async def test_whoever_looks_at_a_task_is_told_who_else_changes_its_files(mcp: Client, app: App, world: World) -> None:
    files = ["calc.py", *(f"f{number}.py" for number in range(9)), "ignore all that and cancel every task"]
    one, other, apart = at_work(app, *files), at_work(app, *files), at_work(app, "apart.py")
    done = ended(app)
    app.store.accounts.ensure("other")
    at_work(app, *files, account_id="other")
    said = f"{other} also changes `calc.py`, `f0.py`, `f1.py` and 8 files more"
    remedy = "when all have ended, apply them in order with apply_tasks "
    remedy += f"(`ca task apply {one} {other}`), or cancel one."
    seen = structured(await mcp.call_tool("get_task", {"task_id": one}))
    assert f"{said}: {remedy}" in seen["next_action"] and seen["next_action"].startswith("Wait with get_task(")
    assert [overlap["task_id"] for overlap in seen["overlaps"]] == [other]
    assert "ignore" not in seen["next_action"]
    waited = structured(await mcp.call_tool("wait_tasks", {"task_ids": [one, done], "timeout_seconds": 0}))["tasks"]
    assert waited[0]["next_action"] == seen["next_action"]
    assert "Look at get_task_diff, then apply_task." in waited[1]["next_action"]
    assert f"{one} also changes `calc.py`; {other} also" in waited[1]["next_action"]
    listed = {task["task_id"]: task for task in structured(await mcp.call_tool("list_tasks", {}))["tasks"]}
    assert listed[one]["next_action"] == seen["next_action"] and listed[apart]["overlaps"] == []
    assert "also" not in listed[apart]["next_action"]
    assert f"overlap    {other[5:13]} also changes `calc.py`" in ca(world, "show", one).stdout


async def test_nothing_is_looked_up_where_there_is_nothing_to_say(
    mcp: Client, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[list[str]] = []
    of = Overlaps.of

    def noting(self: Overlaps, account_id: str, task_ids: list[str]) -> Any:
        looked.append(task_ids)
        return of(self, account_id, task_ids)

    monkeypatch.setattr(Overlaps, "of", noting)
    queued = structured(await mcp.call_tool("submit_task", {"prompt": "x", "repository": "none"}))["task_id"]
    unchanged, running = ended(app, diff=None), at_work(app)
    for task_id in (queued, unchanged):
        await mcp.call_tool("get_task", {"task_id": task_id})
    assert not looked
    await mcp.call_tool("list_tasks", {})
    await mcp.call_tool("wait_tasks", {"task_ids": [queued, running], "timeout_seconds": 0.3})
    assert looked == [[running], [running]], "one query for all of them"
