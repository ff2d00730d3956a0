"""A session that was kept, altered, moved or lies in the way: brought home, or refused by reason, and nothing lost."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cloudagent_mcp import session_home
from cloudagent_mcp.app import App
from cloudagent_mcp.server import http_app
from cloudagent_mcp.session_home import SessionHome, bring_home, take_along, unpack
from cloudagent_queue.agents.claude_session import count_turns_of_session
from cloudagent_queue.seal import seal, unseal
from cloudagent_storage.errors import (
    CloudAgentError,
    NoSession,
    NotReady,
    SessionDiverged,
    SessionForeign,
    SessionMalformed,
    SessionPlaceUnsafe,
    SessionTampered,
    StartGiven,
    TargetNotAllowed,
    TaskExpired,
    TaskNotFound,
)
from cloudagent_storage.records import LOCAL_ACCOUNT, TaskSpec, TaskStatus
from cloudagent_storage.secrets import Keyring, generate_key
from tests.support.sessions import HONEST, SESSION_ID, assistant, session, told, user
from tests.support.stored import at_once
from tests.support.worlds import World

HEADERS = {"Authorization": "Bearer a-key", "Host": "127.0.0.1:8420"}
TASK = "task_" + "a" * 26
OTHER = "task_" + "b" * 26
LONGER = session([*HONEST, user(5, "And now?", 4), assistant(6, told("Done."), parent=5)])


@pytest.fixture
def app(world: World, tmp_path: Path) -> App:
    return world.app(tmp_path)


def ended(app: App, *, account_id: str = LOCAL_ACCOUNT, kept: bytes | None = None, task_id: str = TASK) -> str:
    """A task that has ended, with this as its session; sealed as a worker seals it unless it is given."""
    app.store.accounts.ensure(account_id)
    spec = TaskSpec(prompt="x", title="x", verify="true", model="m")
    app.store.tasks.add(account_id, spec, task_id=task_id, base_sha="0" * 40)
    claim = app.store.tasks.claim(task_id, worker="w", lease_s=60)
    assert claim is not None
    sealed = seal(app.settings.keyring, session(), account_id=account_id, task_id=task_id, attempt=1)
    app.store.blobs.put(task_id, "session", sealed if kept is None else kept, attempt=1)
    app.store.tasks.finish(task_id, 1, status=TaskStatus.COMPLETED)
    return task_id


def altered(sealed: bytes, **changes: Any) -> bytes:
    """The same session behind a header that says something else."""
    header, _, rest = sealed.partition(b"\n")
    return json.dumps({**json.loads(header), **changes}).encode() + b"\n" + rest


def sealed_by(keyring: Keyring, task_id: str = TASK) -> bytes:
    return seal(keyring, session(), account_id=LOCAL_ACCOUNT, task_id=task_id, attempt=1)


# -- the seal ---------------------------------------------------------------------------------------------------------


CHANGES: Sequence[tuple[Callable[[bytes], bytes], type[CloudAgentError] | None]] = (
    (lambda sealed: sealed, None),
    (lambda sealed: sealed.replace(b"Fix add", b"Fix sub"), SessionTampered),
    (lambda sealed: sealed + b" ", SessionTampered),
    (lambda sealed: altered(sealed, attempt=2), SessionTampered),
    (lambda sealed: altered(sealed, attempt=-1), SessionForeign),
    (lambda sealed: altered(sealed, task_id=OTHER), SessionTampered),
    (lambda sealed: altered(sealed, account_id="other"), SessionTampered),
    (lambda sealed: altered(sealed, mac="0" * 64), SessionTampered),
    (lambda sealed: altered(sealed, mac=""), SessionTampered),
    (lambda sealed: altered(sealed, mac="\ud800"), SessionTampered),
    (lambda sealed: altered(sealed, mac=None), SessionForeign),
    (lambda sealed: altered(sealed, attempt="1"), SessionForeign),
    (lambda sealed: altered(sealed, attempt=True), SessionForeign),
    (lambda sealed: altered(sealed, account_id=["local"]), SessionForeign),
    (lambda sealed: altered(sealed, more="x" * 2000), SessionForeign),
    (lambda sealed: sealed.partition(b"\n")[2], SessionForeign),
    (lambda sealed: b"", SessionForeign),
    (lambda sealed: b"[" * 900 + b"\n", SessionForeign),
    (lambda sealed: b"{}\n" + sealed, SessionForeign),
    (lambda _: sealed_by(Keyring([generate_key()])), SessionTampered),
)


@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_only_what_was_sealed_here_for_this_task_is_handed_out(
    app: App, change: Callable[[bytes], bytes], reason: type[CloudAgentError] | None
) -> None:
    task_id = ended(app, kept=change(sealed_by(app.settings.keyring)))
    with TestClient(http_app(app, key="a-key", host="127.0.0.1", port=8420), headers=HEADERS) as http:
        answer = http.get(f"/api/v1/tasks/{task_id}/session")
        if reason is None:
            assert answer.content == session() and answer.headers["Repr-Digest"].startswith("sha-256=:")
            return
        assert (answer.status_code, answer.json()["code"]) == (409, reason.code)
        follow_up = {"prompt": "Go on", "continue_task_id": task_id}
        assert http.post("/api/v1/tasks", json=follow_up).json()["code"] == reason.code
        assert http.get("/api/v1/tasks").json()["total"] == 1


def test_the_session_of_one_task_is_not_anothers_and_an_earlier_key_still_opens_it(app: App) -> None:
    mine = sealed_by(app.settings.keyring, OTHER)
    with pytest.raises(SessionForeign):
        app.sessions.session(app.local_caller(), ended(app, kept=mine))
    old, new = generate_key(), generate_key()
    sealed = seal(Keyring([old]), b"x", account_id="a", task_id=TASK, attempt=1)
    assert unseal(Keyring([new, old]), sealed, account_id="a", task_id=TASK) == b"x"
    with pytest.raises(SessionForeign):
        unseal(Keyring([old]), sealed, account_id="b", task_id=TASK)


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_what_cannot_be_gone_on_from_is_refused_by_reason(app: App) -> None:
    async def submit(**arguments: Any) -> Any:
        return await app.operations["submit_task"].call(app.local_caller(), {"prompt": "Go on", **arguments})

    task_id = ended(app)
    for arguments, reason in (
        ({"continue_task_id": OTHER}, TaskNotFound),
        ({"continue_task_id": "nonsense"}, TaskNotFound),
        ({"continue_task_id": ended(app, account_id="theirs", task_id="task_" + "c" * 26)}, TaskNotFound),
        ({"continue_task_id": task_id, "repository": "none"}, StartGiven),
        ({"continue_task_id": task_id, "base_ref": "main"}, StartGiven),
        ({"continue_task_id": app.store.tasks.add(LOCAL_ACCOUNT, TaskSpec(prompt="x", title="x")).task_id}, NotReady),
    ):
        with pytest.raises(reason):
            await submit(**arguments)
    silent = app.store.tasks.add(LOCAL_ACCOUNT, TaskSpec(prompt="x", title="x"), task_id=OTHER)
    app.store.tasks.request_cancel(LOCAL_ACCOUNT, silent.task_id)
    with pytest.raises(NoSession):
        await submit(continue_task_id=silent.task_id)

    once = await submit(continue_task_id=task_id, idempotency_key="k", verify="false")
    assert (once.parent_task_id, once.model) == (task_id, "m")
    assert app.store.tasks.spec(LOCAL_ACCOUNT, once.task_id).verify == "false"
    app.store.retention.prune(max_age_s=0, max_bytes=None)
    with pytest.raises(TaskExpired):
        await submit(continue_task_id=task_id)
    # The same submit once more is still that task, whatever has become of the one before.
    again = await submit(continue_task_id=task_id, idempotency_key="k", verify="false")
    assert again.replayed and again.task_id == once.task_id


# -- taking one along -------------------------------------------------------------------------------------------------


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ("no base64!", "session_malformed"),
        (base64.b64encode(b"no zlib").decode(), "session_malformed"),
        (packed(b"no json"), "session_malformed"),
        (packed(session(session_id="../x")), "session_malformed"),
        (packed(b" " * 60_000_000), "session_too_large"),
        ("A" * 3_000_001, "out_of_range"),
    ],
)
def test_a_conversation_that_is_sent_along_is_checked_as_one_from_a_sandbox(app: App, sent: str, code: str) -> None:
    with TestClient(http_app(app, key="a-key", host="127.0.0.1", port=8420), headers=HEADERS) as http:
        refused = http.post("/api/v1/tasks", json={"prompt": "Go on", "session": sent}).json()
        assert (refused["code"], refused["field"]) == (code, "session")
        both = {"prompt": "Go on", "session": packed(session()), "continue_task_id": TASK}
        assert http.post("/api/v1/tasks", json=both).json()["code"] == "start_given"
        for name in ("session", "continue_task_id"):
            schedule = {"name": "n", "cron": "0 3 * * *", "task": {"prompt": "x", name: both[name]}}
            assert http.post("/api/v1/schedules", json=schedule).json()["code"] == "unknown_argument"
        assert http.get("/api/v1/tasks").json()["total"] == 0


def test_what_is_taken_along_is_what_was_said_as_a_session_of_its_own_and_without_secrets(app: App, home: Home) -> None:
    key = "sk-ant-test-0123456789abcdef"
    home.project.mkdir(parents=True)
    said = [*HONEST, user(5, f"My key is {key}", 4)]
    home.file.write_text("".join(f"{json.dumps(one)}\n" for one in said) + '{"type":"user","mes')
    (home.project / f"{SESSION_ID[:-1]}b.jsonl").write_text("{}\n")
    os.utime(home.project / f"{SESSION_ID[:-1]}b.jsonl", (1, 1))
    where: Any = {"directory": home.directory, "environment": home.environment}
    sent = take_along("current", **where)
    assert sent == take_along(SESSION_ID, **where)
    assert b"permission" not in unpack(sent) and str(home.directory).encode() not in unpack(sent)
    elsewhere: Any = {"directory": home.directory.parent, "environment": home.environment}
    started_from = {**home.environment, "CLAUDE_CODE_SESSION_ID": SESSION_ID}
    assert take_along("current", directory=home.directory.parent, environment=started_from) == sent
    for name in ("current", "../../x", "*", SESSION_ID.replace("a", "c")):
        with pytest.raises(NoSession):
            take_along(name, **elsewhere)
    caller = app.local_caller()
    sealed = app.sessions.taken_along(caller, sent, for_task=TASK, secrets=[key])
    kept = unseal(app.settings.keyring, sealed, account_id=LOCAL_ACCOUNT, task_id=TASK)
    assert key.encode() not in kept and SESSION_ID.encode() not in kept
    assert count_turns_of_session(kept) == 5


# -- the place --------------------------------------------------------------------------------------------------------


class Home:
    """A user's home, and what `bring_home` makes of it."""

    def __init__(self, folder: Path) -> None:
        self.claude = folder / "home" / ".claude"
        self.directory = folder / "calc.v2"
        self.project = self.claude / "projects" / "".join(c if c.isalnum() else "-" for c in str(self.directory))
        self.file = self.project / f"{SESSION_ID}.jsonl"
        self.environment = {"HOME": str(folder / "home")}
        (folder / "home").mkdir()
        self.directory.mkdir()

    def bring(self, data: bytes | None = None) -> SessionHome:
        return bring_home(data or session(), task_id=TASK, directory=self.directory, environment=self.environment)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_it_is_placed_extended_and_left_alone_and_no_turn_is_lost(home: Home) -> None:
    done = home.bring()
    assert (done.outcome, done.turns) == ("placed", 4)
    assert done.command == f"cd {home.directory} && claude --resume {SESSION_ID}"
    assert len(home.file.read_bytes().splitlines()) == 4 and home.file.stat().st_mode & 0o777 == 0o600
    assert home.bring().outcome == "already_here"
    assert home.bring(LONGER).outcome == "extended" and len(home.file.read_bytes().splitlines()) == 6
    with home.file.open("ab") as file:
        file.write(b'{"type":"user","message":"mine"}\n')
    mine = home.file.read_bytes()
    assert home.bring(LONGER).outcome == home.bring().outcome == "already_here"
    with pytest.raises(SessionDiverged):
        home.bring(session([*HONEST, user(7, "Something else", 4)]))
    assert home.file.read_bytes() == mine
    assert [path.name for path in home.project.iterdir()] == [home.file.name], "nothing else is left"


