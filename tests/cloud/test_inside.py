"""What an agent may do to its sandbox, what a snapshot keeps of it, and what a plain one is given."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest

from cloudagent_queue.sandboxes import SandboxSpec, inside
from cloudagent_queue.sandboxes.contract import until
from cloudagent_queue.sandboxes.e2b import E2BProvider, E2BSandbox
from cloudagent_storage.errors import (
    SandboxError,
    SandboxUnavailable,
)
from tests.support.e2b_server.client import E2bServer

ONE = "/sandboxes/[a-z0-9]+"
"""The path of one sandbox in the control plane."""


def test_a_sandbox_that_an_agent_has_broken_is_neither_gone_nor_out_of_reach(sandbox: E2BSandbox) -> None:
    sandbox.run(["rm", "-rf", inside.FOLDER], timeout_s=20)
    with pytest.raises(SandboxError) as raised:
        sandbox.alive()
    assert type(raised.value) is SandboxError


def test_an_agent_that_deletes_its_folder_loses_files_and_nothing_else(sandbox: E2BSandbox) -> None:
    sandbox.start(["sh", "-c", "rm -rf /home/user/sandbox; sleep 600"], env={})
    until(lambda: sandbox.read("home", max_bytes=1) == b"", "it did not happen")
    assert sandbox.alive()
    with pytest.raises(SandboxError, match="folder"):
        sandbox.run(["true"], timeout_s=20)


def test_the_secrets_of_a_started_command_are_in_no_process_list(sandbox: E2BSandbox) -> None:
    sandbox.start(["sleep", "600"], env={"ANTHROPIC_API_KEY": "sk-ant-canary"})
    script = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '; ps -ef 2>/dev/null; true"
    seen = sandbox.run(["sh", "-c", script], timeout_s=20).output
    assert "sleep 600" in seen
    assert "canary" not in seen


def test_what_a_snapshot_holds_is_there_in_a_sandbox_made_from_it(provider: E2BProvider, sandbox: E2BSandbox) -> None:
    sandbox.write("kept", b"work")
    sandbox.run(["sh", "-c", "echo set up > setup.log"], timeout_s=20)
    template = sandbox.snapshot()
    assert template is not None
    assert sandbox.run(["cat", "kept"], timeout_s=20).output == "work"  # it goes on
    second = provider.create(SandboxSpec(template=template), metadata={})
    assert second.read("kept", max_bytes=10) == b"work"
    assert second.read("setup.log", max_bytes=10) == b"set up\n"
    second.start(["true"], env={})


def test_a_service_without_snapshots_has_none(server: E2bServer, sandbox: E2BSandbox) -> None:
    for status in (404, 405, 501):
        server.fault("answer", f"{ONE}/snapshots", status=status)
        assert sandbox.snapshot() is None
    assert not sandbox.alive()


def bare_template(server: E2bServer, provider: E2BProvider, tmp_path: Path, *, with_library: bool) -> str:
    """A template without the agent's library, whose pip knows a folder of packages and no index."""
    import importlib.metadata

    from e2b import Sandbox

    version = importlib.metadata.version("claude-agent-sdk")
    wheel = tmp_path / f"claude_agent_sdk-{version}-py3-none-any.whl"
    about = f"claude_agent_sdk-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("claude_agent_sdk/__init__.py", "")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: claude-agent-sdk\nVersion: {version}\n")
        file.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{about}/RECORD", "")
    box = Sandbox.create("bare", timeout=600, **server.options)
    if with_library:
        box.files.write(f"/home/user/wheels/{wheel.name}", wheel.read_bytes())
    box.files.write("/home/user/.config/pip/pip.conf", "[global]\nno-index = true\nfind-links = /home/user/wheels\n")
    template = box.create_snapshot().snapshot_id
    box.kill()
    return template


@pytest.mark.skipif(
    subprocess.run(["/usr/bin/python3", "-c", "import venv, ensurepip"], capture_output=True, check=False).returncode
    != 0,
    reason="needs a /usr/bin/python3 that can make virtual environments",
)
def test_a_plain_sandbox_is_prepared_and_says_so(server: E2bServer, provider: E2BProvider, tmp_path: Path) -> None:
    template = bare_template(server, provider, tmp_path, with_library=True)
    sandbox = provider.create(SandboxSpec(template=template), metadata={})
    assert sandbox.remark is not None and "Prepared a plain sandbox" in sandbox.remark
    found = sandbox.run(
        [sandbox.python, "-c", "import claude_agent_sdk; print(claude_agent_sdk.__file__)"], timeout_s=20
    )
    assert found.output.startswith(f"{inside.FOLDER}/venv/")


def test_a_plain_sandbox_that_cannot_be_prepared_is_killed(
    server: E2bServer, provider: E2BProvider, tmp_path: Path
) -> None:
    template = bare_template(server, provider, tmp_path, with_library=False)
    with pytest.raises(SandboxUnavailable) as raised:
        provider.create(SandboxSpec(template=template), metadata={"task": "plain"})
    assert "ca template build --provider e2b" in raised.value.remedy
    assert provider.list({"task": "plain"}) == []
