"""`.cloudagent.toml` on its way from a repository to the worker: what is read, what is refused, what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from cloudagent_queue import repository
from cloudagent_queue.repository import Fetched, bundle_working_tree
from cloudagent_queue.repository.config import CONFIG_FILE, SIZE_LIMIT
from cloudagent_queue.schedules import fire_due
from cloudagent_storage.errors import InvalidRepositoryConfig, LeaseLost, RefNotFound
from cloudagent_storage.records import LOCAL_ACCOUNT, Claim, TaskStatus
from cloudagent_storage.store import Store
from tests.support.git_repos import ENVIRONMENT, Content, commit, git, make_repository, put
from tests.support.git_server import GitServer, git_server
from tests.support.scheduled import due_now
from tests.support.stored import EXPIRED, claimed
from tests.support.worlds import World

FIRST = "setup = 'first'\n"
TOKEN = "ghp_canary-0123456789"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "shop", {"a.txt": "one\n", CONFIG_FILE: FIRST, ".gitignore": "*.log\n"})


# -- a folder of the user's ---------------------------------------------------------------------------------------


def test_the_file_is_read_as_it_travels(shop: Path) -> None:
    assert bundle_working_tree(shop, base_ref=None).config == FIRST.encode()
    put(shop, {CONFIG_FILE: "setup = 'not committed'\n"})
    assert bundle_working_tree(shop, base_ref=None).config == b"setup = 'not committed'\n"
    assert bundle_working_tree(shop, base_ref="HEAD").config == FIRST.encode()
    put(shop, {CONFIG_FILE: None})
    assert bundle_working_tree(shop, base_ref=None).config is None
    put(shop, {"sub/" + CONFIG_FILE: FIRST})
    assert bundle_working_tree(shop / "sub", base_ref=None).config is None


def test_an_untracked_file_counts_and_an_ignored_one_does_not(tmp_path: Path) -> None:
    shop = make_repository(tmp_path / "shop", {"a.txt": "one\n"})
    put(shop, {CONFIG_FILE: FIRST})
    assert bundle_working_tree(shop, base_ref=None).config == FIRST.encode()
    put(shop, {".gitignore": CONFIG_FILE})
    assert bundle_working_tree(shop, base_ref=None).config is None


def test_it_is_read_of_a_bare_repository_a_shallow_clone_and_an_executable_file(shop: Path, tmp_path: Path) -> None:
    (shop / CONFIG_FILE).chmod(0o755)
    commit(shop, {"b.txt": "b\n"})
    git(tmp_path, "clone", "--quiet", "--bare", "shop", "bare.git")
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{shop}", "shallow")
    for folder in (shop, tmp_path / "bare.git", tmp_path / "shallow"):
        assert bundle_working_tree(folder, base_ref=None).config == FIRST.encode()


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({CONFIG_FILE: "-> /etc/hostname"}, "no plain file"),
        ({CONFIG_FILE: "-> other.toml", "other.toml": FIRST}, "no plain file"),
        ({CONFIG_FILE + "/x": "x"}, "no plain file"),
        ({CONFIG_FILE: "#" * (SIZE_LIMIT + 1)}, "larger than 16 KB"),
        ({CONFIG_FILE: "setup =\n"}, "line 1"),
        ({CONFIG_FILE: b"\0"}, "line 1"),
    ],
)
def test_what_cannot_be_used_is_refused_whether_committed_or_not(
    shop: Path, files: dict[str, Content], says: str
) -> None:
    put(shop, {CONFIG_FILE: None})
    put(shop, files)
    with pytest.raises(InvalidRepositoryConfig, match=says):
        bundle_working_tree(shop, base_ref=None)
    commit(shop, {})
    with pytest.raises(InvalidRepositoryConfig, match=says):
        bundle_working_tree(shop, base_ref="main")


def test_a_submodule_in_its_place_is_refused(shop: Path) -> None:
    put(shop, {CONFIG_FILE: None})
    git(shop, "update-index", "--add", "--cacheinfo", f"160000,{git(shop, 'rev-parse', 'HEAD')},{CONFIG_FILE}")
    git(shop, "commit", "--quiet", "--message", "x")
    with pytest.raises(InvalidRepositoryConfig, match="no plain file"):
        bundle_working_tree(shop, base_ref="main")


def test_only_what_decides_a_set_up_changes_the_digest_of_the_manifests(tmp_path: Path) -> None:
    shop = make_repository(tmp_path / "shop", {"uv.lock": "1\n", "web/package-lock.json": "1\n", "a.py": "a\n"})

    def digest() -> str | None:
        return bundle_working_tree(shop, base_ref=None).manifests

    seen = [digest()]
    for unrelated in ({"a.py": "b\n"}, {"x/y/uv.lock": "1\n"}, {"uv.lock.bak": "1\n"}, {CONFIG_FILE: FIRST}):
        put(shop, unrelated)
        assert digest() == seen[0], unrelated
    changes: list[dict[str, Content]] = [
        {"uv.lock": "2\n"},
        {"web/package-lock.json": "2\n"},
        {"-odd *\n?/requirements-dev.txt": "1\n"},
        {"setup.sh": "true\n"},
        {"web/package-lock.json": None},
    ]
    for change in changes:
        put(shop, change)
        seen.append(digest())
    assert len(set(seen)) == len(seen)
    commit(shop, {})
    assert bundle_working_tree(shop, base_ref="HEAD").manifests == seen[-1]


# -- an address ---------------------------------------------------------------------------------------------------


@pytest.fixture
def server(shop: Path, tmp_path: Path) -> Generator[GitServer]:
    (tmp_path / "served").mkdir()
    git(tmp_path, "clone", "--quiet", "--bare", "shop", "served/shop.git")
    git(shop, "remote", "add", "origin", str(tmp_path / "served" / "shop.git"))
    with git_server(tmp_path / "tls", {TOKEN: tmp_path / "served"}) as found:
        yield found


def fetch(server: GitServer, tmp_path: Path, *, base_ref: str | None = None) -> Fetched:
    home = tmp_path / "home"
    if not home.exists():
        server.trusted_by(home)
    return repository.fetch(
        server.address("shop.git"),
        base_ref=base_ref,
        cache_folder=tmp_path / "cache",
        env={"PATH": ENVIRONMENT["PATH"], "HOME": str(home)},
        timeout_s=30,
        tokens={server.host: TOKEN},
    )


def test_a_remotes_file_is_read_at_the_commit_that_is_fetched(server: GitServer, shop: Path, tmp_path: Path) -> None:
    first = fetch(server, tmp_path)
    assert (first.config, first.base_sha) == (FIRST.encode(), git(shop, "rev-parse", "HEAD"))
    assert first.manifests == bundle_working_tree(shop, base_ref=None).manifests
    commit(shop, {CONFIG_FILE: "setup = 'later'\n", "uv.lock": "1\n"})
    git(shop, "push", "--quiet", "origin", "main")
    later = fetch(server, tmp_path)
    assert later.config == b"setup = 'later'\n" and later.manifests != first.manifests
    assert fetch(server, tmp_path, base_ref=first.base_sha) == first
    commit(shop, {CONFIG_FILE: None})
    git(shop, "push", "--quiet", "origin", "main")
    assert fetch(server, tmp_path).config is None


def test_a_remotes_broken_file_ends_the_fetch_and_leaves_the_cache_whole(
    server: GitServer, shop: Path, tmp_path: Path
) -> None:
    fetch(server, tmp_path)
    (cache,) = (tmp_path / "cache").glob("*.git")
    made = cache.stat().st_ino
    for content in ("setup =", "-> /etc/hostname", "[limits]\nmax_turns = 0", "#" * (SIZE_LIMIT + 1)):
        commit(shop, {CONFIG_FILE: content})
        git(shop, "push", "--quiet", "origin", "main")
        with pytest.raises(InvalidRepositoryConfig):
            fetch(server, tmp_path)
    assert cache.stat().st_ino == made
    assert fetch(server, tmp_path, base_ref=git(shop, "rev-parse", "HEAD~4")).config
    with pytest.raises(RefNotFound):
        fetch(server, tmp_path, base_ref="nowhere")


# -- what is kept with the task -----------------------------------------------------------------------------------


def claim_of(world: World, task_id: str) -> Claim:
    store = world.app().store
    claim = store.tasks.claim(task_id, worker="worker", lease_s=60)
    assert claim is not None
    return claim


def test_a_submit_keeps_the_file_of_its_folder_for_the_worker(world: World, repo: Path) -> None:
    put(repo, {CONFIG_FILE: "verify = 'not committed'\n"})
    with world.client(repo) as api:
        task = api.call("submit_task", prompt="x")
        claim = claim_of(world, task["task_id"])
    assert claim.config == b"verify = 'not committed'\n"
    assert claim.manifests == bundle_working_tree(repo, base_ref=None).manifests
    # What was asked for stays what was asked for; what a task is run as is the worker's to say.
    assert claim.spec.verify is None
    assert repository.read_config(claim.config).applied_to(claim.spec).verify == "not committed"


def test_a_submit_without_a_repository_or_with_an_address_keeps_none_yet(world: World, repo: Path) -> None:
    put(repo, {CONFIG_FILE: FIRST})
    with world.client(repo) as api:
        for place in ("none", "https://example.com/a.git"):
            claim = claim_of(world, api.call("submit_task", prompt="x", repository=place)["task_id"])
            assert claim.config is None and claim.manifests is None


def test_a_submit_with_a_broken_file_is_refused_and_nothing_is_kept(world: World, repo: Path) -> None:
    put(repo, {CONFIG_FILE: "[limits]\nmax_turn = 5\n"})
    with world.client(repo) as api:
        with pytest.raises(InvalidRepositoryConfig) as caught:
            api.call("submit_task", prompt="x")
        assert caught.value.field == "limits.max_turn" and "max_turns?" in caught.value.remedy
        with pytest.raises(InvalidRepositoryConfig):
            api.call("create_schedule", name="nightly", cron="0 3 * * *", task={"prompt": "x"})
        assert api.call("list_tasks")["total"] == api.call("list_schedules")["total"] == 0
    words = ["task", "create", "x", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "cloudagent_mcp", *words],
        env=world.environment,
        cwd=repo,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and json.loads(done.stdout)["code"] == "invalid_repository_config"


def test_a_task_that_is_tried_again_has_the_file_that_came_with_its_bundle(world: World, repo: Path) -> None:
    put(repo, {CONFIG_FILE: FIRST})
    with world.client(repo) as api:
        task_id = api.call("submit_task", prompt="x")["task_id"]
        manifests = claim_of(world, task_id).manifests
        world.app().store.tasks.finish(task_id, 1, status=TaskStatus.FAILED)
        put(repo, {CONFIG_FILE: "setup = 'changed since'\n", "uv.lock": "new\n"})
        claim = claim_of(world, api.call("retry_task", task_id=task_id)["task_id"])
    assert (claim.config, claim.manifests) == (FIRST.encode(), manifests)


def test_a_schedule_reads_the_file_whenever_it_is_due(world: World, repo: Path) -> None:
    app = world.app()
    with world.client(repo) as api:
        made = api.call("create_schedule", name="nightly", cron="0 3 * * *", task={"prompt": "x"})
        put(repo, {CONFIG_FILE: FIRST})
        ran = api.call("run_schedule", schedule_id=made["schedule_id"])
        assert claim_of(world, ran["run"]["task_id"]).config == FIRST.encode()
        app.store.tasks.finish(ran["run"]["task_id"], 1, status=TaskStatus.COMPLETED)
        put(repo, {CONFIG_FILE: "setpu = 'x'\n"})
        due_now(app.store, made["schedule_id"])
        fire_due(app.store, world.settings.keyring, lambda _: None)
        runs = api.call("get_schedule", schedule_id=made["schedule_id"])["last_runs"]
    (skipped,) = [run for run in runs if run["outcome"] == "skipped"]
    assert "setpu is no setting. Did you mean setup?" in skipped["reason"]


def test_what_a_worker_found_is_there_for_the_next_attempt_and_only_its_holder_may_say_it(store: Store) -> None:
    claim = claimed(store, lease_s=EXPIRED)
    task_id = claim.task.task_id
    content = "# ü\n".encode() + FIRST.encode()
    store.tasks.update(task_id, claim.attempt, config=content, manifests="0" * 64)
    again = claimed(store, task_id)
    assert (again.config, again.manifests) == (content, "0" * 64)
    assert store.tasks.settings(LOCAL_ACCOUNT, task_id) == (content, "0" * 64)
    with pytest.raises(LeaseLost):
        store.tasks.update(task_id, claim.attempt, config=b"", manifests=None)
    store.tasks.update(task_id, again.attempt, config=None)
    assert store.tasks.settings(LOCAL_ACCOUNT, task_id) == (None, "0" * 64)


def test_the_file_goes_with_the_rest_of_what_a_finished_task_has_left(store: Store) -> None:
    claim = claimed(store)
    task_id = claim.task.task_id
    store.tasks.update(task_id, claim.attempt, config=FIRST.encode())
    store.tasks.finish(task_id, claim.attempt, status=TaskStatus.COMPLETED)
    store.retention.prune(max_age_s=3600, max_bytes=None)
    assert store.tasks.settings(LOCAL_ACCOUNT, task_id)[0] == FIRST.encode()
    store.retention.prune(max_age_s=-1, max_bytes=None)
    assert store.tasks.settings(LOCAL_ACCOUNT, task_id)[0] is None
