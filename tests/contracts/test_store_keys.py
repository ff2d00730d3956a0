"""API keys as they are kept: found, used, revoked."""

from __future__ import annotations

import pytest

from cloudagent_storage.errors import AmbiguousId, KeyNotFound
from cloudagent_storage.records import ApiKey, new_id
from cloudagent_storage.store import Store


def add(
    store: Store, key_id: str | None = None, *, account_id: str = "team-a", expires_days: int | None = None
) -> ApiKey:
    key_id = key_id or new_id("key")
    return store.keys.add(
        account_id, "laptop", key_id=key_id, digest=f"digest of {key_id}", hint="wxyz", expires_days=expires_days
    )


def valid(store: Store, key_id: str) -> bool:
    kept = store.keys.find(key_id)
    assert kept is not None
    return kept.valid


def test_a_kept_key_is_found_with_its_digest_and_its_account_is_made(store: Store) -> None:
    made = add(store)
    kept = store.keys.find(made.key_id)
    assert kept is not None and kept.valid
    assert (kept.key, kept.digest) == (made, f"digest of {made.key_id}")
    assert (made.account_id, made.name, made.hint) == ("team-a", "laptop", "wxyz")
    assert made.expires_at is made.revoked_at is made.last_used_at is None
    assert store.accounts.ensure("team-a").created_at <= made.created_at
    assert store.keys.find(new_id("key")) is None


def test_an_account_may_have_several_keys_and_all_are_listed(store: Store) -> None:
    made = [add(store), add(store), add(store, account_id="team-b")]
    listed = store.keys.list()
    assert sorted(key.key_id for key in listed) == sorted(key.key_id for key in made)
    assert list(listed) == sorted(listed, key=lambda key: key.created_at, reverse=True)


def test_a_key_is_valid_until_it_expires(store: Store) -> None:
    later, past = add(store, expires_days=1), add(store, expires_days=-1)
    assert later.expires_at is not None and (later.expires_at - later.created_at).days in (0, 1)
    assert valid(store, later.key_id) and not valid(store, past.key_id)


def test_a_revoked_key_is_not_valid_and_revoking_twice_changes_nothing(store: Store) -> None:
    one, other = add(store), add(store)
    first = store.keys.revoke(one.key_id)
    assert first.revoked_at is not None
    assert store.keys.revoke(one.key_id) == first
    assert not valid(store, one.key_id) and valid(store, other.key_id)


def test_a_key_may_be_named_by_a_beginning_that_is_unique(store: Store) -> None:
    one = add(store, "key_" + "a" * 26)
    add(store, "key_" + "a" * 25 + "b")
    with pytest.raises(AmbiguousId) as ambiguous:
        store.keys.revoke("key_aaaaaaaa")
    assert ambiguous.value.field == "key" and "keys" in ambiguous.value.message
    assert valid(store, one.key_id)
    assert store.keys.revoke("a" * 26).key_id == one.key_id
    for unknown in ("", "key_", "bbbb", "aaa", "key_%", "KEY_AAAA", "a" * 27):
        with pytest.raises(KeyNotFound):
            store.keys.revoke(unknown)


def test_the_use_of_a_key_is_noted_at_most_once_in_a_while_with_its_newest_digest(store: Store) -> None:
    one, other = add(store), add(store)
    store.keys.used(one.key_id, digest="d1", every_s=60)
    first = store.keys.find(one.key_id)
    assert first is not None and first.key.last_used_at is not None and first.digest == "d1"
    store.keys.used(one.key_id, digest="d2", every_s=60)
    assert store.keys.find(one.key_id) == first
    store.keys.used(one.key_id, digest="d2", every_s=-1)
    again = store.keys.find(one.key_id)
    assert again is not None and again.digest == "d2"
    untouched = store.keys.find(other.key_id)
    assert untouched is not None and untouched.key.last_used_at is None
