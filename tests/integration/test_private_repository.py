"""A repository that wants a token: it goes to its host and nowhere else, and what it brings is its account's."""

from __future__ import annotations

import base64
import threading
from collections.abc import Generator, Mapping
from pathlib import Path

import psutil
import pytest

from cloudagent_queue import repository
from cloudagent_storage.errors import CloudAgentError, RefNotFound, RepositoryUnreachable
from tests.support.git_repos import ENVIRONMENT, commit, git, make_repository
from tests.support.git_server import GitServer, basic, git_server
from tests.support.worlds import until

TOKEN = "ghp_canary-0123456789"
OTHER = "ghp_another-987654321"


@pytest.fixture
def server(tmp_path: Path) -> Generator[GitServer]:
    """Each token opens another `shop.git`; without one, only `public.git` is there."""
    folders = {TOKEN: tmp_path / "mine", OTHER: tmp_path / "theirs", "": tmp_path / "everybodys"}
    for folder in folders.values():
        folder.mkdir()
        work = make_repository(folder / "work", {"a.txt": f"{folder.name}\n"})
        git(
            folder, "clone", "--quiet", "--bare", str(work), "public.git" if folder.name == "everybodys" else "shop.git"
        )
    with git_server(tmp_path / "tls", folders) as found:
        yield found


@pytest.fixture
def home(server: GitServer, tmp_path: Path) -> Path:
    return server.trusted_by(tmp_path / "home")


def fetch(
    address: str,
    home: Path,
    *,
    tokens: Mapping[str, str] | None = None,
    account_id: str = "team-a",
    base_ref: str | None = None,
) -> tuple[bytes, str]:
    fetched = repository.fetch(
        address,
        base_ref=base_ref,
        cache_folder=home.parent / "cache",
        env={"PATH": ENVIRONMENT["PATH"], "HOME": str(home)},
        timeout_s=30,
        tokens=tokens or {},
        account_id=account_id,
    )
    return fetched.bundle, fetched.base_sha


def head(tmp_path: Path, whose: str) -> str:
    return git(tmp_path / whose / "work", "rev-parse", "HEAD")


def test_a_token_opens_a_private_repository(server: GitServer, home: Path, tmp_path: Path) -> None:
    with pytest.raises(RepositoryUnreachable, match=r"denied|not found"):
        fetch(server.address("shop.git"), home)
    with pytest.raises(RepositoryUnreachable, match=r"denied|not found"):
        fetch(server.address("shop.git"), home, tokens={server.host: "ghp_wrong-token"})
    _, sha = fetch(server.address("shop.git"), home, tokens={server.host: TOKEN})
    assert sha == head(tmp_path, "mine")


def test_a_token_goes_to_its_own_host_and_to_no_other(server: GitServer, home: Path, tmp_path: Path) -> None:
    port = server.host.rpartition(":")[2]
    for host in ("github.com", "127.0.0.1", f"localhost:{port}", f"127.0.0.1:{port}0", f"x.{server.host}"):
        with pytest.raises(RepositoryUnreachable, match=r"denied|not found"):
            fetch(server.address("shop.git"), home, tokens={host: TOKEN})
    _, sha = fetch(server.address("public.git"), home, tokens={"github.com": TOKEN})
    assert sha == head(tmp_path, "everybodys")
    assert {given for _, given in server.seen} == {None}


def test_a_token_goes_nowhere_without_encryption(server: GitServer, home: Path) -> None:
    """A server that speaks plain HTTP is told nothing, even if somebody allows that protocol."""
    plain = server.address("shop.git").replace("https:", "http:")
    with pytest.raises(CloudAgentError):
        repository.fetch(
            plain,
            base_ref=None,
            cache_folder=home.parent / "cache",
            env={"PATH": ENVIRONMENT["PATH"], "HOME": str(home)},
            timeout_s=20,
            tokens={server.host: TOKEN},
            protocols=("http", "https"),
        )
    assert not any(given for _, given in server.seen)


@pytest.mark.parametrize("of_home", ["", "[http]\n\tfollowRedirects = true\n"])
def test_a_token_does_not_follow_a_redirect(server: GitServer, home: Path, tmp_path: Path, of_home: str) -> None:
    with (home / ".gitconfig").open("a") as config:
        config.write(of_home)
    with git_server(tmp_path / "tls2", {TOKEN: tmp_path / "mine", "": tmp_path / "everybodys"}) as elsewhere:
        elsewhere.trusted_by(home)
        server.moved["/shop.git"] = elsewhere.address("shop.git")
        with pytest.raises(RepositoryUnreachable, match="moved"):
            fetch(server.address("shop.git"), home, tokens={server.host: TOKEN})
        assert [given for _, given in server.seen] == [basic(TOKEN)]
        assert not elsewhere.seen


