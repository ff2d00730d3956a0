"""Which files an agent touches, by what it says of its own tool calls: hostile input."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudagent_queue.follow import LogReader
from cloudagent_queue.redact import Redactor
from cloudagent_queue.touches import PATH_MAX, PATHS_MAX, TOTAL_MAX, Touches

FOLDER = "/box/repository"


def seen(*calls: tuple[str, Any]) -> tuple[str, ...]:
    touches = Touches(folder=FOLDER)
    for name, argument in calls:
        touches.see({"type": "ToolUseBlock", "name": name, "input": argument})
    return touches.paths


def test_each_tool_that_writes_names_its_file() -> None:
    assert seen(
        ("Edit", {"file_path": f"{FOLDER}/src/calc.py", "old_string": "a"}),
        ("Write", {"file_path": "new.txt"}),
        ("MultiEdit", {"file_path": f"{FOLDER}/./src/../b.py"}),
        ("NotebookEdit", {"notebook_path": f"{FOLDER}/n.ipynb"}),
        ("Edit", {"file_path": f"{FOLDER}/src/calc.py"}),
    ) == ("b.py", "n.ipynb", "new.txt", "src/calc.py")


def test_what_only_reads_or_lies_elsewhere_is_not_touched() -> None:
    assert not seen(
        ("Read", {"file_path": f"{FOLDER}/a"}),
        ("Bash", {"command": "rm a"}),
        ("Write", {"file_path": "/tmp/a"}),
        ("Write", {"file_path": f"{FOLDER}/../home/a"}),
        ("Write", {"file_path": f"{FOLDER}2/a"}),
        ("Write", {"file_path": "../a"}),
        ("Write", {"file_path": FOLDER}),
        ("Write", {"file_path": "."}),
        ("Write", {"file_path": ""}),
        ("Write", {"file_path": ".git/config"}),
        ("Write", {"file_path": "a/../.git/config"}),
        ("Write", {"notebook_path": "a"}),
        ("Write", {"file_path": ["a"]}),
        ("Write", ["a"]),
        ("Write", None),
    )
    assert Touches().paths == () and seen(("Edit", {"file_path": ".gitignore"})) == (".gitignore",)
    Touches().see({"name": ["Edit"], "input": {}})


def test_there_are_never_many_nor_long_ones() -> None:
    many = seen(*(("Write", {"file_path": f"{number:04}"}) for number in range(2 * PATHS_MAX)))
    assert len(many) == PATHS_MAX
    assert seen(("Write", {"file_path": "x" * PATH_MAX}), ("Write", {"file_path": "x" * (PATH_MAX + 1)})) == (
        "x" * PATH_MAX,
    )
    long = seen(*(("Write", {"file_path": f"{number:0{PATH_MAX}}"}) for number in range(PATHS_MAX)))
    assert sum(map(len, long)) == TOTAL_MAX // PATH_MAX * PATH_MAX


@given(st.text())
def test_no_path_leads_out_of_the_repository(path: str) -> None:
    touches = Touches(folder=FOLDER)
    for name in (path, f"{FOLDER}/{path}", f"a/{path}"):
        touches.add(name)
    for found in touches.paths:
        assert not found.startswith("/") and found.split("/")[0] not in ("", ".", "..", ".git")
        assert ".." not in found.split("/") and len(found) <= PATH_MAX


def test_there_is_news_only_when_there_are_more() -> None:
    touches = Touches(["a"], folder=FOLDER)
    assert touches.news() is None
    touches.add("a")
    assert touches.news() is None
    touches.add("b")
    assert touches.news() == ("a", "b")
    assert touches.news() is None


@pytest.mark.parametrize("secret", [False, True])
def test_a_log_is_read_for_them(secret: bool) -> None:
    touches = Touches(folder=FOLDER)
    path = f"{FOLDER}/sk-secret-0123456789.txt" if secret else f"{FOLDER}/calc.py"
    call = {"kind": "tool_use", "message": "x", "raw": {"id": "t", "name": "Edit", "input": {"file_path": path}}}
    result = {**call, "kind": "tool_result"}
    log = LogReader(0, Redactor(["sk-secret-0123456789"]), touches=touches)
    log.take(b"".join(json.dumps(entry).encode() + b"\n" for entry in (result, {**call, "raw": None}, "x")))
    assert touches.news() is None
    log.take(json.dumps(call).encode() + b"\n")
    (found,) = touches.paths
    assert touches.news() and "sk-secret" not in found and (secret or found == "calc.py")
