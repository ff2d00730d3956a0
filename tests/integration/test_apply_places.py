"""A result as a branch, or as a worktree on one: nothing of the user's is touched, and back again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cloudagent_mcp.apply import ApplyOutcome, Destination, apply, take_back_interrupted, undo
from cloudagent_mcp.apply import place as as_place
from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.errors import (
    AlreadyApplied,
    ApplyConflict,
    CloudAgentError,
    ConfirmationNeeded,
    InvalidInput,
    InvalidRef,
    NothingToUndo,
    TargetExists,
    TargetNotAllowed,
    UnsafeChange,
)
from cloudagent_storage.records import short_id
from tests.support.forge import hostile
from tests.support.git_repos import (
    Result,
    Workshop,
    commit,
    files_of,
    fingerprint,
    git,
    make_repository,
    put,
)

BRANCH, WORKTREE = Destination(onto="branch"), Destination(onto="worktree")
LINES = "".join(f"line {n}\n" for n in range(20))


class Desk:
    """A user's repository with work that is not committed, and results made of it elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shop = make_repository(folder / "shop", {"a.txt": LINES, "b.bin": b"\0\1", "sub/c.txt": "c\n"})
        self._workshops = 0

    def workshop(self) -> Workshop:
        self._workshops += 1
        bundle = bundle_working_tree(self.shop, base_ref=None).bundle
        return Workshop(self.folder / f"workshop{self._workshops}", bundle)

    def apply(self, result: Result, destination: Destination, *, allow: tuple[str, ...] = ()) -> ApplyOutcome:
        return apply(
            self.shop,
            **result.given,
            state_folder=self.folder / "state",
            allow_sensitive=allow,
            destination=destination,
        )

    def undo(self, result: Result, destination: Destination | None = None) -> ApplyOutcome:
        state = self.folder / "state"
        return undo(self.shop, task_id=result.task_id, state_folder=state, destination=destination)

    def worktree(self, result: Result) -> Path:
        return self.folder / f"shop-task-{short_id(result.task_id)}"

    def mine(self) -> dict[str, tuple[int, bytes]]:
        """What is the user's: the working tree, the index and HEAD."""
        git_folder = {name: (0, (self.shop / ".git" / name).read_bytes()) for name in ("index", "HEAD", "config")}
        return files_of(self.shop) | git_folder

    def refs(self) -> set[str]:
        return set(git(self.shop, "for-each-ref", "--format=%(refname) %(objectname)").splitlines())

    def refuses(self, error: type[CloudAgentError], result: Result, destination: Destination) -> CloudAgentError:
        """Nothing at all is there that was not there before when this is refused."""
        before = fingerprint(self.folder, but=("state", "objects"))
        with pytest.raises(error) as refused:
            self.apply(result, destination)
        assert fingerprint(self.folder, but=("state", "objects")) == before
        return refused.value


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # whoever runs the tests may have an identity
    return Desk(tmp_path)


def commits_of(workshop: Workshop, *steps: tuple[str, dict[str, str | None]]) -> Result:
    """A result of several commits, each by somebody."""
    git(workshop.folder, "reset", "--quiet", "--hard", workshop.base_sha)
    for author, files in steps:
        put(workshop.folder, files)
        git(workshop.folder, "add", "--all", "--force")
        git(workshop.folder, "commit", "--quiet", f"--author={author} <{author.lower()}@example.com>", "-m", "Step")
    return workshop.of(git(workshop.folder, "rev-parse", "HEAD"))


# -- a branch ---------------------------------------------------------------------------------------------------------