def test_an_address_that_the_workers_git_sends_elsewhere_takes_no_token_along(
    server: GitServer, home: Path, tmp_path: Path
) -> None:
    with git_server(tmp_path / "tls2", {"": tmp_path / "everybodys"}) as elsewhere:
        elsewhere.trusted_by(home)
        with (home / ".gitconfig").open("a") as config:
            config.write(f'[url "https://{elsewhere.host}/"]\n\tinsteadOf = https://{server.host}/\n')
        fetch(server.address("public.git"), home, tokens={server.host: TOKEN})
        assert elsewhere.seen and not any(given for _, given in elsewhere.seen)


def test_the_workers_own_credentials_are_not_tried_in_a_tokens_place(server: GitServer, home: Path) -> None:
    helper = home / "helper"
    helper.write_text(f"#!/bin/sh\ntouch {home}/asked\necho username=x-access-token\necho password={OTHER}\n")
    helper.chmod(0o755)
    with (home / ".gitconfig").open("a") as config:
        config.write(f'[credential]\n\thelper = {helper}\n[credential "https://{server.host}"]\n\thelper = {helper}\n')
        config.write(f'[http "https://{server.host}/"]\n\textraHeader = Authorization: {basic(OTHER)}\n')
    with pytest.raises(RepositoryUnreachable, match=r"denied|not found"):
        fetch(server.address("shop.git"), home, tokens={server.host: "ghp_wrong-token"})
    assert {given for _, given in server.seen} == {basic("ghp_wrong-token")}
    assert not (home / "asked").exists()
    fetch(server.address("shop.git"), home)  # without a token they are what git has always used


def test_what_one_accounts_token_brought_is_not_served_to_another(
    server: GitServer, home: Path, tmp_path: Path
) -> None:
    """The same address, and each token sees another history: a commit's id must not open the other's."""
    secret = head(tmp_path, "mine")
    assert fetch(server.address("shop.git"), home, tokens={server.host: TOKEN})[1] == secret
    again = fetch(server.address("shop.git"), home, tokens={server.host: TOKEN}, base_ref=secret)
    assert again[1] == secret
    with pytest.raises(RefNotFound):
        fetch(server.address("shop.git"), home, tokens={server.host: OTHER}, account_id="team-b", base_ref=secret)
    with pytest.raises(RepositoryUnreachable, match=r"denied|not found"):
        fetch(server.address("shop.git"), home, account_id="team-b", base_ref=secret)
    theirs = fetch(server.address("shop.git"), home, tokens={server.host: OTHER}, account_id="team-b")
    assert theirs[1] == head(tmp_path, "theirs")


def test_what_needs_no_token_is_cached_once_for_all(server: GitServer, home: Path, tmp_path: Path) -> None:
    for account_id in ("team-a", "team-b"):
        fetch(server.address("public.git"), home, account_id=account_id)
    assert len(list((tmp_path / "cache").glob("*.git"))) == 1


def test_a_token_is_on_no_disk_and_on_no_command_line(server: GitServer, home: Path, tmp_path: Path) -> None:
    work = tmp_path / "mine" / "work"
    commit(work, {f"{number}.txt": f"{number}\n" * 200 for number in range(300)})
    git(work, "push", "--quiet", str(tmp_path / "mine" / "shop.git"), "HEAD:main")
    commands: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            for process in psutil.process_iter():
                try:
                    commands.add(" ".join(process.cmdline()))
                except psutil.Error:
                    continue

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        fetch(server.address("shop.git"), home, tokens={server.host: TOKEN})
        fetch(server.address("shop.git"), home, tokens={server.host: TOKEN}, base_ref=head(tmp_path, "mine"))
        until(lambda: commands, "somebody looked")
    finally:
        over.set()
        watching.join()
    forms = [form.encode() for form in (TOKEN, base64.b64encode(TOKEN.encode()).decode()[4:-4], basic(TOKEN)[6:])]
    seen = [command.encode() for command in commands]
    assert any(b"git" in command for command in seen)
    seen += [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [form for form in forms if any(form in each for each in seen)]
