"""A repository becomes a bundle: a folder of the user's, and a remote one."""

from __future__ import annotations

import http.server
import re
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudagent_queue import repository
from cloudagent_queue.git import run as run_git
from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.errors import (
    CloudAgentError,
    GitMissing,
    RefNotFound,
    RepositoryEmpty,
    RepositoryNotAllowed,
    RepositoryNotFound,
    RepositoryTooLarge,
    RepositoryUnreachable,
    SecretsFound,
)
from tests.support.git_repos import ENVIRONMENT, commit, files_of, fingerprint, git, make_repository, put

FILES = {"a.txt": "one\n", "sub/b.txt": "two\n", ".gitignore": "ignored\n*.log\n"}


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "shop", FILES)


def unpacked(bundle: bytes, folder: Path) -> Path:
    """A checkout of a bundle's one ref."""
    folder.mkdir()
    (folder.parent / f"{folder.name}.bundle").write_bytes(bundle)
    git(folder.parent, "clone", "--quiet", "--branch=cloudagent-base", f"{folder.name}.bundle", folder.name)
    return folder


# -- a folder of the user's ---------------------------------------------------------------------------------------


def test_uncommitted_and_untracked_files_travel_and_ignored_ones_do_not(shop: Path, tmp_path: Path) -> None:
    put(shop, {"a.txt": "changed\n", "sub/b.txt": None, "new ü.txt": "new\n", "ignored": "x", "a.log": "x"})
    put(shop, {"staged.txt": "staged\n"})
    git(shop, "add", "staged.txt")
    (shop / "new ü.txt").chmod(0o755)
    tree = bundle_working_tree(shop, base_ref=None)
    assert tree.has_uncommitted
    assert tree.head == "main"
    assert tree.top == shop
    there = unpacked(tree.bundle, tmp_path / "there")
    assert {p.name for p in there.iterdir()} == {".git", ".gitignore", "a.txt", "new ü.txt", "staged.txt"}
    assert (there / "a.txt").read_text() == "changed\n"
    assert (there / "new ü.txt").stat().st_mode & 0o100
    assert git(there, "rev-parse", "HEAD") == tree.base_sha
    assert git(there, "rev-parse", "HEAD^") == git(shop, "rev-parse", "HEAD")


def test_nothing_of_the_users_repository_is_touched(shop: Path) -> None:
    put(shop, {"a.txt": "changed\n", "staged.txt": "staged\n"})
    git(shop, "add", "staged.txt")
    put(shop, {"staged.txt": "and changed again\n", "untracked.txt": "x"})
    before = fingerprint(shop)
    bundle_working_tree(shop, base_ref=None)
    bundle_working_tree(shop, base_ref="main")
    assert fingerprint(shop) == before


def test_the_same_state_is_the_same_commit_whenever_it_is_bundled(shop: Path) -> None:
    put(shop, {"new.txt": "x"})
    first = bundle_working_tree(shop, base_ref=None)
    (shop / "new.txt").touch()
    assert bundle_working_tree(shop, base_ref=None).base_sha == first.base_sha


def test_a_clean_tree_starts_from_head_itself(shop: Path) -> None:
    tree = bundle_working_tree(shop / "sub", base_ref=None)
    assert not tree.has_uncommitted
    assert tree.base_sha == git(shop, "rev-parse", "HEAD")


def test_a_ref_is_taken_without_what_is_uncommitted(shop: Path, tmp_path: Path) -> None:
    first = git(shop, "rev-parse", "HEAD")
    git(shop, "tag", "v1")
    commit(shop, {"a.txt": "later\n"})
    put(shop, {"a.txt": "dirty\n"})
    for ref in ("v1", first, first[:10]):
        tree = bundle_working_tree(shop, base_ref=ref)
        assert tree.base_sha == first
        assert not tree.has_uncommitted
    assert (unpacked(tree.bundle, tmp_path / "there") / "a.txt").read_text() == "one\n"


def test_an_unknown_ref_is_answered_with_the_nearest_names(shop: Path) -> None:
    for name in ("feature/login", "feature/logout", "release"):
        git(shop, "branch", name)
    with pytest.raises(RefNotFound) as refused:
        bundle_working_tree(shop, base_ref="feature/logn")
    assert "feature/login" in refused.value.remedy
    assert "logn" not in refused.value.message