def test_a_branch_has_the_agents_commits_and_touches_nothing_else(desk: Desk) -> None:
    result = commits_of(desk.workshop(), ("Agent", {"a.txt": "new\n"}), ("Other", {"new.txt": "n\n"}))
    put(desk.shop, {"a.txt": "mine\n", "untracked.txt": "mine\n"})
    git(desk.shop, "add", "a.txt")
    before, refs = desk.mine(), desk.refs()
    outcome = desk.apply(result, BRANCH)
    assert (outcome.outcome, outcome.branch, outcome.backup_ref) == ("applied", result.branch, None)
    assert desk.mine() == before
    assert git(desk.shop, "log", "--format=%an", f"main..{result.branch}") == "Other\nAgent"
    assert git(desk.shop, "rev-parse", result.branch) == git(desk.folder / "workshop1", "rev-parse", "HEAD")
    assert len(desk.refs() - refs) == 1
    assert desk.undo(result).outcome == "undone"
    assert desk.refs() == refs and desk.mine() == before
    with pytest.raises(NothingToUndo):
        desk.undo(result)


def test_a_branch_can_have_another_name_and_be_one_commit(desk: Desk) -> None:
    result = commits_of(desk.workshop(), ("Agent", {"a.txt": "1\n"}), ("Agent", {"a.txt": "2\n"}))
    git(desk.shop, "config", "user.name", "Grace <H>")
    git(desk.shop, "config", "user.email", "grace@example.com")
    destination = Destination(onto="branch", branch="mine/one", squash=True, title="Fix \x1b[31mit\n\nall")
    outcome = desk.apply(result, destination)
    assert outcome.branch == "mine/one"
    said = git(desk.shop, "log", "--format=%an|%cn|%ce|%B", "main..mine/one")
    assert said == f"Agent|Grace H|grace@example.com|Fix [31mit all\n\nCloudagent-Task: {result.task_id}"
    assert git(desk.shop, "show", "mine/one:a.txt") == "2"
    desk.refuses(AlreadyApplied, result, destination)
    desk.undo(result)
    assert "mine/one" not in git(desk.shop, "branch", "--list")


def test_one_commit_of_several_authors_names_all_of_them(desk: Desk) -> None:
    result = commits_of(desk.workshop(), ("First", {"a.txt": "1\n"}), ("Second", {"a.txt": "2\n"}))
    desk.apply(result, Destination(onto="branch", squash=True, title="T"))
    assert git(desk.shop, "log", "-1", "--format=%an|%cn", result.branch) == "Second|cloudagent"
    assert "Co-authored-by: First <first@example.com>" in git(desk.shop, "log", "-1", "--format=%B", result.branch)


@pytest.mark.parametrize("squash", [False, True])
def test_uncommitted_work_is_not_dragged_along(desk: Desk, squash: bool) -> None:
    put(desk.shop, {"a.txt": LINES.replace("line 17\n", "mine\n"), "untracked.txt": "mine\n", "b.bin": None})
    workshop = desk.workshop()
    changed = LINES.replace("line 17\n", "mine\n").replace("line 2\n", "task\n")
    result = commits_of(workshop, ("Agent", {"new.txt": "n\n"}), ("Other", {"a.txt": changed}))
    outcome = desk.apply(result, Destination(onto="branch", squash=squash, title="T"))
    assert git(desk.shop, "merge-base", "main", result.branch) == git(desk.shop, "rev-parse", "main")
    assert git(desk.shop, "diff", "--name-only", "main", result.branch).split() == ["a.txt", "new.txt"]
    assert git(desk.shop, "show", f"{result.branch}:a.txt") + "\n" == LINES.replace("line 2\n", "task\n")
    authors = git(desk.shop, "log", "--format=%an", f"main..{result.branch}").split()
    assert authors == (["Other"] if squash else ["Other", "Agent"])
    assert "not in it" in outcome.message


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize(
    "work",
    [
        {"a.txt": LINES.replace("line 17\n", "mine and the task's\n")},
        {"untracked.txt": "mine and the task's\n"},
        {"b.bin": b"\0\7\7"},
    ],
    ids=["same lines", "a file that was untracked", "binary"],
)
def test_uncommitted_work_that_the_task_changed_is_a_commit_of_its_own_below(
    desk: Desk, work: dict[str, str], squash: bool
) -> None:
    put(desk.shop, {"a.txt": LINES.replace("line 17\n", "mine\n"), "untracked.txt": "mine\n", "b.bin": b"\0\7"})
    result = commits_of(desk.workshop(), ("Agent", {**work}))
    outcome = desk.apply(result, Destination(onto="branch", squash=squash, title="T"))
    assert "a commit of its own" in outcome.message
    assert git(desk.shop, "log", "--format=%an", f"main..{result.branch}").split() == ["Agent", "cloudagent"]
    task = git(desk.shop, "diff", "--name-only", f"{result.branch}~1", result.branch)
    assert task.split() == list(work)


