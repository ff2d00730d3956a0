"""An honest result in a working tree: all of it or nothing, never over the user's own changes, and back again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from cloudagent_mcp.apply import ApplyOutcome, apply, undo
from cloudagent_queue.repository import bundle_working_tree
from cloudagent_storage.errors import (
    AlreadyApplied,
    ApplyConflict,
    Busy,
    ConfirmationNeeded,
    NoChanges,
    NothingToUndo,
    TargetNotAllowed,
    TaskNotFound,
)
from tests.support.git_repos import Result, Workshop, commit, files_of, fingerprint, git, make_repository, put

LINES = "".join(f"line {n}\n" for n in range(20))


class Desk:
    """A user's repository, results made of it elsewhere, and the place where applies keep their state."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.shop = make_repository(
            folder / "shop",
            {"a.txt": LINES, "b.bin": b"\0\1\2", "sub/c.txt": "c\n", "sub/d.txt": "d\n", "tool": "#!/bin/sh\n"},
        )
        self._folder = folder

    def workshop(self) -> Workshop:
        """Take what is in the repository now to somewhere else."""
        bundle = bundle_working_tree(self.shop, base_ref=None).bundle
        return Workshop(self._folder / f"workshop{len(list(self._folder.iterdir()))}", bundle)

    def apply(
        self,
        result: Result,
        *,
        to: Path | None = None,
        dry_run: bool = False,
        allow: tuple[str, ...] = (),
        goes_on_from: tuple[str, ...] = (),
        preview: str | None = None,
    ) -> ApplyOutcome:
        return apply(
            to or self.shop,
            **result.given,
            state_folder=self.state,
            dry_run=dry_run,
            allow_sensitive=allow,
            goes_on_from=goes_on_from,
            preview=preview,
        )

    def undo(self, result: Result, *, of: Path | None = None) -> ApplyOutcome:
        return undo(of or self.shop, task_id=result.task_id, state_folder=self.state)

    def refuses(self, error: type[Exception], result: Result, *, naming: str = "") -> str:
        """Nothing at all is written when this is refused."""
        before = fingerprint(self.shop)
        with pytest.raises(error) as refused:
            self.apply(result)
        assert naming in str(refused.value)
        assert str(self._folder) not in str(refused.value)
        assert fingerprint(self.shop) == before
        return str(refused.value)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def changed(outcome: ApplyOutcome) -> dict[str, str | None]:
    return {file.path: file.change for file in outcome.files}


def test_everything_that_a_result_can_hold_arrives_and_goes_again(desk: Desk) -> None:
    workshop = desk.workshop()
    result = workshop.result(
        {
            "a.txt": LINES.replace("line 5", "LINE FIVE"),
            "b.bin": b"\0\1\2\3",
            "sub/c.txt": None,
            "sub/d.txt": None,
            "moved/d.txt": "d\n",
            "new ü 漢字.txt": "new\r\nwindows\r\n",
            "deep/er/empty": "",
            "link": "-> deep/er/empty",
        },
        executable=("tool",),
    )
    before, index = files_of(desk.shop), (desk.shop / ".git/index").read_bytes()
    head = git(desk.shop, "rev-parse", "HEAD")
    outcome = desk.apply(result)
    assert outcome.outcome == "applied"
    assert changed(outcome) == {
        "a.txt": "modified",
        "b.bin": "modified",
        "sub/c.txt": "deleted",
        "moved/d.txt": "renamed",
        "new ü 漢字.txt": "added",
        "deep/er/empty": "added",
        "link": "added",
        "tool": "modified",
    }
    assert files_of(desk.shop) == files_of(workshop.folder)
    assert (desk.shop / ".git/index").read_bytes() == index
    assert git(desk.shop, "rev-parse", "HEAD") == head
    assert not (desk.shop / "sub").exists()
    assert desk.undo(result).outcome == "undone"
    assert files_of(desk.shop) == before
    with pytest.raises(NothingToUndo):
        desk.undo(result)