def test_untracked_files_that_look_like_secrets_stay_at_home_and_are_named(shop: Path, tmp_path: Path) -> None:
    secret = [".env", ".env.local", "sub/server.pem", "id_rsa", "deploy.key", "web/.npmrc", "staged.key"]
    harmless = [".env.example", "id_rsa.pub", ".npmrc", "keyboard.txt", "monkey"]
    put(shop, dict.fromkeys(secret, "SECRET-CANARY //registry/:_authToken=x\n") | dict.fromkeys(harmless, "plain\n"))
    git(shop, "add", "staged.key")
    tree = bundle_working_tree(shop, base_ref=None)
    assert set(tree.left_out) == set(secret)
    there = unpacked(tree.bundle, tmp_path / "there")
    assert not any(b"SECRET-CANARY" in content for _, content in files_of(there).values())
    assert all((there / name).exists() for name in harmless)
    assert git(shop, "diff", "--cached", "--name-only") == "staged.key"
    # Where somebody is there to decide, nothing is decided for them.
    with pytest.raises(SecretsFound) as refused:
        bundle_working_tree(shop, base_ref=None, allow_secrets=[".env", "no-such-file"])
    assert set(refused.value.files) == set(secret) - {".env"}
    allowed = bundle_working_tree(shop, base_ref=None, allow_secrets=secret)
    assert set(allowed.allowed) == set(secret) and allowed.left_out == ()
    there = unpacked(allowed.bundle, tmp_path / "allowed")
    assert all((there / name).exists() for name in secret)


def test_a_secret_that_was_committed_long_ago_travels_as_part_of_the_history(shop: Path) -> None:
    commit(shop, {".env": "A=1\n"})
    put(shop, {".env": "A=2\n"})
    assert bundle_working_tree(shop, base_ref=None).left_out == ()


def test_a_nested_repository_is_left_out_and_named(shop: Path) -> None:
    make_repository(shop / "inner", {"x": "x"})
    (shop / "unborn").mkdir()
    git(shop / "unborn", "init", "--quiet")
    put(shop, {"unborn/y": "y"})
    assert bundle_working_tree(shop, base_ref=None).left_out == ("inner/", "unborn/")


