"""Candidates by way of the operations: submitted by schedules and again, gone on from, cancelled, looked for."""

from __future__ import annotations

import json
import zlib
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from cloudagent_mcp.client import LocalClient
from cloudagent_queue.candidates import split
from cloudagent_queue.repository import with_ref
from cloudagent_queue.schedules import fire_due
from cloudagent_storage.errors import CloudAgentError
from cloudagent_storage.records import LOCAL_ACCOUNT, Artifacts, Result, TaskSpec, TaskStatus, Usage, Verdict
from cloudagent_storage.store import Store
from tests.support.stored import execute
from tests.support.worlds import World

MODELS = ["a", "b"]


def submit(client: LocalClient, **more: Any) -> dict[str, Any]:
    return client.call("submit_task", prompt="Fix it", **{"repository": "none", "models": MODELS, **more})


def candidates(client: LocalClient, parent: str) -> list[str]:
    table = client.call("get_task", task_id=parent)["candidates"]
    return [found["task_id"] for found in sorted(table, key=lambda found: found["candidate"])]


def end(store: Store, task_id: str, verdict: Verdict = Verdict.PASSED) -> None:
    claim = store.tasks.claim(task_id, worker="w", lease_s=60)
    assert claim is not None
    artifacts = Artifacts(branch=claim.task.branch, files_changed=1, insertions=1)
    store.tasks.finish(
        task_id,
        claim.attempt,
        status=TaskStatus.COMPLETED,
        verdict=verdict,
        result=Result(artifacts=artifacts),
        usage=Usage(cost_usd=0.25),
    )


@pytest.mark.parametrize("count", range(2, 9))
def test_models_and_providers_are_taken_in_turn_and_the_budget_is_never_passed(count: int) -> None:
    spec = TaskSpec(
        prompt="x", title="x", best_of=count, models=("a", "b"), providers=("l", "m", "n"), max_budget_usd=0.1
    )
    each = split(spec)
    assert [one.model for one in each] == [("a", "b")[number % 2] for number in range(count)]
    assert [one.provider for one in each] == [("l", "m", "n")[number % 3] for number in range(count)]
    budgets = [one.max_budget_usd or 0 for one in each]
    assert len(set(budgets)) == 1 and sum(budgets) == pytest.approx(0.1) and sum(budgets) <= 0.1 + 1e-12
    assert all((one.best_of, one.models, one.cancel_losers) == (None, (), False) for one in each)
    assert split(TaskSpec(prompt="x", title="x")) == []


def test_one_candidate_is_a_plain_task(world: World) -> None:
    with world.client() as client:
        one = submit(client, models=["a"], best_of=1)
        assert (one["best_of"], one["model"]) == (None, "a")
        plain = client.call("submit_task", prompt="x", repository="none", best_of=1)
        assert (plain["best_of"], plain["model"]) == (None, None)
        assert world.app().store.tasks.unfinished() == 2


