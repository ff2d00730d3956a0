"""A repository's `.cloudagent.toml`, from its commit to what the task was run as."""

from __future__ import annotations

from pathlib import Path

from cloudagent_mcp.scripted_model import Rule, ScriptedModel
from tests.support.git_repos import commit, git, make_repository
from tests.support.git_server import git_server
from tests.support.scripts import bash, say
from tests.support.worlds import World

CONFIG = """
setup = "echo set up with $FLAVOUR"
verify = "grep -qx dark seen.txt && echo verified with $FLAVOUR"
[environment]
FLAVOUR = "dark"
[limits]
max_turns = 3
"""
LOOK = Rule(
    prompt="^Look",
    turns=(bash('echo "$FLAVOUR" > seen.txt'), say("I have looked.")),
)
TALK = Rule(prompt="^Go on", turns=(*(bash(f"echo step {number}") for number in range(6)), say("Done.")))


def test_a_folders_file_sets_commands_variables_and_limits(world: World, repo: Path) -> None:
    (repo / ".cloudagent.toml").write_text(CONFIG)
    with ScriptedModel([LOOK, TALK]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            looked = client.call("submit_task", prompt="Look around")["task_id"]
            talked = client.call("submit_task", prompt="Go on", verify="true")["task_id"]
            task = world.wait(client, looked)
            said = [line["message"] for line in world.log(client, looked)]
            diff = client.call("get_task_diff", task_id=looked)["diff"]
            other = world.wait(client, talked)
    assert "set up with dark\n" in said and any("setup, verify, environment, limits" in line for line in said)
    assert "+dark\n" in diff
    assert task["result"]["verify"]["output"] == "verified with dark\n" and task["verdict"] == "passed"
    assert (other["status"], other["error"]["code"]) == ("failed", "max_turns")
    assert task["usage"]["sandbox_seconds"] > 0 and task["usage"]["sandbox_cost_usd"] == 0.0


def test_an_addresss_broken_file_ends_its_task_before_there_is_a_sandbox_or_an_agent(
    world: World, tmp_path: Path
) -> None:
    shop = make_repository(tmp_path / "shop", {"a.txt": "a\n", ".cloudagent.toml": "setup = 'touch it'"})
    commit(shop, {".cloudagent.toml": "setup = 'touch it'\n[limits]\nmax_turn = 5\n"})
    (tmp_path / "served").mkdir()
    git(tmp_path, "clone", "--quiet", "--bare", "shop", "served/shop.git")
    with ScriptedModel([LOOK]) as model, git_server(tmp_path / "tls", {"": tmp_path / "served"}) as server:
        world = world.with_model(model.environment())
        server.trusted_by(Path(world.environment["HOME"]))
        world.start_worker()
        with world.client() as client:
            task = world.wait(
                client, client.call("submit_task", prompt="Look", repository=server.address("shop.git"))["task_id"]
            )
            fine = world.wait(
                client,
                client.call(
                    "submit_task",
                    prompt="Look",
                    repository=server.address("shop.git"),
                    base_ref=git(shop, "rev-parse", "HEAD^"),
                )["task_id"],
            )
    assert (task["status"], task["error"]["code"]) == ("failed", "setup_failed")
    assert "limits.max_turn" in task["error"]["message"] and "max_turns?" in task["error"]["remedy"]
    assert task["usage"]["sandbox_seconds"] == 0
    assert fine["status"] == "completed"