def test_merges_and_side_branches_of_the_agent_keep_their_shape(desk: Desk) -> None:
    put(desk.shop, {"untracked.txt": "mine\n"})
    workshop = desk.workshop()
    commits_of(workshop, ("Agent", {"one.txt": "1\n"}))
    git(workshop.folder, "checkout", "--quiet", "-b", "side", f"{workshop.base_sha}~1")
    commit(workshop.folder, {"two.txt": "2\n"})
    git(workshop.folder, "merge", "--quiet", "--no-edit", "main")
    result = workshop.of(git(workshop.folder, "rev-parse", "HEAD"))
    desk.apply(result, BRANCH)
    assert len(git(desk.shop, "rev-list", f"main..{result.branch}").split()) == 3
    assert git(desk.shop, "diff", "--name-only", "main", result.branch).split() == ["one.txt", "two.txt"]


def test_a_shallow_clone_gets_a_branch_on_its_own_history(desk: Desk, tmp_path: Path) -> None:
    commit(desk.shop, {"more.txt": "m\n"})
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{desk.shop}", "shallow")
    desk.shop = tmp_path / "shallow"
    put(desk.shop, {"untracked.txt": "mine\n"})
    workshop = desk.workshop()
    result = commits_of(workshop, ("Agent", {"new.txt": "n\n"}))
    desk.apply(result, BRANCH)
    assert git(desk.shop, "rev-parse", f"{result.branch}~1") == git(desk.shop, "rev-parse", "HEAD")
    result = commits_of(workshop, ("Agent", {"untracked.txt": "n\n"}))
    desk.apply(result, BRANCH)
    assert git(desk.shop, "rev-parse", f"{result.branch}~2") == git(desk.shop, "rev-parse", "HEAD")