def test_every_candidate_is_rung_for_and_has_credentials_of_its_own(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = world.app()
    rung: list[str] = []

    def ring(_: object, task_id: str) -> None:
        rung.append(task_id)

    monkeypatch.setattr(type(app), "ring", ring)
    with world.client() as client:
        parent = submit(client, best_of=3, idempotency_key="k")
        mine = candidates(client, parent["task_id"])
        assert sorted(rung) == sorted(mine)
        again = submit(client, best_of=3, idempotency_key="k")
        assert (again["task_id"], again["replayed"]) == (parent["task_id"], True)
        with pytest.raises(CloudAgentError) as refused:
            submit(client, best_of=4, idempotency_key="k")
        assert refused.value.code == "idempotency_mismatch"
    keyring = world.settings.keyring
    for task_id in mine:
        claim = app.store.tasks.claim(task_id, worker="w", lease_s=60)
        assert claim is not None and claim.credentials is not None
        assert "sk-ant-test" in keyring.open(claim.credentials, bound_to=task_id).decode()
    assert execute(world.settings.store_url, "SELECT credentials FROM tasks WHERE best_of > 0") == [(None,)]


def test_a_parent_is_tried_again_as_a_whole_and_a_candidate_alone(world: World, repo: Path) -> None:
    store = world.app().store
    with world.client(repo) as client:
        parent = submit(client, repository=None)["task_id"]
        mine = candidates(client, parent)
        client.call("cancel_task", task_id=parent)
        again = client.call("retry_task", task_id=parent)
        assert (again["best_of"], again["retry_of"]) == (2, parent)
        others = candidates(client, again["task_id"])
        assert not set(others) & set(mine)
        models = [client.call("get_task", task_id=task_id)["model"] for task_id in others]
        assert models == MODELS
        bundle = store.blobs.get(LOCAL_ACCOUNT, parent, "input")
        assert bundle is not None and store.blobs.get(LOCAL_ACCOUNT, others[1], "input") == bundle
        alone = client.call("retry_task", task_id=mine[1])
        assert (alone["best_of"], alone["candidate"], alone["parent_task_id"], alone["model"]) == (
            None,
            None,
            None,
            "b",
        )
        assert store.blobs.get(LOCAL_ACCOUNT, alone["task_id"], "input") == bundle


def test_a_schedule_submits_candidates_and_waits_for_all_of_them(world: World) -> None:
    app = world.app()
    rung: list[str] = []
    with world.client() as client:
        task = {"prompt": "Fix it", "repository": "none", "models": MODELS, "best_of": 3}
        schedule = client.call("create_schedule", name="n", cron="0 3 * * *", task=task)["schedule_id"]
        parent = client.call("run_schedule", schedule_id=schedule)["run"]["task_id"]
        assert client.call("get_task", task_id=parent)["best_of"] == 3

        def fire() -> str:
            moment = "strftime('%Y-%m-%d %H:%M:%f', 'now', '-1 seconds')"
            execute(world.settings.store_url, f"UPDATE schedules SET next_due_at = {moment}")
            fire_due(app.store, app.settings.keyring, rung.append)
            runs = client.call("get_schedule", schedule_id=schedule)["last_runs"]
            return max(runs, key=lambda run: run["created_at"])["outcome"]

        mine = candidates(client, parent)
        for task_id in mine:
            assert fire() == "skipped"
            end(app.store, task_id)
        assert fire() == "submitted" and len(rung) == 3
        updated = client.call("update_schedule", schedule_id=schedule, task={"models": ["c"], "best_of": None})
        assert (updated["task"]["best_of"], updated["task"]["model"]) == (None, "c")
        for wrong in ({"model": "x", "models": MODELS}, {"cancel_losers": True, "best_of": 2}):
            with pytest.raises(CloudAgentError) as refused:
                client.call("update_schedule", schedule_id=schedule, task=wrong)
            assert (refused.value.field or "").startswith("task.")


def test_a_conversation_that_comes_along_is_kept_once_and_opens_for_every_candidate(world: World) -> None:
    said = [
        {"type": "user", "uuid": "11111111-1111-4111-8111-111111111111", "parentUuid": None, "sessionId": "s",
         "message": {"role": "user", "content": "hello"}, "timestamp": "2026-01-01T00:00:00.000Z"},
        {"type": "assistant", "uuid": "22222222-2222-4222-8222-222222222222",
         "parentUuid": "11111111-1111-4111-8111-111111111111", "sessionId": "s",
         "message": {"role": "assistant", "content": [{"type": "text", "text": "hi"}]},
         "timestamp": "2026-01-01T00:00:01.000Z"},
    ]  # fmt: skip
    session_id = "6f1c0d3a-58c2-4c0e-9d1b-0d6f2b7e55aa"
    transcript = "".join(json.dumps(line) + "\n" for line in said)
    packed = b64encode(
        zlib.compress(json.dumps({"session_id": session_id, "files": {f"-/{session_id}.jsonl": transcript}}).encode())
    ).decode()
    app = world.app()
    with world.client() as client:
        parent = submit(client, session=packed)["task_id"]
        for task_id in candidates(client, parent):
            claim = app.store.tasks.claim(task_id, worker="w", lease_s=60)
            assert claim is not None and claim.task.submitted_as == parent
            assert app.store.blobs.get(LOCAL_ACCOUNT, task_id, "conversation")
    assert execute(world.settings.store_url, "SELECT kind, count(*) FROM blobs GROUP BY kind") == [("conversation", 1)]


def test_a_start_is_moved_to_the_branch_of_whoever_begins_there() -> None:
    bundle = b"# v2 git bundle\n" + b"a" * 40 + b" refs/heads/task/parent\n\nPACK"
    assert b"refs/heads/task/mine\n" in with_ref(bundle, "task/mine")


def test_the_parent_tells_what_to_do_next_and_whose_agent_asks(world: World) -> None:
    from tests.support.stored import ask

    app = world.app()
    with world.client() as client:
        parent = submit(client)["task_id"]
        first, second = candidates(client, parent)
        claim = app.store.tasks.claim(first, worker="w", lease_s=60)
        assert claim is not None
        ask(app.store, first, claim.attempt)
        told = client.call("get_task", task_id=parent)
        assert first in told["next_action"] and told["asking"] == [first] and told["status"] == "running"
        (question,) = client.call("list_pending_questions")["questions"]
        assert (question["task_id"], question["candidate"]) == (first, 1)
        with pytest.raises(CloudAgentError) as refused:
            client.call("send_message", task_id=parent, message="hello")
        assert refused.value.code == "several_agents" and second in refused.value.remedy
        client.call("send_message", task_id=first, message="this")
        assert client.call("get_task", task_id=parent)["asking"] == []
        found = client.call("list_tasks")
        assert (found["total"], len(client.call("list_tasks", candidates=True)["tasks"])) == (1, 3)
        with pytest.raises(CloudAgentError) as refused:
            client.call("get_task_diff", task_id=parent)
        assert refused.value.code == "not_ready"


def test_losers_need_a_verify_command_that_may_also_be_the_repositorys_own(world: World, repo: Path) -> None:
    with world.client(repo) as client:
        with pytest.raises(CloudAgentError) as refused:
            submit(client, repository=None, cancel_losers=True)
        assert refused.value.field == "cancel_losers"
        (repo / ".cloudagent.toml").write_text('verify = "python3 -m unittest -q"\n')
        assert submit(client, repository=None, cancel_losers=True)["best_of"] == 2
        # What a remote one says is not known before it is fetched.
        assert submit(client, repository="https://github.com/example/x", cancel_losers=True)["best_of"] == 2


def test_what_a_parent_was_verified_by_is_run_once_more_on_the_best_result_by_one_task(world: World) -> None:
    app = world.app()
    with world.client() as client:
        parent = submit(client, verify="true")["task_id"]
        first, second = candidates(client, parent)
        end(app.store, first, Verdict.FAILED)
        claim = app.store.tasks.claim(second, worker="w", lease_s=60)
        assert claim is not None
        bundle = b"# v2 git bundle\n" + b"a" * 40 + f" refs/heads/{claim.task.branch}\n\nPACK".encode()
        app.store.blobs.put(second, "result", bundle, attempt=claim.attempt)
        app.store.tasks.finish(second, claim.attempt, status=TaskStatus.COMPLETED, verdict=Verdict.PASSED)
        again = client.call("verify_task", task_id=parent)
        assert (again["best_of"], again["candidate"], again["parent_task_id"]) == (None, None, parent)
        started = app.store.blobs.get(LOCAL_ACCOUNT, again["task_id"], "start")
        assert started == with_ref(bundle, again["branch"])
        assert len(client.call("get_task", task_id=parent)["candidates"]) == 2
        assert app.store.tasks.claim(again["task_id"], worker="w", lease_s=60) is not None
