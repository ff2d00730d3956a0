"""Addresses and refs are judged before git sees them."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudagent_queue.repository import check_address, check_ref, is_remote
from cloudagent_storage.errors import CredentialsInUrl, InvalidRef, RepositoryNotAllowed
from tests.support.git_repos import ENVIRONMENT


@pytest.mark.parametrize(
    ("given", "normalised"),
    [
        ("none", "none"),
        ("https://github.com/acme/shop.git", "https://github.com/acme/shop.git"),
        ("HTTPS://GitHub.com/acme/shop/", "https://github.com/acme/shop"),
        ("https://git.example.com:8443/a/b", "https://git.example.com:8443/a/b"),
        ("https://[2606:4700::1111]/a", "https://[2606:4700::1111]/a"),
        ("ssh://git@github.com/acme/shop.git", "ssh://git@github.com/acme/shop.git"),
        ("ssh://host:2222/a", "ssh://host:2222/a"),
        ("git@github.com:acme/shop.git", "git@github.com:acme/shop.git"),
    ],
)
def test_remote_addresses_are_accepted_and_normalised(given: str, normalised: str) -> None:
    assert check_address(given, local_paths_allowed=False) == normalised
    assert is_remote(normalised) == (given != "none")


@pytest.mark.parametrize("address", ["/srv/shop", "./shop", "shop", "../a b/ü", "~/shop", "a@b"])
def test_a_local_path_is_accepted_only_where_it_is_allowed(address: str) -> None:
    assert check_address(address, local_paths_allowed=True) == address
    assert not is_remote(address)
    with pytest.raises(RepositoryNotAllowed):
        check_address(address, local_paths_allowed=False)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "-oProxyCommand=id",
        "--upload-pack=id",
        "ext::sh -c id",
        "ext::sh%20-c%20id",
        "fd::3",
        "file:///etc",
        "file:/etc",
        "FILE:///etc",
        "git://host/a",
        "ftp://host/a",
        "http://host/a",
        "ssh://-oProxyCommand=id/a",
        "ssh://-x@host/a",
        "ssh:///a",
        "https:///a",
        "https://host:99999/a",
        "https://[::1/a",
        "https://host/a?token=x",
        "https://host/a#x",
        "https://host/a b",
        "-x@host:a",
        "git@-host:a",
        "git@host:-a",
        "host:a",
        "/srv/a\0b",
        "/srv/a\nb",
        "https://host/\x1b[31m",
        "/srv/\udc80",
    ],
)
def test_an_address_that_could_make_git_do_something_else_is_refused(address: str) -> None:
    with pytest.raises(RepositoryNotAllowed):
        check_address(address, local_paths_allowed=True)


def test_an_unencrypted_address_is_refused_with_the_reason() -> None:
    with pytest.raises(RepositoryNotAllowed, match="not encrypted"):
        check_address("http://example.com/a", local_paths_allowed=True)


@pytest.mark.parametrize(
    "address",
    [
        "https://ada:s3cret-value@host/a",
        "https://ghp_s3cret-value@host/a",
        "https://:s3cret-value@host/a",
        "ssh://git:s3cret-value@host/a",
        "git:s3cret-value@host:a",
    ],
)
def test_an_address_with_a_password_is_refused_without_saying_it_again(address: str) -> None:
    with pytest.raises(CredentialsInUrl) as refused:
        check_address(address, local_paths_allowed=True)
    assert "s3cret" not in str(refused.value.as_dict())


@pytest.mark.parametrize("ref", ["main", "feature/x", "v1.0", "a" * 255, "0123abc", "HEAD", "ümlaut", "a@b"])
def test_names_that_git_could_have_are_accepted(ref: str) -> None:
    assert check_ref(ref) == ref


@pytest.mark.parametrize(
    "ref",
    [
        *["", "-x", "--all", "a..b", "@{", "@", "a@{1}", "a b", "a~1", "a^", "a:b", "a?", "a*", "a[", "a\\b", "a//b"],
        *["/a", "a/", "a.", ".a", "a/.b", "a.lock", "a.lock/b", "a\0", "a\n", "a" * 256, "\ud800"],
    ],
)
def test_names_that_git_cannot_have_are_refused(ref: str) -> None:
    with pytest.raises(InvalidRef):
        check_ref(ref)


@given(st.text(st.sampled_from("ab./-@{~^:?*[\\ \x7f\tlock"), min_size=1, max_size=8).filter(lambda r: "\0" not in r))
def test_what_is_accepted_is_accepted_by_git_too(ref: str) -> None:
    try:
        check_ref(ref)
        accepted = True
    except InvalidRef:
        accepted = False
    if accepted:
        done = subprocess.run(["git", "check-ref-format", f"refs/heads/{ref}"], env=ENVIRONMENT)
        assert done.returncode == 0


@pytest.mark.parametrize(
    "address",
    [
        "https://127.0.0.1/x", "https://localhost/x", "https://LOCALHOST./x", "https://2130706433/x", "https://127.1/x",
        "https://0x7f.1/x", "https://0/x", "https://10.0.0.5/x", "https://192.168.1.1/x", "https://169.254.169.254/x",
        "https://[::1]/x", "https://[::ffff:127.0.0.1]/x", "https://[fd00:ec2::254]/x", "ssh://git@172.16.0.1/x",
        "git@127.0.0.1:x", "git@localhost:x", "https://metadata.google.internal/x",
    ],
)  # fmt: skip
def test_from_elsewhere_no_host_of_this_machines_own_network_can_be_named(address: str) -> None:
    assert check_address(address, local_paths_allowed=True)
    with pytest.raises(RepositoryNotAllowed):
        check_address(address, local_paths_allowed=False)


@pytest.mark.parametrize("address", ["https://github.com/a/b", "git@gitlab.example:a/b", "https://8.8.8.8/x"])
def test_from_elsewhere_public_hosts_can_be_named(address: str) -> None:
    assert check_address(address, local_paths_allowed=False) == address
