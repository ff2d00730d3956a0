"""Keys of accounts: who is let in, for how long, and what that costs the database."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import anyio
import pytest
from starlette.testclient import TestClient

from cloudagent_mcp import api_keys
from cloudagent_mcp.api_keys import ApiKeyCheck, create_key
from cloudagent_mcp.server import http_app
from cloudagent_storage.errors import CloudAgentError, DatabaseUnavailable, Unauthorized
from cloudagent_storage.records import LOCAL_ACCOUNT
from cloudagent_storage.secrets import Keyring, generate_key
from cloudagent_storage.store import Store
from cloudagent_storage.store.keys import KeptKey
from tests.support.worlds import World

pytestmark = pytest.mark.anyio

ADMIN = "a-key-for-the-tests"
HOST = "127.0.0.1:8420"
WAYS_IN = (("GET", "/api/v1/tasks"), ("POST", "/mcp"))
OLD, NEW = generate_key(), generate_key()


@pytest.fixture
def rest(world: World) -> Generator[TestClient]:
    app = http_app(world.app(), key=ADMIN, host="127.0.0.1", port=8420)
    with TestClient(app, base_url=f"http://{HOST}", headers={"Host": HOST}) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def make(store: Store, *, account_id: str = "team-a", keys: tuple[str, ...] = (NEW,), **more: Any) -> str:
    return create_key(store, Keyring(keys), name="laptop", account_id=account_id, **more)[1]


def check(store: Store, *keys: str) -> ApiKeyCheck:
    keyring = Keyring(keys or (NEW,))
    return ApiKeyCheck(lambda: store, lambda: keyring)


def key_id_of(token: str) -> str:
    return f"key_{token.split('_')[1]}"


class Clock:
    """The monotonic clock of the cache, in the test's hands."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(api_keys, "monotonic", clock)
    return clock


