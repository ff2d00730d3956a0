"""Uploads: each its account's alone, one for each commit, until nobody has used it for a day."""

from __future__ import annotations

import pytest

from cloudagent_storage.errors import RepositoryTooLarge, UploadNotFound
from cloudagent_storage.records import Upload
from cloudagent_storage.store import Store
from tests.support.stored import at_once, execute
from tests.support.worlds import until


@pytest.fixture(autouse=True)
def accounts(store: Store) -> None:
    for name in ("ada", "bob"):
        store.accounts.ensure(name)


def sha(number: int) -> str:
    return f"{number:040x}"


def keep(store: Store, tip: int, *, account_id: str = "ada", data: bytes = b"bundle", quota: int = 10**9) -> Upload:
    """An upload of a commit with two before it."""
    before = store.now()
    until(lambda: store.now() > before, "the clock, which may count in milliseconds, goes on")
    return store.uploads.keep(
        account_id,
        data,
        base_sha=sha(tip),
        commits=[sha(number) for number in (tip, tip - 1, tip - 2)],
        notes=[f"note {tip}"],
        config=b"setup = 'x'",
        manifests="m" * 64,
        quota_bytes=quota,
    )


def test_what_was_kept_is_given_back_whole(store: Store) -> None:
    data = bytes(range(256)) * 10
    kept = keep(store, 5, data=data)
    assert kept.upload_id.startswith("upl_")
    upload, found = store.uploads.take("ada", kept.upload_id)
    assert (upload, found) == (kept, data)
    assert (upload.base_sha, upload.notes, upload.config) == (sha(5), ("note 5",), b"setup = 'x'")


def test_an_upload_is_its_accounts_alone(store: Store) -> None:
    kept = keep(store, 5)
    with pytest.raises(UploadNotFound):
        store.uploads.take("bob", kept.upload_id)
    with pytest.raises(UploadNotFound):
        store.uploads.again("bob", sha(5), [])
    assert store.uploads.known("bob", [sha(5)]) == []
    assert store.uploads.holding("bob", [sha(5)]) is None
    assert keep(store, 5, account_id="bob").upload_id != kept.upload_id


def test_the_same_commit_is_the_same_upload_with_the_notes_of_the_last_time(store: Store) -> None:
    kept = keep(store, 5)
    assert store.uploads.again("ada", sha(5), ["new"]).upload_id == kept.upload_id
    assert store.uploads.take("ada", kept.upload_id)[0].notes == ("new",)
    ids = at_once(*(lambda: keep(store, 9).upload_id for _ in range(6)))
    assert len(set(ids)) == 1


def test_what_is_there_is_told_of_one_upload_that_has_the_newest(store: Store) -> None:
    keep(store, 5, data=b"five")
    keep(store, 20, data=b"twenty")
    assert store.uploads.known("ada", [sha(30), sha(4), sha(20), sha(3), sha(18)]) == [sha(4), sha(3)]
    assert store.uploads.known("ada", [sha(30), sha(31)]) == []
    assert store.uploads.holding("ada", [sha(4), sha(3)]) == b"five"
    assert store.uploads.holding("ada", [sha(4), sha(20)]) is None


def test_what_nobody_uses_for_a_day_is_gone_and_use_prolongs_it(store: Store, store_url: str) -> None:
    old, young = keep(store, 5), keep(store, 20)

    def unused_for(upload: Upload, hours: int) -> None:
        sqlite = f"strftime('%Y-%m-%d %H:%M:%f', 'now', '-{hours} hours')"
        moment = sqlite if store_url.startswith("sqlite") else f"now() - interval '{hours} hours'"
        execute(store_url, f"UPDATE uploads SET used_at = {moment} WHERE upload_id = '{upload.upload_id}'")

    for upload in (old, young):
        unused_for(upload, 23)
    store.uploads.take("ada", young.upload_id)
    unused_for(old, 25)
    assert store.uploads.known("ada", [sha(5)]) == [] and store.uploads.holding("ada", [sha(5)]) is None
    with pytest.raises(UploadNotFound):  # also while it has not been deleted yet
        store.uploads.take("ada", old.upload_id)
    assert store.uploads.prune() == 1
    unused_for(young, 23)
    assert store.uploads.prune() == 0
    assert store.uploads.take("ada", young.upload_id)[1] == b"bundle"
    assert keep(store, 5).upload_id != old.upload_id


def test_beyond_an_accounts_share_those_go_that_were_not_used_for_longest(store: Store) -> None:
    theirs = keep(store, 5, account_id="bob", data=b"x" * 90)
    first, second, third = (keep(store, tip, data=b"x" * 40, quota=100) for tip in (10, 20, 30))
    with pytest.raises(UploadNotFound):
        store.uploads.take("ada", first.upload_id)
    store.uploads.take("ada", second.upload_id)
    keep(store, 40, data=b"x" * 40, quota=100)
    with pytest.raises(UploadNotFound):
        store.uploads.take("ada", third.upload_id)
    store.uploads.take("ada", second.upload_id)
    store.uploads.take("bob", theirs.upload_id)
    with pytest.raises(RepositoryTooLarge):
        keep(store, 50, data=b"x" * 101, quota=100)
    store.uploads.take("ada", second.upload_id)