def test_of_several_that_come_at_once_one_is_placed_and_no_other_is_written_over_it(home: Home) -> None:
    def bring(number: int) -> SessionHome | None:
        try:
            return home.bring(session([user(1, f"This is {number}.")]))
        except SessionDiverged:
            return None

    placed = [done for done in at_once(*(partial(bring, number) for number in range(8))) if done is not None]
    assert len(placed) == 1 and hashlib.sha256(home.file.read_bytes()).hexdigest() == placed[0].sha256


def test_a_crash_in_the_middle_of_adding_leaves_what_the_next_one_completes(home: Home) -> None:
    home.bring(LONGER)
    whole = home.file.read_bytes()
    for length in range(0, len(whole), 97):
        home.file.write_bytes(whole[:length])
        assert home.bring(LONGER).outcome == "extended" and home.file.read_bytes() == whole


def test_another_session_of_the_same_id_is_not_touched(home: Home) -> None:
    home.project.mkdir(parents=True)
    home.file.write_text("mine\n")
    with pytest.raises(SessionDiverged):
        home.bring()
    assert home.file.read_text() == "mine\n"


@pytest.mark.parametrize("place", ["file", "broken", "project", "projects", "hard link", "fifo", "folder", "no folder"])
def test_nothing_is_written_through_what_lies_in_the_way(home: Home, tmp_path: Path, place: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / "victim"
    victim.write_bytes(b"")  # the beginning of any session: it would be added to
    links = {"file": (home.file, victim), "broken": (home.file, outside / "new")}
    links |= {"project": (home.project, outside), "projects": (home.project.parent, outside)}
    above = home.project if place in ("file", "broken", "hard link", "fifo", "folder") else home.project.parent
    (above if place == "project" or above is home.project else home.claude).mkdir(parents=True)
    match place:
        case "hard link":
            home.file.hardlink_to(victim)
        case "fifo":
            os.mkfifo(home.file)
        case "folder":
            home.file.mkdir()
        case "no folder":
            home.project.parent.write_text("")
        case _:
            link, target = links[place]
            link.symlink_to(target)
    with pytest.raises(SessionPlaceUnsafe) as refused:
        home.bring()
    assert refused.value.message == SessionPlaceUnsafe().message
    assert [path.name for path in outside.iterdir()] == ["victim"] and victim.read_bytes() == b""


def test_a_users_own_link_to_claude_codes_folder_is_followed_and_another_one_may_be_named(home: Home) -> None:
    elsewhere = home.claude.parent / "dotfiles"
    elsewhere.mkdir()
    home.claude.symlink_to(elsewhere)
    home.bring()
    assert len(list(elsewhere.rglob("*.jsonl"))) == 1
    home.environment["CLAUDE_CONFIG_DIR"] = str(home.claude.parent / "named")
    assert home.bring().outcome == "placed"
    for environment in ({}, {"HOME": ""}):
        with pytest.raises(SessionPlaceUnsafe):
            bring_home(session(), task_id=TASK, directory=home.directory, environment=environment)


@pytest.mark.parametrize("directory", ["missing", "a file"])
def test_there_has_to_be_a_directory_to_go_on_in(home: Home, directory: str) -> None:
    (home.directory.parent / "a file").write_text("")
    home.directory = home.directory.parent / directory
    with pytest.raises(TargetNotAllowed):
        home.bring()
    assert not home.claude.exists()


def test_a_session_of_which_a_turn_was_lost_on_the_way_is_not_placed(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_more(session: bytes) -> int:
        return count_turns_of_session(session) + 1

    monkeypatch.setattr(session_home, "count_turns_of_session", one_more)
    with pytest.raises(SessionMalformed, match="lost"):
        home.bring()
    assert not home.claude.exists()


def test_a_session_that_is_refused_leaves_nothing_behind(home: Home) -> None:
    with pytest.raises(SessionMalformed):
        home.bring(session(session_id="../../../../escaped"))
    assert not home.claude.exists()


def test_a_name_with_quotes_is_a_line_that_can_be_typed(home: Home) -> None:
    home.directory = home.directory.parent / "it's; $(touch pwned)"
    home.directory.mkdir()
    line = home.bring().command.replace("claude --resume", "printf %s")
    done = subprocess.run(["/bin/sh", "-c", line], cwd=home.directory.parent, capture_output=True, text=True)
    assert done.stdout == SESSION_ID and not list(home.directory.parent.rglob("pwned"))


def test_ca_says_how_to_go_on_and_why_not(world: World, app: App, tmp_path: Path) -> None:
    task_id = ended(app)

    def ca(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cloudagent_mcp", "task", "resume", task_id[:12], *words]
        return subprocess.run(command, cwd=tmp_path, env=world.environment, capture_output=True, text=True)

    done = ca("--run")
    assert done.returncode == 0 and f"claude --resume {SESSION_ID}" in done.stdout and "4 messages" in done.stdout
    assert "not to be found" in done.stderr, "there is no `claude` on the path here"
    (kept,) = Path(world.environment["HOME"]).rglob(f"{SESSION_ID}.jsonl")
    kept.write_text("mine\n")
    refused = ca("--json")
    assert refused.returncode == 1 and json.loads(refused.stdout)["code"] == "session_diverged"
