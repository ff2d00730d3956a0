"""`ca` as a person types it, in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cloudagent_mcp.embedded import running_worker
from cloudagent_storage.records import Usage
from tests.support.worlds import World, until


def ca(
    world: World, *words: str, folder: Path | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cloudagent_mcp", *words],
        env=world.environment,
        cwd=folder or world.home,
        capture_output=True,
        text=True,
        input=stdin,
        timeout=60,
    )


@pytest.fixture
def queued(world: World) -> str:
    """A task that waits, since no worker runs."""
    with world.client() as client:
        return client.call("submit_task", prompt="Wait for me\nwith two lines", repository="none")["task_id"]


def test_json_is_one_document_and_a_prefix_is_enough_for_an_id(world: World, queued: str) -> None:
    for words in (("show", queued), ("show", queued[5:10]), ("show", queued[:12])):
        done = ca(world, "task", *words, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["task_id"] == queued
    listed = json.loads(ca(world, "task", "list", "--json").stdout)
    assert [task["task_id"] for task in listed["tasks"]] == [queued] and listed["total"] == 1


def test_a_pipe_gets_plain_text_without_colours(world: World, queued: str) -> None:
    for words in (("list",), ("show", queued), ("logs", queued)):
        done = ca(world, "task", *words)
        assert done.returncode == 0 and done.stdout
        assert "\x1b" not in done.stdout
    assert ca(world, "task", "list").stdout.split("\t")[:2] == [queued, "queued"]


def test_logs_as_json_are_one_document_a_line(world: World, queued: str) -> None:
    lines = [json.loads(line) for line in ca(world, "task", "logs", queued, "--json").stdout.splitlines()]
    assert [line["seq"] for line in lines] == [1] and lines[0]["message"] == "Queued."


def test_cancel_and_wait_tell_by_their_exit_code(world: World, queued: str) -> None:
    assert ca(world, "task", "wait", queued, "--timeout", "0").returncode == 1
    assert ca(world, "task", "cancel", queued).returncode == 0
    assert "nothing to cancel" in ca(world, "task", "cancel", queued).stdout
    assert ca(world, "task", "wait", queued).returncode == 1
    assert ca(world, "task", "watch", queued).returncode == 1


@pytest.mark.parametrize(
    ("words", "exit_code", "code"),
    [
        (["task", "show", "task_zzzzzzzz"], 2, "task_not_found"),
        (["task", "create", ""], 2, "prompt_empty"),
        (["task", "create", "x", "--repository", "ext::sh -c id"], 2, "repository_not_allowed"),
        (["task", "create", "x", "--repository", "/nowhere/at/all"], 2, "repository_not_found"),
        (["task", "create", "x", "--repository", "none", "--max-turns", "0"], 2, "out_of_range"),
        (["task", "list", "--cursor", "forged"], 2, "invalid_cursor"),
    ],
)
def test_a_refusal_is_a_sentence_with_a_remedy_and_no_traceback(
    world: World, words: list[str], exit_code: int, code: str
) -> None:
    done = ca(world, *words)
    assert done.returncode == exit_code
    assert f"({code})" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2
    as_json = ca(world, *words, "--json")
    assert as_json.returncode == exit_code and json.loads(as_json.stdout)["code"] == code


def test_a_missing_credential_is_exit_code_3(world: World) -> None:
    done = ca(world.without_credential(), "task", "create", "x", "--repository", "none")
    assert done.returncode == 3 and "claude setup-token" in done.stderr


def test_wrong_usage_is_exit_code_2(world: World) -> None:
    for words in (("task", "create"), ("task", "frobnicate"), ("nonsense",), ("task", "list", "--limit", "0")):
        assert ca(world, *words).returncode == 2


def test_a_server_that_is_not_there_is_exit_code_3(world: World) -> None:
    world.environment["CLOUDAGENT_URL"] = "http://127.0.0.1:1"
    done = ca(world, "task", "list")
    assert done.returncode == 3 and "(server_unreachable)" in done.stderr


def test_a_bad_setting_is_named(world: World) -> None:
    world.environment["WORKER_CONCURRENCY"] = "many"
    done = ca(world, "task", "list")
    assert done.returncode == 2 and "WORKER_CONCURRENCY" in done.stderr and "many" not in done.stderr


def test_a_prompt_can_come_from_standard_input(world: World) -> None:
    bare = world.without_credential()
    done = ca(bare, "task", "create", "-", "--repository", "none", stdin="")
    assert "(prompt_empty)" in done.stderr


def test_doctor_has_a_line_a_check_and_a_remedy_for_what_fails(world: World) -> None:
    done = ca(world, "doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert set(findings) == {
        "data folder", "database", "queue", "git", "sandbox local", "prices", "agent", "credential", "worker",
        "prompts",
    }  # fmt: skip
    assert all(finding["ok"] for finding in findings.values()), findings
    assert done.returncode == 0 and "Claude Code" in findings["agent"]["message"]
    bare = ca(world.without_credential(), "doctor")
    assert bare.returncode == 1 and "FAIL credential" in bare.stdout and "claude setup-token" in bare.stdout


def test_doctor_tells_of_prices_and_of_a_file_of_them_that_cannot_be_used(world: World) -> None:
    world.environment["SANDBOX_PRICES"] = str(world.home / "prices.toml")
    (world.home / "prices.toml").write_text("[local]\nvcpu_second = 0.00002\ngib_second = 0\n")
    findings = {finding["name"]: finding for finding in json.loads(ca(world, "doctor", "--json").stdout)}
    assert findings["prices"]["message"] == "local: $0.072 per vCPU and $0 per GiB an hour"
    (world.home / "prices.toml").write_text("[local]\nvcpu_hour = 1\n")
    done = ca(world, "doctor", "--json")
    (prices,) = [finding for finding in json.loads(done.stdout) if finding["name"] == "prices"]
    assert done.returncode == 1 and not prices["ok"] and "SANDBOX_PRICES" in prices["message"]


def test_the_cost_of_the_sandbox_stands_beside_that_of_the_model(world: World, queued: str) -> None:
    store = world.app().store
    assert "sandbox" not in ca(world, "task", "show", queued).stdout
    claim = store.tasks.claim(queued, worker="worker", lease_s=60)
    assert claim is not None
    used = Usage(cost_usd=0.5, turns=3, sandbox_seconds=90)
    for usage, shown in (
        (used, "sandbox    cost not known, 2 min"),
        (used.model_copy(update={"sandbox_cost_usd": 0.0}), "sandbox    $0.0000, 2 min"),
        (used.model_copy(update={"sandbox_cost_usd": 0.0123}), "sandbox    $0.0123, 2 min"),
    ):
        store.tasks.update(queued, claim.attempt, usage=usage)
        lines = [line.strip() for line in ca(world, "task", "show", queued).stdout.splitlines()]
        assert lines[lines.index("cost       $0.5000, 3 turns") + 1] == shown
        as_json = json.loads(ca(world, "task", "show", queued, "--json").stdout)
        assert as_json["usage"] == usage.model_dump()


def test_a_key_is_made_listed_and_revoked_and_its_token_is_shown_once(world: World) -> None:
    made = ca(world, "key", "create", "Ada's laptop", "--account", "team-a", "--expires-days", "30")
    token = made.stdout.strip()
    assert made.returncode == 0 and token.startswith("cag_") and token not in made.stderr
    listed = ca(world, "key", "list")
    columns = listed.stdout.rstrip("\n").split("\t")
    assert columns[0] == f"key_{token.split('_')[1]}" and columns[0] in made.stderr
    assert (columns[1], columns[2], columns[5]) == ("team-a", token[-4:], "Ada's laptop")
    assert columns[3].startswith("until 20") and token.split("_", 2)[2] not in listed.stdout
    as_json = json.loads(ca(world, "key", "create", "ci", "--json").stdout)
    assert as_json["account_id"] == "local" and as_json["expires_at"] is None
    assert as_json["token"].endswith(as_json["hint"]) and "digest" not in as_json
    assert ca(world, "key", "revoke", columns[0][:10]).returncode == 0
    keys = {key["name"]: key for key in json.loads(ca(world, "key", "list", "--json").stdout)["keys"]}
    assert keys["Ada's laptop"]["revoked_at"] and not keys["ci"]["revoked_at"]
    assert not any({"token", "digest"} & set(key) for key in keys.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["create", "x", "--account", "Team A"], "(invalid_input)"),
        (["create", ""], "(out_of_range)"),
        (["create", "x", "--expires-days", "0"], "--expires-days"),
        (["revoke", "key_zzzzzzzz"], "(key_not_found)"),
    ],
)
def test_what_is_wrong_with_a_key_is_told(world: World, words: list[str], said: str) -> None:
    done = ca(world, "key", *words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_keys_are_not_managed_from_afar(world: World) -> None:
    world.environment["CLOUDAGENT_URL"] = "https://agents.example.com"
    for words in (["create", "x"], ["list"], ["revoke", "key_aaaaaaaa"]):
        done = ca(world, "key", *words)
        assert done.returncode == 2 and "where the server runs" in done.stderr
    assert not (world.home / "cloudagent.db").exists()
    assert ca(world, "key", "generate").returncode == 0


def test_a_server_beyond_loopback_does_not_start_without_keys(world: World) -> None:
    done = ca(world, "serve", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2 and "ADMIN_API_KEY" in done.stderr


def test_ca_is_a_client_of_a_server_that_makes_its_key_at_the_first_start(world: World, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "cloudagent_mcp", "serve", "--port", "0"],
        env=world.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            lines = [server.stdout.readline() for _ in range(3)]
            url = lines[0].split("REST at ")[1].strip().removesuffix("/api/v1")
            key = lines[2].rsplit("Bearer ", 1)[1].strip().rstrip('"')
            assert (world.home / "server.key").stat().st_mode & 0o777 == 0o600
            user = World(tmp_path, {**world.environment, "CLOUDAGENT_URL": url, "CLOUDAGENT_API_KEY": key})
            created = ca(user, "task", "create", "x", "--repository", "none", "--json")
            task_id = json.loads(created.stdout)["task_id"]
            assert json.loads(ca(user, "task", "show", task_id[5:11], "--json").stdout)["task_id"] == task_id
            ca(user, "task", "cancel", task_id)
            user.environment["CLOUDAGENT_API_KEY"] = "wrong"
            refused = ca(user, "task", "list")
            assert refused.returncode == 3 and "(unauthorized)" in refused.stderr
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(15) in (0, -signal.SIGTERM)
    stop_embedded_worker(world)


def test_the_embedded_worker_is_one_process_and_is_started_by_the_first_task(world: World) -> None:
    assert running_worker(world.home) is None
    for _ in range(3):
        created = ca(world, "task", "create", "x", "--repository", "none", "--timeout-minutes", "0.02", "--json")
        assert created.returncode == 0, created.stderr
    first = until(lambda: (found := running_worker(world.home)) and found.pid and found, "the worker runs")
    assert ca(world, "task", "create", "y", "--repository", "none", "--json").returncode == 0
    assert running_worker(world.home) == first
    stop_embedded_worker(world)


def stop_embedded_worker(world: World) -> None:
    import os

    found = until(lambda: (now := running_worker(world.home)) and now.pid and now, "the worker runs")
    os.kill(found.pid, signal.SIGTERM)
    started = time.monotonic()
    until(lambda: running_worker(world.home) is None, "the worker has stopped")
    assert time.monotonic() - started < 15