def test_what_the_user_did_to_the_same_files_meanwhile_is_no_conflict_for_a_branch(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": "task\n"})
    commit(desk.shop, {"a.txt": "user\n"})
    put(desk.shop, {"a.txt": "user, not committed\n"})
    desk.apply(result, BRANCH)
    assert git(desk.shop, "show", f"{result.branch}:a.txt") == "task"


def test_a_branch_of_the_users_own_is_never_moved(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": "task\n"})
    git(desk.shop, "branch", result.branch)
    refusal = desk.refuses(TargetExists, result, BRANCH)
    assert refusal.field == "branch" and "--branch NAME" in refusal.remedy
    desk.refuses(TargetExists, result, WORKTREE)
    assert desk.apply(result, Destination(onto="branch", branch="other")).branch == "other"
    git(desk.shop, "branch", "folder/x")
    desk.refuses(TargetNotAllowed, result, Destination(onto="branch", branch="folder"))


@pytest.mark.parametrize("name", ["-x", "a..b", "HEAD", "refs/heads/x", "a b", "x.lock", "a\x1bb"])
def test_a_branch_has_a_name_that_git_takes(desk: Desk, name: str) -> None:
    result = desk.workshop().result({"a.txt": "task\n"})
    assert desk.refuses(InvalidRef, result, Destination(onto="branch", branch=name)).field == "branch"


def test_a_branch_with_later_commits_or_in_use_is_not_taken_back(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": "task\n"})
    desk.apply(result, BRANCH)
    git(desk.shop, "checkout", "--quiet", result.branch)
    with pytest.raises(ApplyConflict, match="checked out"):
        desk.undo(result)
    commit(desk.shop, {"later.txt": "mine\n"})
    git(desk.shop, "checkout", "--quiet", "main")
    refs = desk.refs()
    with pytest.raises(ApplyConflict, match="other commits"):
        desk.undo(result)
    assert desk.refs() == refs


# -- a worktree -------------------------------------------------------------------------------------------------------


def test_a_worktree_opens_beside_the_repository_and_goes_again(desk: Desk) -> None:
    put(desk.shop, {"untracked.txt": "mine\n"})
    workshop = desk.workshop()
    result = workshop.result({"a.txt": "new\n", "sub/c.txt": None, "link": "-> a.txt", "tool": "#!\n"})
    before, everything = desk.mine(), fingerprint(desk.folder, but=("state", "objects"))
    outcome = desk.apply(result, WORKTREE)
    place = desk.worktree(result)
    assert outcome.worktree == str(place) and outcome.branch == result.branch
    assert desk.mine() == before
    assert git(place, "status", "--porcelain", "--ignored") == ""
    assert git(place, "symbolic-ref", "HEAD") == f"refs/heads/{result.branch}"
    assert (place / "a.txt").read_text() == "new\n" and not (place / "sub").exists()
    assert os.readlink(place / "link") == "a.txt" and not (place / "untracked.txt").exists()
    assert str(place) in git(desk.shop, "worktree", "list")
    desk.refuses(AlreadyApplied, result, WORKTREE)
    commit(place, {"more.txt": "m\n"})
    git(place, "reset", "--quiet", "--hard", "HEAD~1")
    assert desk.undo(result).outcome == "undone"
    assert not place.exists() and git(desk.shop, "worktree", "list").count("\n") == 0
    after = fingerprint(desk.folder, but=("state", "objects"))
    assert {name for name in after if "/logs/" not in name and ".git" not in name} == {
        name for name in everything if "/logs/" not in name and ".git" not in name
    }
    assert desk.mine() == before


def test_no_hook_filter_or_program_of_anybodys_runs(desk: Desk) -> None:
    owned = desk.folder / "owned"
    hooks = desk.shop / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    names = ("post-checkout", "reference-transaction", "post-index-change", "post-merge", "pre-commit", "post-commit")
    for name in names:
        (hooks / name).write_text(f"#!/bin/sh\necho {name} >>{owned}\n")
        (hooks / name).chmod(0o755)
    for key, value in {
        "filter.mine.smudge": f"sh -c 'echo smudge >>{owned}; cat'",
        "filter.mine.clean": f"sh -c 'echo clean >>{owned}; cat'",
        "filter.mine.required": "true",
        "filter.process.process": f"sh -c 'echo process >>{owned}'",
        "filter.process.required": "true",
        "core.fsmonitor": f"sh -c 'echo fsmonitor >>{owned}'",
        "diff.external": f"sh -c 'echo diff >>{owned}'",
    }.items():
        git(desk.shop, "config", key, value)
    hostile = {
        ".gitattributes": "* filter=mine\n*.bin filter=process\n",
        "x.bin": "x\n",
        ".githooks/post-checkout": f"#!/bin/sh\necho result >>{owned}\n",
    }
    result = desk.workshop().result(hostile, executable=(".githooks/post-checkout",))
    assert not owned.exists(), "making the result ran something"
    with pytest.raises(ConfirmationNeeded) as refused:
        desk.apply(result, WORKTREE)
    assert dict(refused.value.files)[".githooks/post-checkout"].startswith("runs on `git commit`")
    allow = (".gitattributes", ".githooks/post-checkout")
    for destination in (BRANCH, Destination(onto="worktree", branch="two"), Destination(onto="files")):
        desk.apply(result, destination, allow=allow)
        desk.undo(result)
        assert not owned.exists(), owned.read_text()
    git(desk.shop, "update-ref", "refs/heads/seen", "HEAD")
    assert owned.read_text().startswith("reference-transaction"), "the trap works"


@pytest.mark.parametrize(
    "later",
    [
        {"a.txt": "mine\n"},
        {"untracked.txt": "mine\n"},
        {"ignored.log": "mine\n"},
        {"a.txt": None},
        {"sub/c.txt": "-> ../a.txt"},
    ],
    ids=["changed", "added", "added and ignored", "deleted", "a symlink"],
)
def test_a_worktree_with_later_edits_is_not_taken_back(desk: Desk, later: dict[str, str | None]) -> None:
    commit(desk.shop, {".gitignore": "*.log\n"})
    result = desk.workshop().result({"new.txt": "n\n"})
    desk.apply(result, WORKTREE)
    place = desk.worktree(result)
    put(place, later)
    before = fingerprint(place)
    with pytest.raises(ApplyConflict) as refused:
        desk.undo(result)
    assert [path for path, _ in refused.value.files] == list(later)
    assert fingerprint(place) == before and not list(desk.folder.glob(".cloudagent*"))
    git(place, "clean", "-xdfq")
    git(place, "checkout", "--quiet", "--force", result.branch, "--", ".")
    desk.undo(result)
    assert not place.exists()


def test_edits_that_git_was_told_not_to_see_are_seen(desk: Desk) -> None:
    result = desk.workshop().result({"new.txt": "n\n"})
    desk.apply(result, WORKTREE)
    place = desk.worktree(result)
    git(place, "update-index", "--assume-unchanged", "a.txt")
    put(place, {"a.txt": "mine\n"})
    with pytest.raises(ApplyConflict, match=r"a\.txt"):
        desk.undo(result)
    put(place, {"a.txt": "staged\n"})
    git(place, "update-index", "--no-assume-unchanged", "a.txt")
    git(place, "add", "a.txt")
    put(place, {"a.txt": LINES})
    with pytest.raises(ApplyConflict, match=r"a\.txt"):
        desk.undo(result)


def test_a_worktree_that_is_locked_or_on_another_branch_or_something_else_stays(desk: Desk) -> None:
    result = desk.workshop().result({"new.txt": "n\n"})
    desk.apply(result, WORKTREE)
    place = desk.worktree(result)
    git(desk.shop, "worktree", "lock", str(place))
    with pytest.raises(ApplyConflict, match="locked"):
        desk.undo(result)
    git(desk.shop, "worktree", "unlock", str(place))
    git(place, "checkout", "--quiet", "-b", "mine")
    with pytest.raises(ApplyConflict, match="another branch"):
        desk.undo(result)
    git(place, "checkout", "--quiet", result.branch)
    place.rename(desk.folder / "moved")
    put(place, {"mine": "mine\n"})
    with pytest.raises(ApplyConflict, match="something else"):
        desk.undo(result)
    assert (place / "mine").exists() and (desk.folder / "moved" / "new.txt").exists()


def test_a_file_that_is_saved_in_the_moment_of_the_undo_is_not_lost(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = desk.workshop().result({"new.txt": "n\n"})
    desk.apply(result, WORKTREE)
    place = desk.worktree(result)
    rename = os.rename

    def save_and_rename(*arguments: object, **options: object) -> None:
        if arguments[0] == place:
            put(place, {"mine": "mine\n"})
        rename(*arguments, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(os, "rename", save_and_rename)
    with pytest.raises(ApplyConflict, match="mine"):
        desk.undo(result)
    assert (place / "mine").exists()
    assert git(place, "rev-parse", "HEAD") == git(desk.shop, "rev-parse", result.branch)


def test_a_worktree_that_its_user_removed_leaves_a_branch_to_take_back(desk: Desk) -> None:
    result = desk.workshop().result({"new.txt": "n\n"})
    refs = desk.refs()
    desk.apply(result, WORKTREE)
    git(desk.shop, "worktree", "remove", str(desk.worktree(result)))
    desk.undo(result)
    assert desk.refs() == refs


def test_a_place_that_is_taken_or_means_something_is_refused(desk: Desk) -> None:
    result = desk.workshop().result({"new.txt": "n\n"})
    place = desk.worktree(result)
    for make in (place.mkdir, lambda: place.symlink_to("nowhere"), lambda: place.write_text("mine")):
        make()
        assert desk.refuses(TargetExists, result, WORKTREE).field == "path"
        if place.is_dir() and not place.is_symlink():
            place.rmdir()
        else:
            place.unlink()
    for name in (".ssh", "x/y", ".config/x", "shop/.git/hooks", "shop/.claude", "shop", ".", ".."):
        destination = Destination(onto="worktree", path=desk.folder / name)
        assert desk.refuses(CloudAgentError, result, destination).field in ("path", "directory")
    outcome = desk.apply(result, Destination(onto="worktree", path=Path("../elsewhere"), branch="mine"))
    assert outcome.worktree == str(desk.folder / "elsewhere")
    assert git(desk.folder / "elsewhere", "branch", "--show-current") == "mine"


def test_a_worktree_uses_the_branch_that_an_apply_to_the_files_left(desk: Desk) -> None:
    result = desk.workshop().result({"new.txt": "n\n"})
    desk.apply(result, Destination())
    desk.refuses(AlreadyApplied, result, BRANCH)
    desk.apply(result, WORKTREE)
    assert desk.undo(result).worktree is not None, "the last one goes first"
    assert git(desk.shop, "rev-parse", result.branch)
    assert (desk.shop / "new.txt").exists()
    assert desk.undo(result).worktree is None
    assert not (desk.shop / "new.txt").exists()


def test_undo_takes_back_what_is_named(desk: Desk) -> None:
    result = desk.workshop().result({"new.txt": "n\n"})
    desk.apply(result, Destination(onto="branch", branch="one"))
    desk.apply(result, Destination(onto="worktree", branch="two"))
    desk.apply(result, Destination())
    assert desk.undo(result, Destination(onto="branch")).branch == "one"
    assert desk.undo(result, Destination(branch="two")).branch == "two"
    with pytest.raises(NothingToUndo):
        desk.undo(result, Destination(onto="worktree"))
    assert desk.undo(result).worktree is None and not (desk.shop / "new.txt").exists()


# -- the same policy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("destination", [BRANCH, WORKTREE, Destination(onto="branch", squash=True, title="T")])
def test_the_same_is_refused_everywhere(desk: Desk, destination: Destination) -> None:
    workshop = desk.workshop()
    for entry in ((b"120000", b"out", b"../../etc"), (b"160000", b"new/mod", b"x"), (b"100644", b"a%2fb", b"x")):
        mode, path, content = entry
        desk.refuses(UnsafeChange, hostile(workshop, (mode.decode(), path, content)), destination)
    desk.refuses(ConfirmationNeeded, workshop.result({".envrc": "x\n"}), destination)


def test_what_only_an_earlier_commit_has_counts_where_it_is_kept(desk: Desk) -> None:
    workshop = desk.workshop()
    result = commits_of(workshop, ("A", {".envrc": "x\n"}), ("A", {".envrc": None, "new.txt": "n\n"}))
    refusal = desk.refuses(ConfirmationNeeded, result, BRANCH)
    assert isinstance(refusal, ConfirmationNeeded)
    assert refusal.files == ((".envrc", "runs when a shell enters the folder; in an earlier commit of the branch"),)
    unsafe = commits_of(workshop, ("A", {"out": "-> /etc"}), ("A", {"out": None, "new.txt": "n\n"}))
    assert "squash" in desk.refuses(UnsafeChange, unsafe, WORKTREE).remedy
    for one in (result, unsafe):
        outcome = desk.apply(one, Destination())
        assert outcome.branch is None and "not kept as a branch" in outcome.message
        desk.undo(one)
        desk.apply(one, Destination(onto="branch", squash=True, title="T"))
        assert git(desk.shop, "rev-list", "--count", f"main..{one.branch}") == "1"
    desk.undo(result)
    assert desk.apply(result, BRANCH, allow=(".envrc",)).outcome == "applied"


def test_a_destination_that_contradicts_itself_is_refused(desk: Desk) -> None:
    result = desk.workshop().result({"new.txt": "n\n"})
    for destination in (
        Destination(squash=True),
        Destination(branch="x"),
        Destination(path=Path("/tmp/x")),
        Destination(onto="branch", path=Path("/tmp/x")),
    ):
        desk.refuses(InvalidInput, result, destination)


def test_a_task_without_a_repository_becomes_a_branch_but_not_without_one(desk: Desk, tmp_path: Path) -> None:
    result = Workshop(tmp_path / "none", None).result({"app.py": "print()\n"})
    desk.apply(result, WORKTREE)
    assert files_of(desk.worktree(result)).keys() == {".git", "app.py"}
    desk.undo(result)
    desk.shop = tmp_path / "plain"
    desk.shop.mkdir()
    with pytest.raises(TargetNotAllowed):
        desk.apply(result, BRANCH)


# -- crashes ----------------------------------------------------------------------------------------------------------


class Died(BaseException):
    """The process is no more."""


def crashing_at(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Die before the call number `at` that changes anything: of git, or of the file system below the hidden folder."""
    calls = 0

    def dying(function: object) -> object:
        def call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Died()
            return function(*arguments, **options)  # pyright: ignore[reportCallIssue, reportUnknownVariableType]

        return call

    for module, name in (
        (os, "rename"),
        (Path, "mkdir"),
        (Path, "rmdir"),
        (as_place, "bring"),
        (as_place, "_run"),
        (as_place, "_inside"),
        (as_place, "keep"),
        (as_place.shutil, "rmtree"),
        (as_place.LocalRepository, "run"),
    ):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))

    # The dead do not clean up after themselves.
    def unless_dead(function: Callable[..., None]) -> Callable[..., None]:
        return lambda *given: None if calls >= at else function(*given)

    monkeypatch.setattr(as_place, "finish", unless_dead(as_place.finish))
    monkeypatch.setattr(as_place.Target, "settled", unless_dead(as_place.Target.settled))


@pytest.mark.parametrize("undoing", [False, True], ids=["apply", "undo"])
@pytest.mark.parametrize("onto", ["branch", "worktree"])
def test_whatever_step_it_dies_in_the_next_start_finds_before_or_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onto: str, undoing: bool
) -> None:
    desk = Desk(tmp_path)
    put(desk.shop, {"untracked.txt": "mine\n"})
    result = desk.workshop().result({"a.txt": "new\n", "x/y.txt": "y\n"})
    destination = Destination.model_validate({"onto": onto})

    def seen() -> tuple[object, ...]:
        worktrees = git(desk.shop, "worktree", "list")
        leftovers = sorted(path.name for path in desk.folder.glob(".cloudagent*"))
        place = desk.worktree(result)
        return desk.refs(), worktrees, leftovers, files_of(place) if place.exists() else {}, desk.mine()

    before = seen()
    desk.apply(result, destination)
    after = seen()
    assert before != after
    if not undoing:
        desk.undo(result)
    died = torn = 0
    for at in range(1, 200):
        with monkeypatch.context() as patch:
            crashing_at(at, patch)
            try:
                if undoing:
                    desk.undo(result)
                else:
                    desk.apply(result, destination)
                finished = True
            except Died:
                finished = False
        if finished:
            break
        died += 1
        torn += seen() not in (before, after)
        take_back_interrupted(desk.folder / "state")
        now = seen()
        for part, one, other in zip(now, before, after, strict=True):
            assert part in (one, other), at
        assert now in (before, after), at
        assert not list((desk.folder / "state").glob("*/unfinished")), at
        if undoing and seen() == before:
            desk.apply(result, destination)
        if not undoing and seen() == after:
            desk.undo(result)
    assert died > (10 if onto == "branch" else 20)
    # A branch is there or not; there is nothing in between.
    assert torn > 3 or onto == "branch", "the crashes came at moments when nothing was left to do"
