"""Templates that hold a finished set-up: one account's for one key, the newest of them, until it is forgotten."""

from __future__ import annotations

from cloudagent_storage.records import KeptTemplate
from cloudagent_storage.store import Store
from tests.support.stored import at_once
from tests.support.worlds import until

KEY = "a" * 64


def kept(template: str, *, account_id: str = "team-a", provider: str = "e2b", key: str = KEY) -> KeptTemplate:
    return KeptTemplate(account_id=account_id, provider=provider, key=key, template=template)


def later(store: Store) -> None:
    """Wait for the database's clock, which may count in milliseconds."""
    before = store.now()
    until(lambda: store.now() > before, "the clock goes on")


def test_a_kept_template_is_found_by_its_account_provider_and_key_alone(store: Store) -> None:
    assert store.templates.find("team-a", "e2b", KEY) is None
    assert store.templates.keep("team-a", "e2b", KEY, "tpl-1") is None
    assert store.templates.find("team-a", "e2b", KEY) == "tpl-1"
    assert store.templates.find("team-b", "e2b", KEY) is None
    assert store.templates.find("team-a", "novita", KEY) is None
    assert store.templates.find("team-a", "e2b", "b" * 64) is None


def test_a_newer_template_takes_the_place_of_the_older_which_is_told(store: Store) -> None:
    store.templates.keep("team-a", "e2b", KEY, "tpl-1")
    assert store.templates.keep("team-a", "e2b", KEY, "tpl-1") is None
    assert store.templates.keep("team-a", "e2b", KEY, "tpl-2") == "tpl-1"
    assert store.templates.find("team-a", "e2b", KEY) == "tpl-2"


def test_of_several_that_are_kept_at_once_all_but_the_found_one_are_told(store: Store) -> None:
    names = [f"tpl-{number}" for number in range(6)]
    replaced = at_once(*(lambda name=name: store.templates.keep("team-a", "e2b", KEY, name) for name in names))
    assert replaced.count(None) == 1
    assert {store.templates.find("team-a", "e2b", KEY), *filter(None, replaced)} == set(names)


def test_a_forgotten_template_is_not_found_and_forgetting_twice_changes_nothing(store: Store) -> None:
    store.templates.keep("team-a", "e2b", KEY, "tpl-1")
    assert not store.templates.forget(kept("tpl-1", account_id="team-b"))
    assert store.templates.forget(kept("tpl-1"))
    assert not store.templates.forget(kept("tpl-1"))
    assert store.templates.find("team-a", "e2b", KEY) is None


def test_forgetting_an_old_template_leaves_the_one_that_took_its_place(store: Store) -> None:
    store.templates.keep("team-a", "e2b", KEY, "tpl-1")
    store.templates.keep("team-a", "e2b", KEY, "tpl-2")
    assert not store.templates.forget(kept("tpl-1"))
    assert store.templates.find("team-a", "e2b", KEY) == "tpl-2"


def test_what_nobody_asks_for_is_listed_and_what_is_asked_for_goes_to_the_end(store: Store) -> None:
    for name in ("one", "two", "three"):
        store.templates.keep("team-a", "e2b", name, f"tpl-{name}")
        later(store)
    store.templates.keep("team-a", "novita", "other", "tpl-other")
    assert store.templates.unused("e2b", for_s=3600) == []
    listed = store.templates.unused("e2b", for_s=-1)
    assert listed == [kept(f"tpl-{name}", key=name) for name in ("one", "two", "three")]
    store.templates.find("team-a", "e2b", "one")
    assert [found.key for found in store.templates.unused("e2b", for_s=-1)] == ["two", "three", "one"]
    assert [found.key for found in store.templates.unused("e2b", for_s=-1, limit=1)] == ["two"]
