"""A bundle goes into a sandbox, the agent works, a bundle comes out and is looked at in quarantine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cloudagent_queue.agents import open_agent
from cloudagent_queue.repository import (
    WorkingTree,
    bundle_working_tree,
    check_out,
    checkpoint,
    collect,
    inspect,
    restore,
    run_setup,
    verify,
)
from cloudagent_queue.repository.bundles import Changes
from cloudagent_queue.sandboxes import Provider, Sandbox
from cloudagent_queue.sandboxes.local import LocalProvider, UnsafeProcessProvider
from cloudagent_storage.errors import SandboxError, UnsafeChange
from tests.support.forge import hostile
from tests.support.git_repos import Result, Workshop, commit, git, make_repository
from tests.support.worlds import until

BRANCH = "task/abcd2345"


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Provider:
    return LocalProvider(tmp_path_factory.mktemp("sandboxes"))


@pytest.fixture
def sandbox(provider: Provider) -> Iterator[Sandbox]:
    sandbox = provider.create(metadata={})
    yield sandbox
    sandbox.kill()


@pytest.fixture
def given(tmp_path: Path) -> WorkingTree:
    shop = make_repository(tmp_path / "shop", {"a.txt": "one\ntwo\nthree\n", "b.txt": "b\n", "sub/c.txt": "c\n"})
    commit(shop, {"a.txt": "one\ntwo\nthree\nfour\n", ".gitignore": "ignored\n"})
    return bundle_working_tree(shop, base_ref=None)


def work(sandbox: Sandbox, script: str) -> str:
    """What an agent does, as a shell script in its repository."""
    done = sandbox.run(["/bin/sh", "-ec", script], cwd="repository", timeout_s=30)
    assert done.exit_code == 0, done.output
    return done.output.strip()


def outcome(sandbox: Sandbox, given: WorkingTree, script: str) -> Changes:
    """What comes out when the agent does that."""
    base = check_out(sandbox, bundle=given.bundle, base_sha=given.base_sha, branch=BRANCH)
    work(sandbox, script)
    bundle = collect(sandbox, base_sha=base, branch=BRANCH, message="Do it\n\nTask task_x")
    assert bundle is not None
    return inspect(given.bundle, base, bundle, BRANCH)


def files(changes: Changes) -> dict[str, str]:
    return {file.path: file.status for file in changes.files}


@pytest.mark.parametrize("make", [LocalProvider, UnsafeProcessProvider])
def test_the_agent_finds_the_base_on_its_branch_with_the_whole_history(
    make: type[LocalProvider], given: WorkingTree, tmp_path: Path
) -> None:
    sandbox = make(tmp_path / "sandboxes").create(metadata={})
    assert check_out(sandbox, bundle=given.bundle, base_sha=given.base_sha, branch=BRANCH) == given.base_sha
    said = work(sandbox, "git rev-parse HEAD; git branch --show-current; git rev-list --count HEAD; git status -s")
    assert said.splitlines() == [given.base_sha, BRANCH, "2"]
    assert work(sandbox, "git config user.name; git config user.email") == "cloudagent\ncloudagent@localhost"
    sandbox.kill()


def test_a_second_check_out_starts_afresh(sandbox: Sandbox, given: WorkingTree) -> None:
    check_out(sandbox, bundle=given.bundle, base_sha=None, branch=BRANCH)
    work(sandbox, "mkdir deep; touch deep/x; chmod 500 deep; rm a.txt")
    check_out(sandbox, bundle=given.bundle, base_sha=None, branch=BRANCH)
    assert work(sandbox, "ls") == "a.txt\nb.txt\nsub"


def test_a_check_out_over_a_finished_set_up_keeps_what_that_has_made(
    sandbox: Sandbox, given: WorkingTree, tmp_path: Path
) -> None:
    check_out(sandbox, bundle=given.bundle, base_sha=None, branch=BRANCH)
    work(sandbox, "mkdir ignored; echo library > ignored/x; echo made > made.txt; echo changed > a.txt")
    newer = bundle_working_tree(
        make_repository(tmp_path / "newer", {"d.txt": "d\n", ".gitignore": "ignored\n"}), base_ref=None
    )
    base = check_out(sandbox, bundle=newer.bundle, base_sha=newer.base_sha, branch="task/other", keep_files=True)
    said = work(sandbox, "git rev-parse HEAD; git branch --show-current; git status --porcelain; ls; cat ignored/x")
    assert said.splitlines() == [base, "task/other", "?? made.txt", "d.txt", "ignored", "made.txt", "library"]


def test_everything_that_was_left_uncommitted_comes_out(sandbox: Sandbox, given: WorkingTree) -> None:
    changes = outcome(
        sandbox,
        given,
        "printf 'one\\n2\\nthree\\nfour\\n' > a.txt; rm b.txt; git mv sub/c.txt sub/d.txt; echo new > 'new ü.txt';"
        "printf '\\0\\1\\2' > bin; echo x > ignored; ln -s a.txt link; echo run > run.sh; chmod +x run.sh; : > empty",
    )
    assert files(changes) == {
        "a.txt": "modified",
        "b.txt": "deleted",
        "sub/d.txt": "renamed",
        "new ü.txt": "added",
        "bin": "added",
        "link": "added",
        "run.sh": "added",
        "empty": "added",
    }
    by_path = {file.path: file for file in changes.files}
    assert by_path["sub/d.txt"].old_path == "sub/c.txt"
    assert (by_path["a.txt"].insertions, by_path["a.txt"].deletions) == (1, 1)
    assert by_path["bin"].binary
    assert by_path["run.sh"].new_mode == "100755"
    assert by_path["link"].new_mode == "120000"
    assert changes.commits == 1
    assert changes.insertions == sum(file.insertions for file in changes.files) == 4
    assert b"GIT binary patch" in changes.diff
    assert not changes.truncated


def test_the_agents_own_commits_come_out_with_what_it_left_beside_them(sandbox: Sandbox, given: WorkingTree) -> None:
    changes = outcome(
        sandbox, given, "echo 1 > x; git add x; git commit -qm one; echo 2 > y; git add y; git commit -qm two; echo > z"
    )
    assert files(changes) == {"x": "added", "y": "added", "z": "added"}
    assert changes.commits == 3


def test_the_result_is_what_is_checked_out_at_the_end(sandbox: Sandbox, given: WorkingTree) -> None:
    changes = outcome(
        sandbox,
        given,
        "git checkout -qb other; echo 1 > x; git add x; git commit -qm x; git checkout -q --detach; echo 2 > y",
    )
    assert files(changes) == {"x": "added", "y": "added"}


def test_an_agent_that_went_back_in_history_has_still_changed_files(sandbox: Sandbox, given: WorkingTree) -> None:
    changes = outcome(sandbox, given, "git reset -q --hard HEAD^")
    assert files(changes) == {".gitignore": "deleted", "a.txt": "modified"}
    changes = outcome(sandbox, given, "git reset -q --hard HEAD^; echo > x; git add x; git commit -qm x")
    assert files(changes) == {".gitignore": "deleted", "a.txt": "modified", "x": "added"}


def test_an_orphan_branch_is_a_result_as_well(sandbox: Sandbox, given: WorkingTree) -> None:
    changes = outcome(
        sandbox, given, "git checkout -q --orphan new; git rm -qrf .; echo > x; git add x; git commit -qm x"
    )
    assert files(changes)["x"] == "added"
    assert files(changes)["a.txt"] == "deleted"


def test_nothing_comes_out_when_nothing_changed(sandbox: Sandbox, given: WorkingTree) -> None:
    base = check_out(sandbox, bundle=given.bundle, base_sha=None, branch=BRANCH)
    work(sandbox, "echo x > ignored; touch a.txt; git checkout -qb other")
    assert collect(sandbox, base_sha=base, branch=BRANCH, message="x") is None


@pytest.mark.parametrize(
    "harm",
    [
        "rm -rf .git",
        "rm -rf .git; git init -q; git add -A; git commit -qm fresh",
        "echo rubbish > .git/HEAD",
        "rm -rf .git/objects; mkdir .git/objects",
        "echo rubbish > .git/index",
        "touch .git/index.lock .git/HEAD.lock .git/refs/heads/task/abcd2345.lock",
        "git config core.hooksPath $PWD; printf '#!/bin/sh\\nexit 1\\n' > pre-commit; chmod +x pre-commit",
        "git config commit.gpgSign true; git config user.signingKey none; git config core.worktree /tmp",
        "git checkout -q -b b2; echo b2 > a.txt; git commit -qam b2; git checkout -q -; echo b1 > a.txt;"
        "git commit -qam b1; git merge b2 || true; echo solved > a.txt",
        "rm -rf .git; ln -s /nonexistent .git",
        "git config user.name ''; git config i18n.commitEncoding rubbish",
    ],
)
def test_files_come_out_whatever_state_git_was_left_in(sandbox: Sandbox, given: WorkingTree, harm: str) -> None:
    identity = "git config user.name A; git config user.email a@b; export GIT_AUTHOR_NAME=A GIT_AUTHOR_EMAIL=a@b "
    identity += "GIT_COMMITTER_NAME=A GIT_COMMITTER_EMAIL=a@b;"
    changes = outcome(sandbox, given, f"{identity} mkdir -p n; echo new > n/new.txt; rm b.txt; {harm}")
    assert files(changes)["n/new.txt"] == "added"
    assert files(changes)["b.txt"] == "deleted"


def test_a_broken_index_does_not_cost_the_agents_commits(sandbox: Sandbox, given: WorkingTree) -> None:
    changes = outcome(sandbox, given, "echo 1 > x; git add x; git commit -qm one; echo > y; echo rubbish > .git/index")
    assert changes.commits == 2


@pytest.mark.parametrize("also", ["true", "git add app; git commit -qm 'with a nested one'"], ids=["left", "committed"])
def test_files_of_nested_repositories_are_not_lost(sandbox: Sandbox, given: WorkingTree, also: str) -> None:
    changes = outcome(
        sandbox,
        given,
        "mkdir -p app/deep; cd app; git init -q; echo 1 > deep/x; git add .; git -c user.name=a -c user.email=a commit"
        f" -qm app; cd ..; mkdir unborn; cd unborn; git init -q; echo 2 > y; cd ..; {also}",
    )
    assert files(changes) == {"app/deep/x": "added", "unborn/y": "added"}


def test_a_file_too_large_to_bring_out_is_left_out_and_said_so(sandbox: Sandbox, given: WorkingTree) -> None:
    base = check_out(sandbox, bundle=given.bundle, base_sha=None, branch=BRANCH)
    work(sandbox, "truncate -s 60M huge; echo small > small")
    bundle = collect(sandbox, base_sha=base, branch=BRANCH, message="x")
    assert bundle is not None
    assert files(inspect(given.bundle, base, bundle, BRANCH)) == {"small": "added"}
    assert "huge" in sandbox.run(["git", "--git-dir=run/out.git", "log", "-1", BRANCH], timeout_s=10).output


def test_no_repository_is_an_empty_one(sandbox: Sandbox) -> None:
    base = check_out(sandbox, bundle=None, base_sha=None, branch=BRANCH)
    assert work(sandbox, "git rev-list --count HEAD; ls") == "1"
    work(sandbox, "echo 1 > x")
    bundle = collect(sandbox, base_sha=base, branch=BRANCH, message="x")
    assert bundle is not None
    assert files(inspect(None, base, bundle, BRANCH)) == {"x": "added"}
    assert check_out(sandbox, bundle=None, base_sha=None, branch=BRANCH) == base


def test_what_is_no_bundle_is_not_put_into_a_sandbox(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxError):
        check_out(sandbox, bundle=b"rubbish", base_sha=None, branch=BRANCH)


def test_verify_sees_the_saved_result_and_nothing_else_of_the_agents(sandbox: Sandbox, given: WorkingTree) -> None:
    base = check_out(sandbox, bundle=given.bundle, base_sha=None, branch=BRANCH)
    work(sandbox, "echo right > x; mkdir -p ~/.config; git config --global alias.evil '!id'; echo y > ignored")
    bundle = collect(sandbox, base_sha=base, branch=BRANCH, message="x")
    work(sandbox, "cd ..; rm -rf run; mkdir run; echo wrong > repository/x; mkdir -p verify/x; ln -s /etc verify-home")
    done = verify(
        sandbox,
        input_bundle=given.bundle,
        result_bundle=bundle,
        base_sha=base,
        branch=BRANCH,
        command="cat x; ls -A; echo home: $(ls -A ~); git config --get alias.evil; exit 7",
        timeout_s=20,
    )
    assert done.exit_code == 7
    assert done.output.split() == ["right", ".git", ".gitignore", "a.txt", "b.txt", "sub", "x", "home:"]


def test_verify_without_a_result_checks_the_base(sandbox: Sandbox, given: WorkingTree) -> None:
    check_out(sandbox, bundle=given.bundle, base_sha=None, branch=BRANCH)
    done = verify(
        sandbox, input_bundle=given.bundle, result_bundle=None, branch=BRANCH, command="cat b.txt", timeout_s=20
    )
    assert (done.exit_code, done.output) == (0, "b\n")


def test_verify_ends_when_its_time_is_up_and_keeps_the_end_of_the_output(sandbox: Sandbox, given: WorkingTree) -> None:
    check_out(sandbox, bundle=given.bundle, base_sha=None, branch=BRANCH)
    for command, code in (("yes no | head -c 100000; echo end; sleep 60", None), ("seq 100000; echo end", 0)):
        done = verify(
            sandbox, input_bundle=given.bundle, result_bundle=None, branch=BRANCH, command=command, timeout_s=2
        )
        assert done.exit_code == code
        assert done.output.endswith("end\n") and len(done.output) < 70_000


def test_the_set_up_command_runs_in_the_repository(sandbox: Sandbox, given: WorkingTree) -> None:
    check_out(sandbox, bundle=given.bundle, base_sha=None, branch=BRANCH)
    assert run_setup(sandbox, "cat b.txt; exit 4", 10).exit_code == 4


def test_what_the_repository_sets_is_seen_by_set_up_and_verify(sandbox: Sandbox, given: WorkingTree) -> None:
    check_out(sandbox, bundle=given.bundle, base_sha=None, branch=BRANCH)
    env = {"FLAVOUR": "dark 'chocolate'\n$(exit 3)"}
    command = 'printf %s "$FLAVOUR"'
    assert run_setup(sandbox, command, 10, env).output == env["FLAVOUR"]
    done = verify(
        sandbox, input_bundle=given.bundle, result_bundle=None, branch=BRANCH, command=command, timeout_s=20, env=env
    )
    assert done.output == env["FLAVOUR"]
    assert run_setup(sandbox, command, 10).output == ""


def test_a_variable_for_the_repositorys_own_python_does_not_reach_into_the_runner(sandbox: Sandbox) -> None:
    sandbox.write("repository/src/json.py", b"raise SystemExit('shadowed')")
    sandbox.write("run/runner.py", b"import json, os; print(json.dumps(os.environ['PYTHONPATH']))")
    folder = f"{sandbox.root}/repository/src"
    open_agent("claude").start(sandbox, env={"PYTHONPATH": folder})
    until(lambda: not sandbox.alive(), "it ends")
    assert sandbox.output().decode().strip() == f'"{folder}"'


# -- quarantine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def workshop(given: WorkingTree, tmp_path: Path) -> Workshop:
    return Workshop(tmp_path / "workshop", given.bundle)


def look(result: Result) -> Changes:
    return inspect(result.input_bundle, result.base_sha, result.result_bundle, result.branch)


def test_a_bundle_that_is_not_the_expected_one_is_refused(workshop: Workshop) -> None:
    good = workshop.result({"x": "x"})
    assert files(look(good)) == {"x": "added"}
    elsewhere = make_repository(workshop.folder / "elsewhere", {"q": "q"})
    git(elsewhere, "update-ref", f"refs/heads/{good.branch}", "HEAD")
    commit(elsewhere, {"r": "r"})
    git(elsewhere, "bundle", "create", "-q", "foreign", "HEAD", "^HEAD^")
    git(elsewhere, "bundle", "create", "-q", "two", "HEAD", good.branch)
    header, _, pack = good.result_bundle.partition(b"\n\n")
    for bundle in (
        b"",
        b"rubbish",
        good.result_bundle[:-30],
        good.result_bundle[:-1] + b"x",
        header + b"\n\n",
        header.replace(b"refs/heads/task", b"refs/heads/evil") + b"\n\n" + pack,
        header.replace(b"# v2 git bundle", b"# v3 git bundle\n@filter=blob:none") + b"\n\n" + pack,
        header.replace(b"bundle\n", b"bundle\n-" + b"1" * 40 + b" x\n") + b"\n\n" + pack,
        header + b"\n" + b"0" * 40 + b" refs/heads/other\n\n" + pack,
        header + b"\n" + b" " * 100_000 + b"\n\n" + pack,
        (elsewhere / "foreign").read_bytes(),
        (elsewhere / "two").read_bytes(),
    ):
        with pytest.raises(UnsafeChange):
            look(replace(good, result_bundle=bundle))
    with pytest.raises(UnsafeChange):
        look(replace(good, base_sha=hashlib.sha1(b"x").hexdigest()))
    with pytest.raises(UnsafeChange):
        look(replace(good, branch="task/other"))


def test_a_result_whose_head_is_no_commit_is_refused(workshop: Workshop) -> None:
    tree = git(workshop.folder, "rev-parse", "HEAD^{tree}")
    blob = git(workshop.folder, "rev-parse", "HEAD:a.txt")
    good = workshop.result({"x": "x"})
    head, _, pack = good.result_bundle.partition(b"\n\n")
    first = head.split(b"\n")[-1].split(b" ")[0]
    for name in (tree, blob):
        with pytest.raises(UnsafeChange):
            look(replace(good, result_bundle=head.replace(first, name.encode()) + b"\n\n" + pack))


@pytest.mark.parametrize("name", [b"..", b".git", b"..%2fevil", b".GIT", b"git~1"])
def test_malformed_objects_of_a_result_are_refused(workshop: Workshop, name: bytes) -> None:
    with pytest.raises(UnsafeChange):
        look(hostile(workshop, ("100644", name, b"x")))


def test_old_flaws_in_the_input_are_forgiven(tmp_path: Path) -> None:
    shop = make_repository(tmp_path / "old", {"a": "a"})
    tree = git(shop, "rev-parse", "HEAD^{tree}")
    flawed = f"tree {tree}\nauthor A<a@b> 1 +051800\ncommitter A <a@b> 1 +051800\n\nold\n".encode()
    sha = git(shop, "hash-object", "-t", "commit", "-w", "--literally", "--stdin", stdin=flawed)
    git(shop, "reset", "--quiet", "--hard", sha)
    commit(shop, {"b": "b"})
    given = bundle_working_tree(shop, base_ref=None)
    assert files(look(Workshop(tmp_path / "workshop", given.bundle).result({"c": "c"}))) == {"c": "added"}


def test_a_long_diff_is_cut_at_the_end_of_a_line(workshop: Workshop) -> None:
    changes = look(workshop.result({"long.txt": "a line of text\n" * 600_000, "z.txt": "z\n"}))
    assert changes.truncated
    assert len(changes.diff) <= 5 * 1024 * 1024
    assert changes.diff.endswith(b"\n+a line of text\n")
    assert changes.insertions == 600_001


def test_a_large_binary_file_is_named_and_not_contained(workshop: Workshop) -> None:
    changes = look(workshop.result({"big.bin": b"\0" * (11 * 1024 * 1024), "small.txt": "x\n"}))
    assert len(changes.diff) < 2000
    assert b"big.bin differ" in changes.diff
    assert b"+x" in changes.diff


# -- checkpoints: from one sandbox to another ------------------------------------------------------------------------


def moved(sandbox: Sandbox, provider: Provider, given: WorkingTree) -> Sandbox:
    """Another sandbox, in which the work of this one goes on."""
    kept = checkpoint(sandbox, base_sha=given.base_sha, branch=BRANCH)
    assert kept is not None
    other = provider.create(metadata={})
    check_out(other, bundle=given.bundle, base_sha=given.base_sha, branch=BRANCH)
    restore(other, kept, branch=BRANCH)
    return other


def test_a_checkpoint_brings_commits_and_changes_to_another_sandbox_as_they_were(
    sandbox: Sandbox, provider: Provider, given: WorkingTree
) -> None:
    check_out(sandbox, bundle=given.bundle, base_sha=given.base_sha, branch=BRANCH)
    work(
        sandbox,
        "echo 2 > a.txt; git commit -qam Second; rm b.txt; echo new > new.txt; echo 3 > a.txt; echo x > ignored",
    )
    other = moved(sandbox, provider, given)
    look = "git log --format=%s; git status --porcelain; git branch --show-current; cat a.txt; ls"
    said = work(other, look)
    assert said.splitlines()[0] == "Second"
    assert said == work(sandbox, look).replace("\nignored", "")
    other.kill()


def test_a_checkpoint_without_changes_is_the_agents_last_commit(
    sandbox: Sandbox, provider: Provider, given: WorkingTree
) -> None:
    check_out(sandbox, bundle=given.bundle, base_sha=given.base_sha, branch=BRANCH)
    assert checkpoint(sandbox, base_sha=given.base_sha, branch=BRANCH) is None
    work(sandbox, "echo 2 > a.txt; git commit -qam Second")
    other = moved(sandbox, provider, given)
    assert work(other, "git rev-parse HEAD; git status --porcelain") == work(sandbox, "git rev-parse HEAD")
    other.kill()


def test_a_checkpoint_disturbs_nothing_of_an_agent_at_work(sandbox: Sandbox, given: WorkingTree) -> None:
    check_out(sandbox, bundle=given.bundle, base_sha=given.base_sha, branch=BRANCH)
    work(sandbox, "echo staged > s.txt; git add s.txt; echo 2 > a.txt; git init -q nested; echo x > nested/y; rm b.txt")
    look = "git status --porcelain; git rev-parse HEAD; git for-each-ref; ls -A nested; git stash list"
    before = work(sandbox, look)
    assert checkpoint(sandbox, base_sha=given.base_sha, branch=BRANCH) is not None
    assert work(sandbox, look) == before


def test_work_that_was_moved_comes_out_as_if_it_had_never_been(
    sandbox: Sandbox, provider: Provider, given: WorkingTree
) -> None:
    check_out(sandbox, bundle=given.bundle, base_sha=given.base_sha, branch=BRANCH)
    work(sandbox, "echo 2 > a.txt; git commit -qam Second; echo new > new.txt")
    other = moved(sandbox, provider, given)
    bundle = collect(other, base_sha=given.base_sha, branch=BRANCH, message="Do it")
    assert bundle is not None
    changes = inspect(given.bundle, given.base_sha, bundle, BRANCH)
    assert (changes.commits, files(changes)) == (2, {"a.txt": "modified", "new.txt": "added"})
    other.kill()


@pytest.mark.parametrize("bundle", [b"", b"# v2 git bundle\n\n", b"# v2 git bundle\n" + b"0" * 40 + b" refs/x\n\nPACK"])
def test_what_is_no_checkpoint_is_refused(sandbox: Sandbox, given: WorkingTree, bundle: bytes) -> None:
    check_out(sandbox, bundle=given.bundle, base_sha=given.base_sha, branch=BRANCH)
    with pytest.raises(SandboxError):
        restore(sandbox, bundle, branch=BRANCH)
