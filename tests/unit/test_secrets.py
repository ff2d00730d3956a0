"""Encryption at rest."""

from __future__ import annotations

import base64
import hashlib
import hmac
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudagent_storage.errors import Internal
from cloudagent_storage.secrets import Keyring, generate_key

SECRET = b"sk-ant-canary"


@settings(max_examples=30)
@given(plaintext=st.binary(), bound_to=st.text(st.characters(codec="utf-8")))
def test_what_is_sealed_comes_back(plaintext: bytes, bound_to: str) -> None:
    keyring = Keyring([generate_key()])
    assert keyring.open(keyring.seal(plaintext, bound_to=bound_to), bound_to=bound_to) == plaintext


def test_sealing_shows_nothing_and_is_never_the_same_twice() -> None:
    keyring = Keyring([generate_key()])
    sealed = {keyring.seal(SECRET, bound_to="task_a") for _ in range(100)}
    assert len(sealed) == 100
    assert not any(b"canary" in each or base64.b64encode(SECRET)[:8] in each for each in sealed)


def test_a_secret_opens_only_where_it_belongs() -> None:
    keyring = Keyring([generate_key()])
    sealed = keyring.seal(SECRET, bound_to="task_a")
    for other in ("task_b", "", "task_", "task_aa"):
        with pytest.raises(Internal, match="moved"):
            keyring.open(sealed, bound_to=other)


def test_an_altered_secret_does_not_open() -> None:
    keyring = Keyring([generate_key()])
    sealed = keyring.seal(SECRET, bound_to="task_a")
    for at in range(len(sealed)):
        altered = bytearray(sealed)
        altered[at] ^= 1
        with pytest.raises(Internal):
            keyring.open(bytes(altered), bound_to="task_a")
    for length in range(len(sealed)):
        with pytest.raises(Internal):
            keyring.open(sealed[:length], bound_to="task_a")


def test_a_new_key_in_front_seals_and_the_old_one_still_opens() -> None:
    old, new = generate_key(), generate_key()
    sealed_before = Keyring([old]).seal(SECRET, bound_to="a")
    both = Keyring([new, old])
    assert both.open(sealed_before, bound_to="a") == SECRET
    sealed_after = both.seal(SECRET, bound_to="a")
    assert Keyring([new]).open(sealed_after, bound_to="a") == SECRET
    with pytest.raises(Internal, match="ENCRYPTION_KEY has changed"):
        Keyring([old]).open(sealed_after, bound_to="a")


def test_a_missing_key_is_told_with_its_remedy_and_nothing_secret() -> None:
    old, new = generate_key(), generate_key()
    sealed = Keyring([old]).seal(SECRET, bound_to="a")
    with pytest.raises(Internal) as caught:
        Keyring([new]).open(sealed, bound_to="a")
    told = str(caught.value.as_dict())
    assert "earlier key" in told
    assert old not in told and new not in told and "canary" not in told


def test_a_key_may_be_text_or_bytes_and_padded_or_not() -> None:
    key = generate_key()
    raw = base64.urlsafe_b64decode(key)
    sealed = Keyring([key]).seal(SECRET, bound_to="a")
    for same in (key, key.encode(), key.rstrip("="), raw, base64.b64encode(raw).decode()):
        assert Keyring([same]).open(sealed, bound_to="a") == SECRET


@pytest.mark.parametrize("keys", [[], [""], ["hunter2"], ["ä" * 43], ["A" * 42], [generate_key() * 2], [b"x" * 31]])
def test_what_is_no_key_is_refused_without_showing_it(keys: list[str]) -> None:
    with pytest.raises(Internal) as caught:
        Keyring(keys)
    assert "hunter2" not in str(caught.value.as_dict())
    assert "ENCRYPTION_KEY" in str(caught.value.as_dict())


def test_a_missing_key_file_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "encryption.key"
    sealed = Keyring.from_file(file).seal(SECRET, bound_to="a")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Keyring.from_file(file).open(sealed, bound_to="a") == SECRET
    assert list(tmp_path.iterdir()) == [file]


def test_all_who_need_a_key_file_at_once_get_the_same_key(tmp_path: Path) -> None:
    for n in range(20):
        file = tmp_path / str(n) / "encryption.key"
        file.parent.mkdir()
        with ThreadPoolExecutor(8) as pool:
            keyrings = list(pool.map(Keyring.from_file, [file] * 8))
        sealed = keyrings[0].seal(SECRET, bound_to="a")
        assert {keyring.open(sealed, bound_to="a") for keyring in keyrings} == {SECRET}
        assert list(file.parent.iterdir()) == [file]


def test_a_key_file_may_hold_several_keys_newest_first(tmp_path: Path) -> None:
    old, new = generate_key(), generate_key()
    file = tmp_path / "encryption.key"
    file.write_text(f"{new}\n{old}\n")
    keyring = Keyring.from_file(file)
    assert keyring.open(Keyring([old]).seal(SECRET, bound_to="a"), bound_to="a") == SECRET
    assert Keyring([new]).open(keyring.seal(SECRET, bound_to="a"), bound_to="a") == SECRET


def test_a_key_file_that_is_no_use_is_told_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "encryption.key"
    for content in (b"", b"hunter2\n", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(Internal) as caught:
            Keyring.from_file(file)
        assert str(tmp_path) not in str(caught.value.as_dict()) and "hunter2" not in str(caught.value.as_dict())
        assert file.read_bytes() == content
    with pytest.raises(Internal):
        Keyring.from_file(tmp_path / "missing" / "encryption.key")


def test_a_keyed_hash_is_one_for_each_key_the_newest_first() -> None:
    old, new = generate_key(), generate_key()
    before, both = Keyring([old]).digests("text"), Keyring([new, old]).digests("text")
    assert [*Keyring([new]).digests("text"), *before] == list(both)
    assert len(set(both)) == 2 and len(before) == 1
    assert before != Keyring([old]).digests("other text")


def test_a_keyed_hash_is_not_made_with_the_key_that_seals() -> None:
    key = generate_key()
    raw = base64.urlsafe_b64decode(key)
    (digest,) = Keyring([key]).digests("text")
    assert digest not in (hmac.new(raw, b"text", "sha256").hexdigest(), hashlib.sha256(b"text").hexdigest())
