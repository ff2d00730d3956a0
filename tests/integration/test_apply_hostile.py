"""Hostile results: whatever they hold, nothing outside the tree changes, and a refusal changes nothing at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudagent_storage.errors import CloudAgentError
from tests.support.hostile_results import ROWS, Row
from tests.support.premises import Premises


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Premises:
    return Premises.build(tmp_path_factory.mktemp("premises"))


@pytest.fixture
def premises(
    built: Premises, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Premises:
    """A copy; the original where nothing is to be written, as a test proves that nothing was."""
    row: Row | None = getattr(request.node, "callspec", None) and request.node.callspec.params.get("row")
    untouched = row is not None and row.code is not None and row.here is None
    copy = built if untouched else built.copy(tmp_path)
    copy.live_in(monkeypatch)
    return copy


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_of_a_hostile_result(premises: Premises, row: Row) -> None:
    if row.here is not None:
        row.here(premises.shop)
    result = row.make(premises.forge())
    before, tree, around = premises.look(), premises.tree(), premises.look_around(result)
    if row.code is not None:
        with pytest.raises(CloudAgentError) as refused:
            premises.apply(result, allow=row.allow)
        assert (refused.value.code, refused.value.message) == (row.code, refused.value.message)
        assert row.saying in refused.value.message and refused.value.message.isprintable()
        assert str(premises.folder) not in refused.value.message
        assert premises.look() == before
        return
    assert premises.apply(result, allow=row.allow).outcome == "applied"
    assert premises.look_around(result) == around
    after = premises.tree()
    folders = {str(above) for path in row.writes for above in Path(path).parents}
    assert {path for path in tree.keys() | after.keys() if tree.get(path) != after.get(path)} - folders == {*row.writes}
    assert {path: after[path][1] if path in after else None for path in row.writes} == row.writes
    premises.undo(result)
    assert premises.tree() == tree and premises.look_around(result) == around
