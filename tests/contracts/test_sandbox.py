"""What every sandbox provider promises: the checks of the product itself, over each provider.

`CLOUDAGENT_TEST_PROVIDER=novita`, with the provider's own variables beside it, has them run against a real account.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from cloudagent_queue.sandboxes import PLAIN, Provider, SandboxSpec, open_provider
from cloudagent_queue.sandboxes.contract import CHECKS, Check, Trial, ended, has, until
from cloudagent_queue.sandboxes.local import LocalProvider, LocalSandbox
from tests.conftest import REAL_PROVIDER
from tests.support.e2b_server.client import E2bServer, e2b_server

CLOSED = "local, closed"
PROVIDERS = [REAL_PROVIDER.name] if REAL_PROVIDER is not None else ["local", CLOSED, "unsafe-process", "e2b"]

START_AND_DIE = """
import json, os, pathlib, signal, sys
from cloudagent_queue.sandboxes import open_provider
name, folder, env, mark = sys.argv[1], pathlib.Path(sys.argv[2]), json.load(sys.stdin), json.loads(sys.argv[3])
sandbox = open_provider(name, data_folder=folder, env=env).create(metadata=mark)
sandbox.start(["sh", "-c", "echo begun > begun; until [ -e go ]; do sleep 0.02; done; echo ended > ended"], env={})
print(sandbox.id, flush=True)
os.killpg(0, signal.SIGKILL)
"""


class Closed(LocalProvider):
    """`local`, with a network of its own for each sandbox: everything else is as it was."""

    def create(self, spec: SandboxSpec = PLAIN, *, metadata: Mapping[str, str]) -> LocalSandbox:
        return super().create(replace(spec, egress=["example.com"]), metadata=metadata)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[E2bServer]:
    with e2b_server(tmp_path_factory.mktemp("e2b")) as running:
        yield running


@pytest.fixture(params=PROVIDERS)
def environment(request: pytest.FixtureRequest) -> tuple[str, dict[str, str]]:
    """The provider's name and its variables."""
    if REAL_PROVIDER is not None:
        return REAL_PROVIDER
    if request.param != "e2b":
        return request.param.partition(",")[0], {}
    running: E2bServer = request.getfixturevalue("server")
    return "e2b", running.environment


@pytest.fixture
def provider(request: pytest.FixtureRequest, environment: tuple[str, dict[str, str]], tmp_path: Path) -> Provider:
    if CLOSED in request.node.name:
        return Closed(tmp_path / "sandboxes")
    name, env = environment
    return open_provider(name, data_folder=tmp_path, env=env)


@pytest.fixture
def trial(provider: Provider) -> Iterator[Trial]:
    provider.self_check()
    made = Trial(provider)
    yield made
    made.end()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Check, trial: Trial) -> None:
    check(trial)


def test_a_started_command_outlives_the_process_that_started_it(
    environment: tuple[str, dict[str, str]], trial: Trial, tmp_path: Path
) -> None:
    name, env = environment
    starter = subprocess.run(
        [sys.executable, "-c", START_AND_DIE, name, str(tmp_path), json.dumps(trial.mark)],
        input=json.dumps(env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )
    assert starter.returncode == -9, starter.stderr
    adopted = trial.provider.connect(starter.stdout.strip())
    assert adopted.alive()
    until(has(adopted, "begun"), "it did not begin")
    adopted.write("go", b"")
    until(ended(adopted), "it did not end")
    assert adopted.read("ended", max_bytes=100) == b"ended\n"


def test_the_environment_of_the_host_does_not_leak(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST_CANARY", "chirp")
    sandbox = trial.fresh()
    assert "chirp" not in sandbox.run(["env"], timeout_s=20).output
    sandbox.start(["sh", "-c", "env > seen"], env={})
    until(ended(sandbox), "it did not end")
    seen = sandbox.read("seen", max_bytes=100_000)
    assert b"HOME=" in seen
    assert b"chirp" not in seen


def test_a_trial_ends_every_sandbox_that_it_made_and_no_other(provider: Provider) -> None:
    other, trial = Trial(provider), Trial(provider)
    kept = other.fresh()
    trial.fresh()
    shared = trial.shared
    trial.end_fresh()
    assert [info.id for info in provider.list(trial.mark)] == [shared.id]
    trial.end()
    assert provider.list(trial.mark) == []
    assert [info.id for info in provider.list(other.mark)] == [kept.id]
    other.end()
