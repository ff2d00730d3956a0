"""Two versions of the product side by side, as during every deployment: the tables are already those of the newer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cloudagent_mcp import __version__
from tests.support.installation import ROOT, Installation, Process
from tests.support.worlds import until

NEWER = "99.0.0"
PACKAGES = ("cloudagent_mcp", "queue/cloudagent_queue", "storage/cloudagent_storage")
MIGRATION = """
# ruff: noqa: INP001
from peewee import SQL, BigAutoField, IntegerField, TextField


def up(migrator, db):
    class Newer(db.Model):
        number = BigAutoField()
        task_id = TextField()

        class Meta:
            table_name = "newer"

    Newer.create_table(safe=False)
    migrator.migrate(
        migrator.add_column("tasks", "newer_note", TextField(null=True)),
        migrator.add_column("tasks", "newer_count", IntegerField(default=7, constraints=[SQL("DEFAULT 7")])),
        migrator.add_column("events", "newer_origin", TextField(default="agent", constraints=[SQL("DEFAULT 'agent'")])),
        migrator.add_index("tasks", ("newer_note", "status")),
    )
"""


def newer_version(folder: Path) -> dict[str, str]:
    """A copy of the packages that calls itself newer and brings a migration; the environment that starts it."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / Path(package).name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "cloudagent_mcp" / "__init__.py").write_text(f'__version__ = "{NEWER}"\n')
    (folder / "cloudagent_storage" / "migrations" / "9000_newer.py").write_text(MIGRATION)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


@pytest.mark.full
def test_tasks_go_back_and_forth_between_an_old_and_a_newer_version(installation: Installation, tmp_path: Path) -> None:
    newer = newer_version(tmp_path / "newer")

    def start(env: dict[str, str], version: str) -> Process:
        worker = installation.start_worker(concurrency=6, env=env)
        assert f"of version {version} takes" in worker.log()
        return worker

    def submit_from(env: dict[str, str]) -> list[str]:
        prompt = {"steps": 30, "step_s": 0.05, "gate": "go"}
        submit = installation.start_submit([installation.arguments(prompt, {"verify": "true"})] * 2, env=env)
        assert submit.wait() == 0, submit.log()
        accepted = submit.log().split()
        installation.accepted += accepted
        return accepted

    def hand_over(to: Process) -> None:
        def owners() -> set[str]:
            return {str(installation.column(task, "owner")).rpartition("/")[2] for task in tasks}

        until(lambda: owners() == {str(to.pid)}, f"{to.name} has the tasks", 60)

    old = start({}, __version__)
    tasks = submit_from({})
    hand_over(old)
    new = start(newer, NEWER)
    assert installation.column(tasks[0], "newer_count") == 7
    # Both work, on the newer tables, and so do clients of both.
    tasks_of_both = submit_from({}) + submit_from(newer)
    assert [installation.column(task, "newer_count") for task in tasks_of_both] == [7] * 4
    for task in [*tasks, *tasks_of_both]:
        installation.await_calls(task)
    old.stop()
    hand_over(new)
    old = start({}, __version__)  # rolled back, onto tables that it does not know
    new.stop()
    hand_over(old)
    new = start(newer, NEWER)
    old.kill()
    hand_over(new)
    tasks += tasks_of_both
    installation.open_gate("go")
    installation.conclude()
    assert new.alive and all(installation.task(task).verdict == "passed" for task in tasks)
