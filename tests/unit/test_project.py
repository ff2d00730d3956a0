"""Rules of the project that a machine can check: documentation that cannot rot, and the traps of the layout."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cloudagent_mcp.cli import ca
from cloudagent_mcp.client import MARKS
from cloudagent_mcp.settings import Settings
from cloudagent_storage import errors

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
SOURCES = [
    path
    for folder in ("cloudagent_mcp", "queue", "storage", "tests", "examples")
    for path in (ROOT / folder).rglob("*.py")
]


def test_every_setting_is_in_the_example_of_the_environment() -> None:
    described = (ROOT / ".env.example").read_text()
    for name in Settings.model_fields:
        if name != "environment":
            assert re.search(rf"^#{name.upper()}=", described, re.MULTILINE), name


def test_every_variable_of_the_example_is_a_setting_or_the_agents() -> None:
    from cloudagent_queue.agents import open_agent

    known = {name.upper() for name in Settings.model_fields} | set(open_agent("claude").environment)
    assert set(re.findall(r"^#([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)) <= known


def test_every_operation_and_its_route_are_in_the_readme() -> None:
    for name, marked in MARKS.items():
        assert f"`{name}`" in README
        assert f"`{marked.method} /api/v1{marked.path}`" in README


def test_every_command_of_the_readme_exists() -> None:
    for words in re.findall(r"\bca ((?:task |schedule |key )?[a-z]+)\b", README):
        command: click.Command = ca
        for word in words.split():
            assert isinstance(command, click.Group)
            assert word in command.commands, f"ca {words}"
            command = command.commands[word]


def test_the_readme_begins_with_the_two_commands_and_ci_runs_the_second() -> None:
    assert README.index("uv run ca demo") < README.index("uv run pytest") < 1000
    assert "uv run pytest" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("folder", ["queue", "storage", "tests"])
def test_no_folder_shadows_the_standard_library(folder: str) -> None:
    assert not list((ROOT / folder).glob("__init__.py")) and not list((ROOT / "tests").rglob("__init__.py"))


def test_the_standard_librarys_queue_is_found_from_the_root() -> None:
    code = "import queue; assert queue.Queue; import cloudagent_queue"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_file_is_longer_than_600_lines() -> None:
    long = {path.name: count for path in SOURCES if (count := len(path.read_text().splitlines())) > 600}
    assert not long


def every_error(kind: type[errors.CloudAgentError] = errors.CloudAgentError) -> list[type[errors.CloudAgentError]]:
    return [found for child in kind.__subclasses__() for found in (child, *every_error(child))]


def test_every_error_has_a_sentence_a_code_and_a_place_in_the_tree() -> None:
    drawn = errors.__doc__ or ""
    kinds = [kind for kind in every_error() if kind.__module__ == errors.__name__]
    assert len({kind.code for kind in kinds}) == len(kinds)
    for kind in kinds:
        assert kind().message.endswith(".") and kind.remedy.endswith("."), kind
        assert re.search(rf"\b{kind.__name__}\b", drawn) or kind.__name__ == "InvalidInput", kind
        assert re.fullmatch("[a-z_]+", kind.code)
