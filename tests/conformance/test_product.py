"""`ca serve` before the conformance harness: what applies to it holds, and what does not is named, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.conformance import REVISIONS, proven, run_scenarios, unmet
from tests.support.served import KEY, served
from tests.support.worlds import World

APPLIES = {
    "2026-07-28": {
        "caching",
        "completion-complete",
        "dns-rebinding-protection",
        "http-header-validation",
        "input-required-result-unsupported-methods",
        "prompts-list",
        "resources-list",
        "sep-2164-resource-not-found",
        "server-sse-multiple-streams",
        "server-stateless",
        "tools-list",
    },
    "2025-11-25": {
        "completion-complete",
        "dns-rebinding-protection",
        "ping",
        "prompts-list",
        "resources-list",
        "server-initialize",
        "tools-list",
    },
}

EXCEPT = {
    "sep-2575-server-rejects-undeclared-capability": "calls test_missing_capability; no tool of ours needs one",
    "sep-2575-missing-capability-http-400": "calls test_missing_capability; no tool of ours needs one",
    "sep-2575-server-sends-tools-list-changed-on-subscription": "calls test_trigger_tool_change; our list is fixed",
    "sep-2575-server-sends-prompts-list-changed-on-subscription": "calls test_trigger_prompt_change",
}
"""Checks of those scenarios that call a tool of the harness's own, which only the fixture server has."""

CALLS = "calls a tool of the harness's own: "
READS = "reads a resource of the harness's own: "
GETS = "gets a prompt of the harness's own: "
ASKS = "no tool of ours answers so for any caller; the fixture server has one: "
TASK = "makes a task with a tool of the harness's own: "
STATELESS = "is about sessions; every request stands alone, so that any server process can answer it"

DOES_NOT_APPLY = {
    "elicitation-sep1034-defaults": ASKS + "test_elicitation_sep1034_defaults",
    "elicitation-sep1330-enums": ASKS + "test_elicitation_sep1330_enums",
    "http-custom-header-server-validation": "no argument of ours is repeated in a header",
    "input-required-result-basic-elicitation": ASKS + "test_input_required_result_elicitation",
    "input-required-result-basic-list-roots": ASKS + "test_input_required_result_list_roots",
    "input-required-result-basic-sampling": ASKS + "test_input_required_result_sampling",
    "input-required-result-capability-check": ASKS + "test_input_required_result_capabilities",
    "input-required-result-ignore-extra-params": ASKS + "test_input_required_result_elicitation",
    "input-required-result-missing-input-response": ASKS + "test_input_required_result_elicitation",
    "input-required-result-multi-round": ASKS + "test_input_required_result_multi_round",
    "input-required-result-multiple-input-requests": ASKS + "test_input_required_result_multiple_inputs",
    "input-required-result-non-tool-request": ASKS + "test_input_required_result_prompt",
    "input-required-result-request-state": ASKS + "test_input_required_result_request_state",
    "input-required-result-result-type": ASKS + "test_input_required_result_elicitation",
    "input-required-result-tampered-state": ASKS + "test_input_required_result_tampered_state",
    "input-required-result-validate-input": ASKS + "test_input_required_result_elicitation",
    "json-schema-2020-12": "wants every keyword of JSON Schema in one tool; ours are plain",
    "logging-set-level": "we send no log messages; the protocol has deprecated them (SEP-2577)",
    "prompts-get-embedded-resource": GETS + "test_prompt_with_embedded_resource",
    "prompts-get-simple": GETS + "test_simple_prompt",
    "prompts-get-with-args": GETS + "test_prompt_with_arguments",
    "prompts-get-with-image": GETS + "test_prompt_with_image",
    "resources-read-binary": READS + "test://static-binary",
    "resources-read-text": READS + "test://static-text",
    "resources-subscribe": STATELESS,
    "resources-templates-read": READS + "test://template/{id}/data",
    "resources-unsubscribe": STATELESS,
    "server-session-lifecycle": STATELESS,
    "server-sse-multiple-streams": "in the older era alone: " + STATELESS,
    "server-sse-polling": STATELESS,
    "tasks-capability-negotiation": TASK + "slow_compute",
    "tasks-dispatch-and-envelope": TASK + "slow_compute",
    "tasks-lifecycle": TASK + "slow_compute",
    "tasks-mrtr-composition": TASK + "test_tool_with_task",
    "tasks-mrtr-input": TASK + "confirm_delete",
    "tasks-request-headers": TASK + "slow_compute",
    "tasks-request-state-removal": TASK + "slow_compute",
    "tasks-required-task-error": TASK + "failing_job",
    "tasks-status-notifications": "the harness skips it for every server",
    "tasks-wire-fields": TASK + "slow_compute",
    "tools-call-audio": CALLS + "test_audio_content",
    "tools-call-elicitation": CALLS + "test_elicitation",
    "tools-call-embedded-resource": CALLS + "test_embedded_resource",
    "tools-call-error": CALLS + "test_error_handling",
    "tools-call-image": CALLS + "test_image_content",
    "tools-call-mixed-content": CALLS + "test_multiple_content_types",
    "tools-call-sampling": CALLS + "test_sampling",
    "tools-call-simple-text": CALLS + "test_simple_text",
    "tools-call-with-logging": CALLS + "test_tool_with_logging",
    "tools-call-with-progress": CALLS + "test_tool_with_progress",
}
"""Scenarios that say nothing about a product; without their tools, some even pass."""


@pytest.mark.parametrize("revision", REVISIONS)
def test_the_product_passes_every_scenario_that_applies_to_it(
    world: World, revision: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    with served(world) as url:
        # By the name that the harness's own Host check needs.
        address = url.replace("127.0.0.1", "localhost") + "/mcp"
        found = run_scenarios(address, revision, tmp_path / "results", pytestconfig, key=KEY)
    applies = APPLIES[revision]
    assert found.keys() <= applies | DOES_NOT_APPLY.keys(), "A scenario is new: say whether it applies, or why not."
    assert applies <= found.keys()
    for scenario in sorted(applies):
        checks = found[scenario]
        assert proven(checks), (scenario, checks)
        assert [check for check in unmet(checks) if check.name not in EXCEPT] == [], scenario
    if revision == "2026-07-28":
        still = {check.name for scenario in applies for check in unmet(found[scenario])}
        assert EXCEPT.keys() <= still, "An exception is no longer needed."
    # Whatever was asked, also of what is not there: no answer was malformed.
    malformed = [check for checks in found.values() for check in unmet(checks) if check.name == "wire-schema-valid"]
    assert malformed == []