@pytest.fixture
def looked_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids that the database was asked for."""
    asked: list[str] = []
    find: Callable[[str], KeptKey | None] = store.keys.find
    monkeypatch.setattr(store.keys, "find", lambda key_id: (asked.append(key_id), find(key_id))[1])  # pyright: ignore
    return asked


async def test_a_token_has_its_form_and_lets_its_account_in(store: Store) -> None:
    key, token = create_key(store, Keyring([NEW]), name="laptop", account_id="team-a", expires_days=30)
    assert api_keys.TOKEN.fullmatch(token) and len(token) == 4 + 26 + 1 + 43
    assert key.key_id == key_id_of(token) and key.hint == token[-4:]
    assert token.split("_", 2)[2] not in repr(key) + repr(store.keys.find(key.key_id))
    assert await check(store).account_of(token) == "team-a"


@pytest.mark.parametrize("account_id", ["", "Team", "a b", "ä", "a" * 65, "a/b", "a\n"])
async def test_a_name_that_no_account_can_have_is_refused(store: Store, account_id: str) -> None:
    for name, account in (("x", account_id), ("", "a"), ("x" * 101, "a"), ("x\x1b[2J", "a")):
        with pytest.raises(CloudAgentError) as refused:
            make_named(store, name, account)
        assert refused.value.field in ("account", "name")
    assert not store.keys.list()


def make_named(store: Store, name: str, account_id: str) -> None:
    create_key(store, Keyring([NEW]), name=name, account_id=account_id)


async def test_whatever_is_wrong_with_a_key_the_answer_is_the_same(world: World, rest: TestClient) -> None:
    app = world.app()
    keyring = app.settings.keyring

    def fresh(**more: Any) -> str:
        return create_key(app.store, keyring, name="x", account_id="team-a", **more)[1]

    good, revoked, expired, stranger = fresh(), fresh(), fresh(expires_days=-1), make(app.store)
    app.store.keys.revoke(key_id_of(revoked))
    wrong_secret = good[:-5] + ("AAAAA" if good[-5:] != "AAAAA" else "BBBBB")
    unknown = f"cag_{'a' * 26}_{good.split('_', 2)[2]}"
    malformed = ["cag_", "", "x", good[:-1], good + "x", good.upper(), good.removeprefix("cag_"), "ä", good + " x"]
    answers: set[tuple[Any, ...]] = set()
    for token in (wrong_secret, unknown, revoked, expired, stranger, *malformed):
        for method, path in WAYS_IN:
            response = rest.request(method, path, headers={"Authorization": f"Bearer {token}".encode()})  # pyright: ignore
            answers.add((response.status_code, response.content, tuple(sorted(response.headers.items()))))
    assert len(answers) == 1 and next(iter(answers))[0] == 401
    assert rest.get("/api/v1/tasks", headers=bearer(good)).status_code == 200
    assert rest.get("/api/v1/tasks", headers=bearer(ADMIN)).status_code == 200


async def test_a_token_made_under_an_older_key_still_works_until_that_key_is_gone(store: Store) -> None:
    token, never_used = make(store, keys=(OLD,)), make(store, keys=(OLD,))
    with pytest.raises(Unauthorized):
        await check(store, NEW).account_of(token)
    assert await check(store, NEW, OLD).account_of(token) == "team-a"
    # Once it was used, the older key is needed no longer.
    assert await check(store, NEW).account_of(token) == "team-a"
    with pytest.raises(Unauthorized):
        await check(store, NEW).account_of(never_used)


async def test_a_key_that_was_moved_to_another_account_in_the_database_lets_nobody_in(world: World) -> None:
    store = world.app().store
    token, other = make(store), make(store, account_id="team-b")
    with sqlite3.connect(world.home / "cloudagent.db") as database:
        database.execute("UPDATE api_keys SET account_id = 'team-b' WHERE key_id = ?", (key_id_of(token),))
    database.close()
    with pytest.raises(Unauthorized):
        await check(store).account_of(token)
    assert await check(store).account_of(other) == "team-b"


async def test_what_the_database_said_of_a_key_counts_for_two_seconds(
    store: Store, clock: Clock, looked_up: list[str]
) -> None:
    token, keys = make(store), check(store)
    for _ in range(20):
        await keys.account_of(token)
    with pytest.raises(Unauthorized):
        await keys.account_of(token[:-5] + "AAAAA")
    assert len(looked_up) == 1
    store.keys.revoke(key_id_of(token))
    clock.now += 1.99
    assert await keys.account_of(token) == "team-a"
    clock.now += 0.02
    with pytest.raises(Unauthorized):
        await keys.account_of(token)
    assert len(looked_up) == 2


async def test_malformed_tokens_never_reach_the_database_and_unknown_ones_are_not_remembered(
    store: Store, looked_up: list[str]
) -> None:
    token, keys = make(store), check(store)
    await keys.account_of(token)
    for number in range(50):
        with pytest.raises(Unauthorized):
            await keys.account_of(f"cag_{number}")
        with pytest.raises(Unauthorized):
            await keys.account_of(token.replace(token[4:12], "".join("abcdefgh"[int(d)] for d in f"{number:08o}")))
    assert len(looked_up) == 51
    assert list(keys._known) == [key_id_of(token)]  # pyright: ignore[reportPrivateUsage]


async def test_of_many_keys_only_so_many_are_remembered(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "KNOWN_KEYS", 3)
    keys = check(store)
    tokens = [make(store) for _ in range(5)]
    for token in tokens:
        assert await keys.account_of(token) == "team-a"
    assert list(keys._known) == [key_id_of(token) for token in tokens[2:]]  # pyright: ignore[reportPrivateUsage]


async def test_a_keys_use_is_written_down_at_most_once_a_minute(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    used = store.keys.used
    monkeypatch.setattr(store.keys, "used", lambda key_id, **more: (written.append(key_id), used(key_id, **more)))  # pyright: ignore
    token, keys = make(store), check(store)
    for _ in range(30):
        await keys.account_of(token)
        clock.now += 1.99
    assert written == [key_id_of(token)]
    kept = store.keys.find(key_id_of(token))
    assert kept is not None and kept.key.last_used_at is not None
    clock.now += 1
    await keys.account_of(token)
    assert len(written) == 2
    again = store.keys.find(key_id_of(token))
    assert again is not None and again.key.last_used_at == kept.key.last_used_at  # no minute of the database's is over


async def test_a_wrong_secret_is_no_use_of_the_key(store: Store) -> None:
    token = make(store)
    with pytest.raises(Unauthorized):
        await check(store).account_of(token[:-5] + "AAAAA")
    kept = store.keys.find(key_id_of(token))
    assert kept is not None and kept.key.last_used_at is None


async def test_a_use_that_cannot_be_written_down_lets_the_key_in_all_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(key_id: str, **more: object) -> None:
        raise DatabaseUnavailable()

    monkeypatch.setattr(store.keys, "used", refuse)
    assert await check(store).account_of(make(store)) == "team-a"


async def test_a_slow_database_holds_up_no_other_request_and_few_threads(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, running, most = threading.Event(), [0], [0]
    lock = threading.Lock()

    def slow(key_id: str) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        assert go_on.wait(30)
        with lock:
            running[0] -= 1

    monkeypatch.setattr(store.keys, "find", slow)
    keys, refused = check(store), [0]

    async def come(number: int) -> None:
        with pytest.raises(Unauthorized):
            await keys.account_of(f"cag_{'b' * 24}{'abcdefgh'[number // 8]}{'abcdefgh'[number % 8]}_{'A' * 43}")
        refused[0] += 1

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(come, number)
            while running[0] < api_keys.LOOKUPS_AT_ONCE:
                await anyio.sleep(0.01)  # the loop turns
            assert await anyio.to_thread.run_sync(lambda: "another thread is free") and not refused[0]
            go_on.set()
    assert (most[0], refused[0]) == (api_keys.LOOKUPS_AT_ONCE, 20)


async def test_a_database_that_does_not_answer_is_not_a_wrong_key(world: World, store: Store) -> None:
    token = make(store)
    dead = replace(world, environment={**world.environment, "DATABASE_URL": "postgresql://x@127.0.0.1:9/x"})
    app = http_app(dead.app(), key=ADMIN, host="127.0.0.1", port=8420)
    with TestClient(app, base_url=f"http://{HOST}", headers={"Host": HOST}) as client:
        for method, path in WAYS_IN:
            response = client.request(method, path, headers=bearer(token))
            assert (response.status_code, response.json()["code"]) == (503, "database_unavailable")
            assert "www-authenticate" not in response.headers
        assert client.get("/api/v1/tasks", headers=bearer("wrong")).status_code == 401


async def test_who_is_the_operator(world: World, rest: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    app = world.app()
    assert app.local_caller().operator and not app.remote_caller("local").operator
    seen: list[tuple[str, bool, bool]] = []
    remote = type(app).remote_caller

    def spy(self: Any, account_id: str, *, operator: bool = False) -> Any:
        caller = remote(self, account_id, operator=operator)
        seen.append((caller.account_id, caller.operator, caller.local))
        return caller

    monkeypatch.setattr(type(app), "remote_caller", spy)
    local = create_key(app.store, app.settings.keyring, name="x", account_id=LOCAL_ACCOUNT)[1]
    team = create_key(app.store, app.settings.keyring, name="x", account_id="team-a")[1]
    for token in (ADMIN, local, team):
        assert rest.get("/api/v1/tasks", headers=bearer(token)).status_code == 200
    assert seen == [("local", True, False), ("local", False, False), ("team-a", False, False)]