def test_the_result_is_a_branch_and_what_was_there_is_a_backup(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": "new\n"})
    put(desk.shop, {"sub/c.txt": "dirty\n", "untracked.txt": "mine\n"})
    outcome = desk.apply(result)
    assert outcome.branch == result.branch
    assert git(desk.shop, "show", f"{result.branch}:a.txt") == "new"
    assert outcome.backup_ref is not None and outcome.backup_ref.endswith("-1")
    assert git(desk.shop, "show", f"{outcome.backup_ref}:a.txt") == LINES.strip()
    assert git(desk.shop, "show", f"{outcome.backup_ref}:sub/c.txt") == "dirty"
    assert git(desk.shop, "show", f"{outcome.backup_ref}:untracked.txt") == "mine"
    assert git(desk.shop, "rev-parse", f"{outcome.backup_ref}^") == git(desk.shop, "rev-parse", "HEAD")
    desk.undo(result)
    again = desk.apply(result)
    assert again.backup_ref is not None and again.backup_ref.endswith("-2")


def test_a_branch_of_that_name_that_is_the_users_own_is_left_alone(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": "new\n"})
    git(desk.shop, "branch", result.branch)
    assert desk.apply(result).branch is None
    assert git(desk.shop, "rev-parse", result.branch) == git(desk.shop, "rev-parse", "HEAD")


def test_a_dry_run_tells_and_writes_nothing(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": "new\n", ".envrc": "x\n", "Makefile": "x\n"})
    before = fingerprint(desk.shop)
    outcome = desk.apply(result, dry_run=True)
    assert outcome.outcome == "would_apply"
    assert {file.path: file.sensitive for file in outcome.files} == {"a.txt": False, ".envrc": True, "Makefile": True}
    assert ".envrc" in outcome.message and "Makefile" not in outcome.message
    assert fingerprint(desk.shop) == before


def test_any_folder_of_the_working_tree_will_do(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": "new\n"})
    desk.apply(result, to=desk.shop / "sub")
    assert (desk.shop / "a.txt").read_text() == "new\n"
    desk.undo(result, of=desk.shop / "sub")
    assert (desk.shop / "a.txt").read_text() == LINES


def test_a_result_that_is_there_already_is_not_applied_again(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": "new\n", "x": "x"})
    desk.apply(result)
    desk.refuses(AlreadyApplied, result)
    commit(desk.shop, {})
    desk.refuses(AlreadyApplied, result)
    put(desk.shop, {"x": None})
    desk.apply(result)
    assert (desk.shop / "x").read_text() == "x"


def test_the_same_change_made_by_hand_is_the_result_already(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": "new\n", "x": "x"})
    put(desk.shop, {"a.txt": "new\n", "x": "x"})
    desk.refuses(AlreadyApplied, result)
    put(desk.shop, {"x": None})
    desk.apply(result)
    assert (desk.shop / "x").read_text() == "x"
    desk.undo(result)
    assert (desk.shop / "a.txt").read_text() == "new\n" and not (desk.shop / "x").exists()


def test_what_the_user_committed_meanwhile_is_merged(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": LINES.replace("line 2\n", "task\n"), "sub/c.txt": "task\n"})
    commit(desk.shop, {"a.txt": LINES.replace("line 17\n", "user\n")})
    (desk.shop / "a.txt").chmod(0o755)
    commit(desk.shop, {})
    before = files_of(desk.shop)
    desk.apply(result)
    assert (desk.shop / "a.txt").read_text() == LINES.replace("line 2\n", "task\n").replace("line 17\n", "user\n")
    assert (desk.shop / "a.txt").stat().st_mode & 0o777 == 0o755
    desk.refuses(AlreadyApplied, result)
    desk.undo(result)
    assert files_of(desk.shop) == before


@pytest.mark.parametrize(
    "meanwhile",
    [
        {"a.txt": LINES.replace("line 2\n", "user\n")},
        {"b.bin": b"\0\7"},
        {"sub/c.txt": None},
        {"sub/d.txt": "kept\n"},
        {"new.txt": "user\n"},
        {"sub/c.txt": "-> ../a.txt"},
    ],
    ids=["same lines", "binary", "deleted here", "deleted there", "added by both", "a symlink now"],
)
@pytest.mark.parametrize("committed", [True, False])
def test_what_cannot_be_merged_is_a_conflict(desk: Desk, meanwhile: dict[str, str | None], committed: bool) -> None:
    result = desk.workshop().result(
        {
            "0first.txt": "written first\n",
            "a.txt": LINES.replace("line 2\n", "task\n"),
            "b.bin": b"\0\1\2\3",
            "sub/c.txt": "task\n",
            "sub/d.txt": None,
            "new.txt": "task\n",
        }
    )
    (commit if committed else put)(desk.shop, meanwhile)
    desk.refuses(ApplyConflict, result, naming=next(iter(meanwhile)))


def test_a_dirty_file_is_a_conflict_even_where_a_merge_would_work(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": LINES.replace("line 2\n", "task\n")})
    put(desk.shop, {"a.txt": LINES.replace("line 17\n", "user\n")})
    desk.refuses(ApplyConflict, result, naming="a.txt")


def test_a_file_that_was_dirty_at_submit_and_is_still_the_same_is_no_conflict(desk: Desk) -> None:
    put(desk.shop, {"a.txt": LINES + "dirty\n", "untracked.txt": "mine\n"})
    result = desk.workshop().result({"a.txt": LINES + "dirty\ntask\n", "untracked.txt": "mine and the task's\n"})
    before = files_of(desk.shop)
    desk.apply(result)
    assert (desk.shop / "a.txt").read_text() == LINES + "dirty\ntask\n"
    desk.undo(result)
    assert files_of(desk.shop) == before


def test_the_users_other_changes_are_kept(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": "new\n"})
    put(desk.shop, {"sub/c.txt": "dirty\n", "untracked.txt": "mine\n"})
    git(desk.shop, "add", "sub/c.txt")
    status = git(desk.shop, "status", "--short", "sub/c.txt", "untracked.txt")
    desk.apply(result)
    assert git(desk.shop, "status", "--short", "sub/c.txt", "untracked.txt") == status
    assert (desk.shop / "untracked.txt").read_text() == "mine\n"


def test_undo_refuses_when_a_file_was_changed_since(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": "new\n", "x/y": "y"})
    desk.apply(result)
    for later in ({"a.txt": "newer\n"}, {"a.txt": None}, {"a.txt": "new\n", "x/y": None}):
        put(desk.shop, later)
        before = fingerprint(desk.shop)
        with pytest.raises(ApplyConflict, match=r"a\.txt|x/y"):
            desk.undo(result)
        assert fingerprint(desk.shop) == before
    put(desk.shop, {"x/y": "y", "x/mine": "mine"})
    desk.undo(result)
    assert files_of(desk.shop)["x/mine"][1] == b"mine"
    assert "x/y" not in files_of(desk.shop)


def test_permissions_are_kept_and_restored(desk: Desk) -> None:
    (desk.shop / "a.txt").chmod(0o640)
    (desk.shop / "sub").chmod(0o2770)
    result = desk.workshop().result({"a.txt": "new\n", "sub/c.txt": None, "sub/d.txt": None})
    before = files_of(desk.shop)
    desk.apply(result)
    assert (desk.shop / "a.txt").stat().st_mode & 0o777 == 0o640
    desk.undo(result)
    assert files_of(desk.shop) == before


@pytest.mark.parametrize(
    "files",
    [
        {"sub/c.txt": None, "sub/d.txt": None, "sub": "a file now\n"},
        {"tool": None, "tool/part": "a folder now\n"},
        {"sub/c.txt": None, "sub/d.txt": None, "sub": "-> moved", "moved/c.txt": "c\n"},
        {"tool": "-> a.txt"},
    ],
    ids=["folder to file", "file to folder", "folder to symlink", "file to symlink"],
)
def test_a_name_can_change_its_kind_and_back(desk: Desk, files: dict[str, str | None]) -> None:
    workshop = desk.workshop()
    result = workshop.result(files)
    before = files_of(desk.shop)
    desk.apply(result)
    assert files_of(desk.shop) == files_of(workshop.folder)
    desk.undo(result)
    assert files_of(desk.shop) == before


def test_a_folder_with_something_of_the_users_in_it_does_not_become_a_file(desk: Desk) -> None:
    workshop = desk.workshop()
    result = workshop.result({"sub/c.txt": None, "sub/d.txt": None, "sub": "a file now\n"})
    put(desk.shop, {"sub/mine": "mine"})
    desk.refuses(ApplyConflict, result, naming="sub")


def test_a_folder_with_something_of_the_users_in_it_is_not_taken_back(desk: Desk) -> None:
    result = desk.workshop().result({"tool": None, "tool/part": "a folder now\n"})
    desk.apply(result)
    put(desk.shop, {"tool/mine": "mine"})
    before = fingerprint(desk.shop)
    with pytest.raises(ApplyConflict, match="tool"):
        desk.undo(result)
    assert fingerprint(desk.shop) == before


def test_line_ends_are_those_of_the_working_tree(desk: Desk) -> None:
    commit(desk.shop, {".gitattributes": "*.bat text eol=crlf\n", "run.bat": "one\r\ntwo\r\n"})
    result = desk.workshop().result({"run.bat": "one\r\n2\r\n", "new.bat": "new\r\n"})
    desk.apply(result)
    assert (desk.shop / "run.bat").read_bytes() == b"one\r\n2\r\n"
    assert (desk.shop / "new.bat").read_bytes() == b"new\r\n"
    desk.undo(result)
    assert (desk.shop / "run.bat").read_bytes() == b"one\r\ntwo\r\n"


def test_sensitive_files_are_written_only_when_each_is_named(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": "new\n", ".envrc": "x\n", "sub/.vscode/tasks.json": "{}\n"})
    said = desk.refuses(ConfirmationNeeded, result, naming=".envrc")
    assert "sub/.vscode/tasks.json" in said
    with pytest.raises(ConfirmationNeeded, match=r"tasks\.json"):
        desk.apply(result, allow=(".envrc",))
    outcome = desk.apply(result, allow=(".envrc", "sub/.vscode/tasks.json"))
    assert {file.path for file in outcome.files if file.sensitive} == {".envrc", "sub/.vscode/tasks.json"}


def test_ordinary_work_is_only_marked(desk: Desk) -> None:
    workshop = desk.workshop()
    names = ("conftest.py", "sub/setup.py", "Makefile", "package.json")
    outcome = desk.apply(workshop.result({**dict.fromkeys(names, "x\n"), "plain.py": "x\n"}, executable=("tool",)))
    assert {file.path for file in outcome.files if file.sensitive} == {*names, "tool"}


def test_a_result_without_a_change_is_told_as_such(desk: Desk) -> None:
    desk.refuses(NoChanges, desk.workshop().result({}))


# -- where to -----------------------------------------------------------------------------------------------------


def test_only_the_repository_that_the_task_started_from_will_do(desk: Desk, tmp_path: Path) -> None:
    result = desk.workshop().result({"a.txt": "new\n"})
    other = make_repository(tmp_path / "other", {"a.txt": LINES, "again": "x"})
    git(tmp_path, "clone", "--quiet", "--bare", "shop", "bare.git")
    (tmp_path / "plain").mkdir()
    targets = [other, tmp_path / "bare.git", tmp_path / "plain", tmp_path / "missing", desk.shop / "a.txt"]
    targets += [desk.shop / ".git", desk.shop / ".git" / "refs", Path("/"), Path.home()]
    for target in targets:
        before = fingerprint(tmp_path, but=("state",))
        with pytest.raises(TargetNotAllowed):
            desk.apply(result, to=target)
        assert fingerprint(tmp_path, but=("state",)) == before
    git(tmp_path, "clone", "--quiet", "shop", "clone")
    desk.apply(result, to=tmp_path / "clone")
    assert (tmp_path / "clone" / "a.txt").read_text() == "new\n"
    assert (desk.shop / "a.txt").read_text() == LINES


def test_a_result_of_uncommitted_work_goes_to_the_repository_of_its_parent(desk: Desk, tmp_path: Path) -> None:
    put(desk.shop, {"extra.txt": "x\n"})
    result = desk.workshop().result({"a.txt": "new\n"})
    git(desk.shop, "worktree", "add", "--quiet", "../linked")
    desk.apply(result, to=tmp_path / "linked")
    assert (tmp_path / "linked" / "a.txt").read_text() == "new\n"


def test_a_result_of_no_repository_goes_anywhere_where_nothing_is_in_its_way(desk: Desk, tmp_path: Path) -> None:
    result = Workshop(tmp_path / "none", None).result({"app/main.py": "print()\n"})
    plain, empty, new = tmp_path / "plain", tmp_path / "empty", tmp_path / "new"
    plain.mkdir()
    (plain / "mine").write_text("mine")
    empty.mkdir()
    assert desk.apply(result, to=new, dry_run=True).outcome == "would_apply"
    assert not new.exists()
    for target in (desk.shop, plain, empty, new):
        outcome = desk.apply(result, to=target)
        assert (target / "app/main.py").read_text() == "print()\n"
        assert (outcome.branch is None) == (target == plain)
    assert not (plain / ".git").exists()
    assert git(new, "branch", "--list", result.branch)
    desk.undo(result, of=plain)
    assert files_of(plain) == {"mine": ((plain / "mine").lstat().st_mode, b"mine")}
    put(plain, {"app": "in the way"})
    with pytest.raises(ApplyConflict, match="app"):
        desk.apply(result, to=plain)


def test_a_directory_that_may_not_be_written_to_stays_as_it_is() -> None:
    nobody = 65534
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: only its owner may enter that
        desk = Desk(Path(name))
        result = desk.workshop().result({"sub/new.txt": "new\n", "a.txt": "new\n"})
        if os.geteuid() == 0:  # root may write everywhere, so be somebody else, in a repository of their own
            for path in [Path(name), desk.shop, *desk.shop.rglob("*")]:
                os.chown(path, nobody, nobody, follow_symlinks=False)
        (desk.shop / "sub").chmod(0o555)
        with as_somebody_else(nobody):
            desk.refuses(TargetNotAllowed, result, naming="written")
        (desk.shop / "sub").chmod(0o755)


@contextmanager
def as_somebody_else(user_id: int) -> Generator[None]:
    own = os.geteuid()
    if own == 0:
        os.seteuid(user_id)
    try:
        yield
    finally:
        os.seteuid(own)


def test_two_applies_to_one_directory_do_not_meet(desk: Desk) -> None:
    result = desk.workshop().result({"a.txt": "new\n"})
    desk.apply(result, dry_run=True)
    (lock,) = desk.state.glob("*/lock")
    with FileLock(lock):
        before = fingerprint(desk.shop)
        actions: list[Callable[[Result], object]] = [desk.apply, desk.undo]
        for action in actions:
            with pytest.raises(Busy):
                action(result)
        assert fingerprint(desk.shop) == before
    desk.apply(result)


def test_a_task_id_is_no_path(desk: Desk) -> None:
    for name in ("../../x", "task_../x", "", "task_" + "a" * 25):
        with pytest.raises(TaskNotFound):
            undo(desk.shop, task_id=name, state_folder=desk.state)


# -- on top of each other ---------------------------------------------------------------------------------------------


def test_results_that_change_the_same_file_in_different_places_are_merged_and_taken_back_in_turn(desk: Desk) -> None:
    one, other = desk.workshop(), desk.workshop()
    first = one.result({"a.txt": LINES.replace("line 1\n", "FIRST\n"), "new.txt": "new\n"})
    second = other.result({"a.txt": LINES.replace("line 9", "SECOND")})
    start = files_of(desk.shop)
    desk.apply(first)
    between = files_of(desk.shop)
    assert desk.apply(second).outcome == "applied"
    assert (desk.shop / "a.txt").read_text() == LINES.replace("line 1\n", "FIRST\n").replace("line 9", "SECOND")
    desk.refuses(AlreadyApplied, first)  # though it is covered by the second
    desk.refuses(AlreadyApplied, second)
    with pytest.raises(ApplyConflict, match=r"a\.txt"):
        desk.undo(first)
    desk.undo(second)
    assert files_of(desk.shop) == between
    desk.undo(first)
    assert files_of(desk.shop) == start


def test_results_that_change_the_same_lines_are_a_conflict(desk: Desk) -> None:
    first, second = (desk.workshop().result({"a.txt": LINES.replace("line 5", word)}) for word in ("ONE", "TWO"))
    desk.apply(first)
    desk.refuses(ApplyConflict, second, naming="a.txt")


def test_a_result_that_the_user_has_edited_since_is_not_merged_with(desk: Desk) -> None:
    first = desk.workshop().result({"a.txt": LINES.replace("line 1\n", "FIRST\n")})
    second = desk.workshop().result({"a.txt": LINES.replace("line 9", "SECOND")})
    desk.apply(first)
    (desk.shop / "a.txt").write_text((desk.shop / "a.txt").read_text().replace("line 5", "mine, and kept nowhere"))
    desk.refuses(ApplyConflict, second, naming="a.txt")
    desk.refuses(ApplyConflict, first, naming="a.txt")
    (desk.shop / "a.txt").write_text((desk.shop / "a.txt").read_text().replace("mine, and kept nowhere", "line 5"))
    desk.apply(second)
    (desk.shop / "a.txt").write_text("mine\n")
    desk.refuses(ApplyConflict, first, naming="a.txt")


def test_a_result_that_was_taken_away_by_hand_is_not_taken_for_applied(desk: Desk) -> None:
    first = desk.workshop().result({"a.txt": LINES.replace("line 1\n", "FIRST\n"), "sub/c.txt": None})
    second = desk.workshop().result({"a.txt": LINES.replace("line 9", "SECOND")})
    desk.apply(first)
    desk.apply(second)
    git(desk.shop, "checkout", "-q", "--", ".")
    assert desk.apply(first).outcome == "applied"


def test_a_result_that_goes_on_from_applied_ones_takes_their_place_and_undo_brings_them_back(desk: Desk) -> None:
    start = files_of(desk.shop)
    first = desk.workshop().result({"a.txt": LINES.replace("line 5", "ONE"), "new.txt": "one\n", "gone.txt": "x\n"})
    second = desk.workshop().result({"a.txt": LINES.replace("line 5", "TWO"), "new.txt": "two\n", "sub/c.txt": None})
    third = desk.workshop().result({"a.txt": LINES.replace("line 5", "THREE"), "new.txt": "three\n"})
    desk.apply(first)
    between = files_of(desk.shop)
    desk.refuses(ApplyConflict, second, naming="a.txt")  # as it does not say that it has the first within it
    desk.apply(second, goes_on_from=(first.task_id,))
    assert (desk.shop / "new.txt").read_text() == "two\n" and not (desk.shop / "gone.txt").exists()
    on_top = files_of(desk.shop)
    seen = desk.apply(third, goes_on_from=(second.task_id, first.task_id), dry_run=True)
    desk.apply(third, goes_on_from=(second.task_id, first.task_id), preview=seen.preview)
    assert files_of(desk.shop) == {**start, **{name: files_of(desk.shop)[name] for name in ("a.txt", "new.txt")}}
    assert "THREE" in (desk.shop / "a.txt").read_text() and (desk.shop / "sub" / "c.txt").exists()
    for result, expected in ((third, on_top), (second, between), (first, start)):
        desk.undo(result)
        assert files_of(desk.shop) == expected


def test_what_the_user_has_changed_of_an_applied_result_is_not_taken_for_its_own(desk: Desk) -> None:
    first = desk.workshop().result({"a.txt": LINES.replace("line 5", "ONE"), "new.txt": "one\n"})
    second = desk.workshop().result({"a.txt": LINES.replace("line 5", "TWO")})
    desk.apply(first)
    (desk.shop / "new.txt").write_text("mine\n")
    desk.apply(second, goes_on_from=(first.task_id,))
    assert (desk.shop / "new.txt").read_text() == "mine\n" and "TWO" in (desk.shop / "a.txt").read_text()
    desk.undo(second)
    (desk.shop / "a.txt").write_text("mine\n")
    desk.refuses(ApplyConflict, second, naming="a.txt")
