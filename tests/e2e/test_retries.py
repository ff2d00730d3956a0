"""A failing verify goes back to the real agent, in the conversation in which it did the work."""

from __future__ import annotations

import json
from pathlib import Path

from cloudagent_mcp.scripted_model import Rule, ScriptedModel
from tests.support.scripts import bash, say
from tests.support.worlds import World

TEST = "python3 -m unittest -q test_calc"
SETUP = "echo made > made.log; echo made >> ../set-ups"
TRY = Rule(
    prompt="^Fix add", turns=(bash("sed -i 's/a - b/a * b/' calc.py && cat made.log"), say("I think that is it."))
)
MEND = Rule(
    prompt="The work that you handed over was checked.*AssertionError",
    turns=(bash("sed -i 's/a [*] b/a + b/' calc.py && cat made.log && wc -l ../set-ups"), say("Now it is right.")),
)


def test_what_fails_goes_back_to_the_agent_which_mends_it_in_the_same_conversation_and_sandbox(
    world: World, repo: Path
) -> None:
    with ScriptedModel([MEND, TRY]) as model:
        world = world.with_model(model.environment())
        world.start_worker()
        with world.client(repo) as client:
            task_id = client.call("submit_task", prompt="Fix add", verify=TEST, retries=2, setup=SETUP)["task_id"]
            task = world.wait(client, task_id, 90)
            lines = world.log(client, task_id)
            said = [line["message"] for line in lines]
            assert (task["status"], task["verdict"], task["error"]) == ("completed", "passed", None), said
            assert (task["result"]["summary"], task["retries_used"]) == ("Now it is right.", 1)
            checked = task["result"]["verify"]
            assert (checked["exit_code"], checked["tries"]) == (0, 2) and checked["seconds"] > 0
            assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
            assert said.count("Verify failed with exit code 1; its output goes back to the agent (retry 1 of 2).") == 1
            assert [text for text in said if text.startswith("Verdict")] == ["Verdict: failed.", "Verdict: passed."]
            diff = client.call("get_task_diff", task_id=task_id)
            assert [file["path"] for file in diff["files"]] == ["calc.py"] and "+    return a + b" in diff["diff"]
            assert checked["commit"] and task["usage"]["turns"] == 4
    conversation = json.dumps(model.requests[-1].body["messages"])
    for heard in ("Fix add", "I think that is it.", "AssertionError: 6 != 5", "1 ../set-ups"):
        assert heard in conversation, f"{heard} is not in what the model was sent last"
