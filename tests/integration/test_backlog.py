"""The queue as its users see it: places, waiting without holding anything, retries, and the operators' view."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import psycopg2
import pytest

from cloudagent_storage.errors import NotReady
from cloudagent_storage.records import LOCAL_ACCOUNT, TaskStatus
from tests.integration.test_http_server import KEY
from tests.support.worlds import World, git, until


def submit(client: Any, **arguments: Any) -> str:
    return client.call("submit_task", **{"prompt": "x", "repository": "none", **arguments})["task_id"]


def test_a_queued_task_tells_its_place_and_that_no_worker_runs(world: World) -> None:
    with world.client() as client:
        submit(client)
        place = client.call("get_task", task_id=submit(client))["queue"]
        assert (place["position"], place["starts_in_seconds"]) == (2, None)
        assert "none is running" in place["waiting_for"]


def test_a_task_of_high_priority_comes_first(world: World) -> None:
    with world.client() as client:
        submit(client)
        urgent = client.call("submit_task", prompt="x", repository="none", priority="high")
        assert urgent["priority"] == "high"
        assert client.call("get_task", task_id=urgent["task_id"])["queue"]["position"] == 1


def test_a_worker_runs_no_more_of_an_account_than_it_may(world: World) -> None:
    world.environment["ACCOUNT_RUNNING_MAX"] = "2"
    slow = {"setup": "python3 -c 'import time; time.sleep(600)'"}
    with world.client() as client:
        tasks = [submit(client, **slow) for _ in range(4)]
        world.start_worker(concurrency=4)

        def phases() -> list[str]:
            return [client.call("get_task", task_id=name)["phase"] for name in tasks]

        until(lambda: phases() == ["setup", "setup", None, None], "two run")
        place = client.call("get_task", task_id=tasks[2])["queue"]
        assert place["position"] == 1 and "it may have 2 running" in place["waiting_for"]
        assert world.app().store.backlog.overview().accounts[0].queued == 2
        client.call("cancel_task", task_id=tasks[0])
        until(lambda: phases()[2:] == ["setup", None], "the third follows the first")
        for name in tasks[1:]:
            client.call("cancel_task", task_id=name)
        for name in tasks:
            world.wait(client, name)


def test_a_retry_is_a_linked_new_task_with_the_same_files_and_limits(world: World, repo: Any) -> None:
    store = world.app().store
    (repo / "new.txt").write_text("not committed\n")
    with world.client(repo) as client:
        first = submit(client, repository=None, verify="true", max_turns=7)
        with pytest.raises(NotReady):
            client.call("retry_task", task_id=first)
        assert store.tasks.claim(first, worker="w", lease_s=60)
        store.tasks.finish(first, 1, status=TaskStatus.FAILED)
        (repo / "new.txt").unlink()
        again = client.call("retry_task", task_id=first)
        assert again["task_id"] != first and again["retry_of"] == first and again["status"] == "queued"
        assert again["base_sha"] == client.call("get_task", task_id=first)["base_sha"]
        specs = [store.tasks.spec(LOCAL_ACCOUNT, name) for name in (first, again["task_id"])]
        assert specs[0] == specs[1] and specs[1].max_turns == 7
        bundles = [store.blobs.get(LOCAL_ACCOUNT, name, "input") for name in (first, again["task_id"])]
        assert bundles[0] is not None and bundles[0] == bundles[1]
        claim = store.tasks.claim(again["task_id"], worker="w", lease_s=60)
        assert claim is not None and claim.credentials is not None
        assert b"sk-ant" in world.settings.keyring.open(claim.credentials, bound_to=again["task_id"])
    assert git(repo, "status", "--porcelain") == ""


@pytest.fixture
def server(world: World, postgres_url: str, valkey_url: str) -> Generator[str]:
    world.environment.update(DATABASE_URL=postgres_url, REDIS_URL=valkey_url)
    process = subprocess.Popen(
        [sys.executable, "-m", "cloudagent_mcp", "serve", "--port", "0"],
        env={**world.environment, "ADMIN_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as printed:
        yield printed.readline().split("MCP at ")[1].split("/mcp ")[0]
    process.terminate()
    process.wait(15)


def test_fifty_that_wait_hold_one_connection_and_learn_of_the_end(world: World, server: str, postgres_url: str) -> None:
    store = world.app().store
    with httpx2.Client(base_url=f"{server}/api/v1", headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http:
        tasks = [http.post("/tasks", json={"prompt": "x", "repository": "none"}).json()["task_id"] for _ in range(50)]
        begun = threading.Barrier(51)

        def wait(task_id: str) -> str:
            begun.wait()
            return http.get(f"/tasks/{task_id}", params={"wait_seconds": 50}).json()["status"]

        with ThreadPoolExecutor(50) as pool, contextlib.closing(psycopg2.connect(postgres_url)) as looking:
            looking.autocommit = True
            waiting = [pool.submit(wait, task_id) for task_id in tasks]
            begun.wait()

            def connections(what: str) -> int:
                with looking.cursor() as cursor:
                    cursor.execute(
                        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                        f"AND pid <> pg_backend_pid() AND {what}"
                    )
                    return cursor.fetchall()[0][0]

            until(lambda: connections("query LIKE 'LISTEN%'") == 1, "one connection listens for all")
            until(lambda: connections("state <> 'idle'") == 0, "nobody holds a connection")
            assert not any(future.done() for future in waiting)
            for task_id in tasks:
                store.tasks.request_cancel(LOCAL_ACCOUNT, task_id)
            assert {future.result(30) for future in waiting} == {"cancelled"}


def test_the_queue_is_for_operators_only(world: World, server: str) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "cloudagent_mcp", "key", "create", "ci", "--account", "team", "--json"],
        env=world.environment, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    token = json.loads(made.stdout)["token"]
    with httpx2.Client(base_url=f"{server}/api/v1", timeout=20) as http:
        http.post("/tasks", json={"prompt": "x", "repository": "none"}, headers={"Authorization": f"Bearer {KEY}"})
        refused = http.get("/queue", headers={"Authorization": f"Bearer {token}"})
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        seen = http.get("/queue", headers={"Authorization": f"Bearer {KEY}"}).json()
        assert seen["accounts"][0]["queued"] == 1 and seen["workers"] == []


def test_ca_queue_shows_workers_tasks_and_dead_letters(world: World) -> None:
    store = world.app().store
    with world.client() as client:
        dead = submit(client, prompt="kills its workers")
        submit(client)
    for _ in range(3):
        store.tasks.claim(dead, worker="w", lease_s=-1)
    assert store.tasks.claim(dead, worker="w", lease_s=60) is None
    store.workers.report("host/1", place="p", version="9", concurrency=3, swept=True)
    shown = subprocess.run(
        [sys.executable, "-m", "cloudagent_mcp", "queue"],
        env=world.environment, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    for words in ("local", "host/1", "0 of 3", "kills its workers", "ca task retry"):
        assert words in shown.stdout