def test_no_program_that_the_repository_configures_is_run(shop: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho ran >> {witness}\ncat\n")
    program.chmod(0o755)
    commit(shop, {".gitattributes": "*.txt filter=evil diff=evil\n"})
    for key in ("filter.evil.clean", "filter.evil.smudge", "filter.evil.process", "core.fsmonitor", "diff.external"):
        git(shop, "config", key, str(program))
    git(shop, "config", "filter.evil.required", "true")
    hooks = shop / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for hook in ("post-index-change", "reference-transaction", "pre-commit"):
        shutil.copy(program, hooks / hook)
    witness.unlink(missing_ok=True)
    put(shop, {"a.txt": "changed\n", "new.txt": "new\n"})
    bundle_working_tree(shop, base_ref=None)
    assert not witness.exists()


def test_a_linked_worktree_and_a_bare_repository_work_too(shop: Path, tmp_path: Path) -> None:
    git(shop, "worktree", "add", "--quiet", "-b", "side", "../side")
    put(tmp_path / "side", {"a.txt": "side\n"})
    tree = bundle_working_tree(tmp_path / "side", base_ref=None)
    assert (tree.head, tree.has_uncommitted, tree.top) == ("side", True, tmp_path / "side")
    git(tmp_path, "clone", "--quiet", "--bare", "shop", "bare.git")
    assert bundle_working_tree(tmp_path / "bare.git", base_ref=None).base_sha == git(shop, "rev-parse", "main")


def test_a_shallow_clone_is_bundled_with_the_history_that_it_has_cut_off(shop: Path, tmp_path: Path) -> None:
    commit(shop, {"a.txt": "later\n"})
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{shop}", "shallow")
    tree = bundle_working_tree(tmp_path / "shallow", base_ref=None)
    assert not tree.has_uncommitted
    there = unpacked(tree.bundle, tmp_path / "there")
    assert (there / "a.txt").read_text() == "later\n"
    assert git(shop, "rev-parse", "HEAD") in git(there, "log", "--format=%B")


def test_a_folder_that_is_no_repository_is_refused(shop: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", tmp_path, shop / "a.txt", shop / ".git"):
        with pytest.raises(RepositoryNotFound) as refused:
            bundle_working_tree(folder, base_ref=None)
        assert str(tmp_path) not in str(refused.value.as_dict())


def test_a_repository_without_a_commit_is_refused(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    for ref in (None, "main"):
        with pytest.raises(RepositoryEmpty):
            bundle_working_tree(tmp_path, base_ref=ref)


def test_too_much_is_refused(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudagent_queue.repository.working_tree.BUNDLE_LIMIT", 100)
    with pytest.raises(RepositoryTooLarge):
        bundle_working_tree(shop, base_ref=None)
    put(shop, {"big": b"x" * 200})
    with pytest.raises(RepositoryTooLarge, match="Untracked"):
        bundle_working_tree(shop, base_ref=None)


@pytest.mark.parametrize("version", [None, "git version 2.25.1", "rubbish"])
def test_without_a_git_that_heeds_our_settings_nothing_is_run(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    (tmp_path / "bin").mkdir()
    if version is not None:
        (tmp_path / "bin" / "git").write_text(f"#!/bin/sh\necho {version}\n")
        (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(GitMissing):
        bundle_working_tree(shop, base_ref=None)


# -- a remote one -------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(shop: Path, tmp_path: Path) -> str:
    git(tmp_path, "clone", "--quiet", "--bare", "shop", "remote.git")
    return f"file://{tmp_path}/remote.git"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """git's own HTTP server on loopback; whatever needs a password there is under /private/."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/private/") and self.headers.get("Authorization") is None:
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="x"')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            path, _, query = self.path.removeprefix("/private").partition("?")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            env = {
                "PATH": ENVIRONMENT["PATH"],
                "GIT_PROJECT_ROOT": str(tmp_path),
                "GIT_HTTP_EXPORT_ALL": "1",
                "PATH_INFO": path,
                "QUERY_STRING": query,
                "REQUEST_METHOD": self.command,
                "CONTENT_TYPE": self.headers.get("Content-Type") or "",
                "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding") or "",
                "GIT_PROTOCOL": self.headers.get("Git-Protocol") or "",
            }
            out = subprocess.run(["git", "http-backend"], input=body, env=env, capture_output=True).stdout
            head, _, content = out.partition(b"\r\n\r\n")
            fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
            self.send_response(int(fields.pop("Status", "200").split()[0]))
            for name, value in fields.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def fetch(address: str, cache: Path, *, base_ref: str | None = None, timeout_s: float = 30) -> tuple[bytes, str]:
    fetched = repository.fetch(
        address,
        base_ref=base_ref,
        cache_folder=cache,
        env={"PATH": ENVIRONMENT["PATH"], "HOME": str(cache)},
        timeout_s=timeout_s,
        protocols=("file", "http"),
    )
    return fetched.bundle, fetched.base_sha


def test_a_remote_is_fetched_with_its_whole_history(remote: str, shop: Path, tmp_path: Path) -> None:
    bundle, base = fetch(remote, tmp_path / "cache")
    assert base == git(shop, "rev-parse", "HEAD")
    there = unpacked(bundle, tmp_path / "there")
    assert files_of(there) == files_of(shop)
    assert git(there, "rev-list", "--count", "HEAD") == "1"


def test_what_is_new_in_a_remote_is_seen_the_next_time(remote: str, shop: Path, tmp_path: Path) -> None:
    fetch(remote, tmp_path / "cache")
    commit(shop, {"a.txt": "later\n"})
    git(shop, "push", "--quiet", remote, "main", "main:side")
    head = git(shop, "rev-parse", "HEAD")
    assert fetch(remote, tmp_path / "cache")[1] == head
    git(shop, "reset", "--quiet", "--hard", "HEAD^")
    commit(shop, {"a.txt": "rewritten\n"})
    git(shop, "push", "--quiet", "--force", remote, "main")
    assert fetch(remote, tmp_path / "cache")[1] == git(shop, "rev-parse", "HEAD")
    assert fetch(remote, tmp_path / "cache", base_ref="side")[1] == head


def test_branches_tags_and_commits_of_a_remote_can_be_named(remote: str, shop: Path, tmp_path: Path) -> None:
    first = git(shop, "rev-parse", "HEAD")
    git(shop, "tag", "--annotate", "v1", "--message", "One")
    commit(shop, {"a.txt": "later\n"})
    git(shop, "push", "--quiet", remote, "main:refs/heads/feature/x", "v1")
    cache = tmp_path / "cache"
    assert fetch(remote, cache, base_ref="v1")[1] == first
    assert fetch(remote, cache, base_ref="feature/x")[1] == git(shop, "rev-parse", "main")
    assert fetch(remote, cache, base_ref="refs/heads/main")[1] == first
    assert fetch(remote, cache, base_ref=first[:12])[1] == first
    with pytest.raises(RefNotFound) as refused:
        fetch(remote, cache, base_ref="feature/y")
    assert "feature/x" in refused.value.remedy


def test_an_empty_remote_is_refused(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet", "--bare", "empty.git")
    with pytest.raises(RepositoryEmpty):
        fetch(f"file://{tmp_path}/empty.git", tmp_path / "cache")


def test_a_broken_cache_is_made_anew(remote: str, tmp_path: Path) -> None:
    bundle, base = fetch(remote, tmp_path / "cache")
    (cache,) = (tmp_path / "cache").glob("*.git")
    for path in (cache / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
    (cache / "HEAD").write_text("rubbish")
    assert fetch(remote, tmp_path / "cache") == (bundle, base)


def test_the_second_fetch_downloads_nothing(server: str, shop: Path, tmp_path: Path) -> None:
    commit(shop, {f"{n}.txt": f"{n}\n" * 100 for n in range(200)})
    git(tmp_path, "clone", "--quiet", "--bare", "shop", "remote.git")
    first = fetch(f"{server}/remote.git", tmp_path / "cache")
    shutil.rmtree(tmp_path / "remote.git" / "objects" / "pack")
    assert fetch(f"{server}/remote.git", tmp_path / "cache") == first


@pytest.mark.parametrize(
    ("path", "reason"), [("/missing.git", "not found"), ("/private/remote.git", "denied")], ids=["missing", "private"]
)
def test_the_reason_is_told_when_a_remote_cannot_be_reached(
    server: str, remote: str, tmp_path: Path, path: str, reason: str
) -> None:
    with pytest.raises(RepositoryUnreachable, match=reason) as refused:
        fetch(server + path, tmp_path / "cache")
    assert server not in str(refused.value.as_dict())


def test_a_host_that_nobody_listens_on_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(RepositoryUnreachable, match="does not answer"):
        fetch("http://127.0.0.1:9/a.git", tmp_path / "cache")


def test_a_name_that_does_not_resolve_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(RepositoryUnreachable, match="does not resolve"):
        fetch("http://nowhere.invalid/a.git", tmp_path / "cache")


def test_a_server_that_says_nothing_is_given_up_in_time(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(RepositoryUnreachable, match="in time"):
            fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/a.git", tmp_path / "cache", timeout_s=1)
        assert time.monotonic() - started < 5


def test_protocols_that_were_not_asked_for_are_off(remote: str, server: str, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    for address in (remote, f"{server}/remote.git", f"ext::sh -c touch% {witness}", str(tmp_path / "remote.git")):
        with pytest.raises(RepositoryNotAllowed):
            repository.fetch(
                address,
                base_ref=None,
                cache_folder=tmp_path / "cache",
                env={"PATH": ENVIRONMENT["PATH"], "HOME": str(tmp_path)},
                timeout_s=20,
            )
    assert not witness.exists()


def test_a_malformed_object_of_a_remote_is_refused(shop: Path, tmp_path: Path) -> None:
    blob = git(shop, "rev-parse", "HEAD:a.txt")
    data = b"100644 .git\0" + bytes.fromhex(blob)
    tree = git(shop, "hash-object", "-t", "tree", "-w", "--literally", "--stdin", stdin=data)
    git(shop, "update-ref", "refs/heads/main", git(shop, "commit-tree", tree, "-m", "evil"))
    with pytest.raises(CloudAgentError):
        fetch(f"file://{shop}/.git", tmp_path / "cache")


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs util-linux")
def test_git_is_bounded_from_its_first_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(*_: object) -> None:
        """A limit that comes when it has all the memory already."""

    monkeypatch.setattr(resource, "prlimit", too_late)
    seen = run_git("-c", "alias.x=!cat /proc/self/limits", "x", folder=tmp_path, max_memory=1_234_567_168).text
    assert re.search(r"Max address space +1234567168 +1234567168 ", seen)
