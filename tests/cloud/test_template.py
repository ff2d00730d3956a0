"""`ca template build`: what it has a provider build, what it tells of it, and what to do where nothing is built."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import e2b
import pytest

from cloudagent_queue.sandboxes import SandboxSpec, template
from cloudagent_queue.sandboxes.e2b import E2BProvider
from cloudagent_queue.sandboxes.preparation import TEMPLATE_FOLDER
from cloudagent_storage.errors import (
    CloudAgentError,
    InvalidInput,
    ProviderBusy,
    SandboxUnavailable,
    TemplateBuildFailed,
    UnknownProvider,
)
from tests.support.e2b_server.client import E2bServer

BUILDS = "/v3/templates"
STATUS = "/templates/.*/status"
DEFAULT = template.default_name()


def ca(server: E2bServer, tmp_path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cloudagent_mcp", *arguments],
        env={"PATH": os.environ["PATH"], "CLOUDAGENT_HOME": str(tmp_path), **server.environment, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def build(server: E2bServer, told: list[str] | None = None, **how: Any) -> template.Built:
    api = template.api_of("e2b", server.environment)
    how = {"name": "mine", "cpus": 1, "memory_mb": 1024, **how}
    return template.build(api, tell=(told if told is not None else []).append, **how)


def refusal(server: E2bServer, **how: Any) -> CloudAgentError:
    with pytest.raises(CloudAgentError) as raised:
        build(server, **how)
    return raised.value


def test_a_build_prints_its_log_and_the_line_for_the_environment_which_then_works(
    server: E2bServer, tmp_path: Path
) -> None:
    done = ca(server, tmp_path, "template", "build", "--provider", "e2b")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"SANDBOX_TEMPLATE={DEFAULT}\n"
    assert "[builder 4/4] RUN" in done.stderr and "Build finished" in done.stderr
    assert re.search(rf"Built {DEFAULT} in \d+ s: 2 CPUs and 4096 MB", done.stderr)
    made = E2BProvider({**server.environment, "SANDBOX_TEMPLATE": DEFAULT}).create(metadata={})
    assert server.sandbox(made.id)["asked"]["templateID"] == DEFAULT
    assert made.resources is not None and (made.resources.cpus, made.resources.memory_mb) == (2, 4096)
    assert made.remark is None


def test_json_is_one_document_with_the_same_in_it(server: E2bServer, tmp_path: Path) -> None:
    arguments = ["--name", "other", "--cpus", "4", "--memory-mb", "8192", "--json"]
    done = ca(server, tmp_path, "template", "build", "--provider", "e2b", *arguments)
    built = json.loads(done.stdout)
    assert (built["provider"], built["name"], built["sandbox_template"]) == ("e2b", "other", "other")
    assert (built["cpus"], built["memory_mb"]) == (4, 8192)
    recorded = server.builds()[-1]
    assert (built["build_id"], built["template_id"]) == (recorded["id"], recorded["template"])
    assert (recorded["requested"]["cpuCount"], recorded["requested"]["memoryMB"]) == (4, 8192)


def test_what_is_built_is_pinned_holds_one_claude_code_and_no_secret(server: E2bServer) -> None:
    build(server)
    recorded = server.builds()[-1]
    started = recorded["started"]
    commands = [step["args"][0] for step in started["steps"]]
    everything = "\n".join([*commands, started["readyCmd"]])
    library = importlib.metadata.version("claude-agent-sdk")
    assert re.fullmatch(r"node:\d+-trixie-slim", started["fromImage"])
    assert f"claude-agent-sdk=={library} uv==" in everything
    assert f"python3 -m venv {TEMPLATE_FOLDER}" in everything
    assert not re.search(r"npm install|@latest|\| *(ba)?sh", everything)
    assert server.api_key not in json.dumps(recorded)
    # Agents are not root, and what they need is tried as they are.
    assert [step["args"][1] for step in started["steps"]] == ["root", "root", "root", "user"]
    assert started["readyCmd"] == commands[-1] and "startCmd" not in started
    for tool in ("git", "gh", "node", "python3", "uv", "rg", "curl", "claude"):
        assert f"&& {tool} --version" in started["readyCmd"]
    for command in [*commands, started["readyCmd"]]:
        subprocess.run(["sh", "-n", "-c", command], check=True)


def test_the_command_line_of_claude_code_is_where_the_template_looks_for_it() -> None:
    (program,) = re.findall(
        r'-c "(import claude_agent_sdk[^"]*)"', e2b.Template.to_json(template.recipe(e2b)).replace('\\"', '"')
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert os.access(found, os.X_OK)


def test_a_build_that_fails_says_at_which_step_and_with_which_last_lines(server: E2bServer, tmp_path: Path) -> None:
    server.fail_next_build(step=3, message="command failed: no matching\x1b[31m distribution")
    done = ca(server, tmp_path, "template", "build", "--provider", "e2b", "--name", "broken", "--json")
    error = json.loads(done.stdout)
    assert (done.returncode, error["code"]) == (3, "template_build_failed")
    assert "no matching" in error["detail"] and "(step 3)" in error["detail"] and "\x1b" not in error["detail"]
    assert "| [builder 3/4] RUN python3 -m venv" in error["detail"]
    assert "SANDBOX_TEMPLATE" not in done.stdout
    with pytest.raises(SandboxUnavailable):
        E2BProvider(server.environment).create(SandboxSpec(template="broken"), metadata={})


def test_a_wrong_key_is_refused_with_the_variable_and_without_the_key(server: E2bServer, tmp_path: Path) -> None:
    done = ca(server, tmp_path, "template", "build", "--provider", "e2b", E2B_API_KEY="nvta_secret")
    assert done.returncode == 3 and done.stdout == ""
    assert "E2B_API_KEY" in done.stderr and "NOVITA_API_KEY" in done.stderr and "nvta_secret" not in done.stderr
    assert "Traceback" not in done.stderr
    done = ca(server, tmp_path, "template", "build", "--provider", "novita")
    assert done.returncode == 3 and "NOVITA_API_KEY" in done.stderr


def test_a_provider_that_is_unknown_or_has_no_templates_is_told_from_those_that_have(
    server: E2bServer, tmp_path: Path
) -> None:
    for provider, error in (("nowhere", UnknownProvider), ("local", InvalidInput), ("unsafe-process", InvalidInput)):
        done = ca(server, tmp_path, "template", "build", "--provider", provider)
        assert done.returncode == 2 and error.code in done.stderr
        assert "--provider novita or --provider e2b" in done.stderr
    assert "local has no templates" in ca(server, tmp_path, "template", "build", "--provider", "local").stderr


@pytest.mark.parametrize("name", ["", "Über", "a.b", "a b", "-a", "a" * 65, "name:tag"])
def test_a_name_that_no_template_can_have_is_refused_before_anything_is_asked_for(server: E2bServer, name: str) -> None:
    before = len(server.builds())
    assert isinstance(refusal(server, name=name), InvalidInput)
    assert len(server.builds()) == before


@pytest.mark.parametrize(
    "status, said, expected, words",
    [
        (404, "<h1>page not found</h1>", SandboxUnavailable, "leave that empty"),
        (404, "no route", SandboxUnavailable, "SANDBOX_TEMPLATE"),
        (405, "", SandboxUnavailable, "does not know the call"),
        (403, "forbidden", SandboxUnavailable, "E2B_API_KEY"),
        (403, "team is over its limit", SandboxUnavailable, "billing page"),
        (402, "pay", SandboxUnavailable, "billing page"),
        (400, "CPU count exceeds the limit of 8", SandboxUnavailable, "--cpus"),
        (400, "memory must be even", SandboxUnavailable, "memory must be even"),
        (429, "slow down", ProviderBusy, "429"),
        (500, "sick", ProviderBusy, "500"),
        (502, "<h1>sick</h1>", ProviderBusy, "502"),
        (503, "full", ProviderBusy, "503"),
        (500, "<h1>sick</h1>", ProviderBusy, "none of its API"),
        (200, "<h1>proxy</h1>", ProviderBusy, "none of its API"),
    ],
)
def test_a_service_that_builds_nothing_says_what_to_change(
    server: E2bServer, status: int, said: str, expected: type[CloudAgentError], words: str
) -> None:
    body = said if said.startswith("<") else json.dumps({"code": status, "message": said})
    fault = server.fault("answer", BUILDS, method="POST", count=None, status=status, body=body)
    error = refusal(server)
    assert fault.fired >= 1
    assert type(error) is expected
    assert words in f"{error.message} {error.remedy}"


def test_a_service_that_nobody_listens_for_does_not_answer() -> None:
    api = template.api_of("e2b", {"E2B_API_KEY": "e2b_1", "E2B_API_URL": "http://127.0.0.1:9"})
    with pytest.raises(ProviderBusy, match="does not answer"):
        template.build(api, name="mine", cpus=1, memory_mb=1024, tell=print)


def test_answers_that_are_lost_on_the_way_end_no_build_and_cost_no_line(server: E2bServer) -> None:
    faults = [
        server.fault("cut", STATUS, count=2),
        server.fault("answer", STATUS, status=502, count=4),
        server.fault("answer", STATUS, status=404, body="<html>"),
        server.fault("answer_after", STATUS, status=404, body="<html>", count=2),
    ]
    told: list[str] = []
    build(server, told)
    assert all(fault.fired for fault in faults)
    steps = [line for line in told if line.startswith("[builder ")]
    assert [line.split("]")[0] for line in steps] == [f"[builder {number}/4" for number in range(1, 5)]


def test_a_service_that_says_no_more_of_a_build_is_given_up(server: E2bServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SILENT_S", 1.0)
    server.fault("answer", STATUS, status=500, count=None)
    assert isinstance(refusal(server), ProviderBusy)


def test_a_build_that_takes_too_long_is_not_waited_for_and_says_so(
    server: E2bServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "BUILD_S", 0.0)
    error = refusal(server)
    assert isinstance(error, TemplateBuildFailed) and "may still go on" in error.message


def test_where_a_service_knows_no_names_the_id_is_what_to_set(server: E2bServer) -> None:
    server.fault("answer", "/templates/aliases/.*", status=404, body="404 page not found", count=None)
    built = build(server)
    assert built.sandbox_template == built.template_id == server.builds()[-1]["template"]


@pytest.mark.parametrize("name", [None, DEFAULT])
def test_the_doctor_tells_whether_a_template_is_set(server: E2bServer, tmp_path: Path, name: str | None) -> None:
    env = {"SANDBOX_PROVIDER": "e2b", **({"SANDBOX_TEMPLATE": name} if name else {})}
    findings = {found["name"]: found for found in json.loads(ca(server, tmp_path, "doctor", "--json", **env).stdout)}
    found = findings["template"]
    assert found["ok"]
    assert found["message"] == name if name else "a minute or more" in found["message"]
    assert found["remedy"] is None if name else "ca template build --provider e2b" in found["remedy"]


def test_the_doctor_does_not_ask_for_a_template_where_there_are_none(server: E2bServer, tmp_path: Path) -> None:
    out = ca(server, tmp_path, "doctor", "--json", SANDBOX_PROVIDER="local").stdout
    assert "template" not in [found["name"] for found in json.loads(out)]
