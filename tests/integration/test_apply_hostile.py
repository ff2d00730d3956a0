"""Hostile results: whatever they hold, nothing outside the tree changes, and a refusal changes nothing at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudagent_mcp.apply.policy import check_path, is_sensitive
from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.errors import CloudAgentError, ConfirmationNeeded, UnsafeChange
from tests.support.forge import FILE, SUBMODULE, hostile
from tests.support.git_repos import Content, Workshop, commit, make_repository
from tests.support.hostile_results import ROWS
from tests.support.hostile_rows import Row
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


def test_a_submodule_of_the_users_is_neither_moved_nor_removed(premises: Premises) -> None:
    make_repository(premises.shop / "module", {"m": "m\n"})
    commit(premises.shop, {})
    workshop = Workshop(premises.folder / "workshop", bundle_working_tree(premises.shop, base_ref=None).bundle)
    before = premises.look()
    for result in (
        workshop.result({"module": None, "a.txt": "b\n"}),
        hostile(workshop, (SUBMODULE, b"module", b"x")),
        hostile(workshop, (FILE, b"module", b"x")),
        hostile(workshop, (FILE, b"module/m", b"x")),
    ):
        with pytest.raises(UnsafeChange, match="module is a submodule"):
            premises.apply(result)
        assert premises.look() == before


def test_a_sensitive_file_is_refused_whether_it_is_new_changed_or_deleted(premises: Premises) -> None:
    commit(premises.shop, {".envrc": "x\n", "CLAUDE.md": "x\n"})
    workshop = Workshop(premises.folder / "workshop", bundle_working_tree(premises.shop, base_ref=None).bundle)
    before = premises.look()
    changes: list[dict[str, Content]] = [{".envrc": "y\n"}, {"CLAUDE.md": None}, {".mcp.json": "{}"}]
    for files in changes:
        with pytest.raises(ConfirmationNeeded) as refused:
            premises.apply(workshop.result(files))
        assert [*files] == [path for path, _ in refused.value.files] and next(iter(files)) in refused.value.message
        assert premises.look() == before


SENSITIVE = """
    .claude/settings.json x/.claude/commands/a.md CLAUDE.md docs/claude.MD AGENTS.md .mcp.json .cursor/mcp.json
    .cursorrules .gemini/x .codex/x .windsurfrules .clinerules .roo/x .aider.conf.yml .github/copilot-instructions.md
    .kiro/x .amazonq/x .continue/x .junie/x .opencode/x opencode.jsonc .trae/x .augment-guidelines .goosehints
    .vscode/tasks.json .idea/x.xml .zed/tasks.json my.code-workspace .devcontainer/devcontainer.json .devcontainer.json
    .gitpod.yml .exrc .vimrc .nvimrc .nvim.lua .dir-locals.el .gdbinit .lldbinit .pdbrc .pdbrc.py
    .github/workflows/x.yml .github/actions/a/action.yml .gitlab-ci.yml .circleci/x .travis.yml azure-pipelines-x.yml
    bitbucket-pipelines.yml Jenkinsfile .drone.yml .buildkite/x .woodpecker.yml appveyor.yml .forgejo/x .gitea/x
    .husky/pre-commit .githooks/x .pre-commit-config.yaml lefthook.yml .lefthook.yaml .envrc .env .env.local mise.toml
    .mise/x .gitattributes sub/.gitattributes .gitmodules .gitconfig .npmrc .yarnrc.yml .yarn/plugins/x .pnpmfile.cjs
    .cargo/config.toml pip.conf x.pth sitecustomize.py usercustomize.py .cloudagent.toml .cloudagent/prompts/x.md
"""
ORDINARY = (
    "README.md src/app.py .gitignore env.py github/workflows/x claude/x.md .github/CODEOWNERS cargo/x .cloudagent/x"
)


def test_files_that_make_machines_execute_things_are_sensitive_in_any_case() -> None:
    for path in SENSITIVE.split():
        assert is_sensitive(path) and is_sensitive(path.upper()) and is_sensitive(path.lower()), path
        check_path(path)
    for path in ORDINARY.split():
        assert not is_sensitive(path), path
        check_path(path)
