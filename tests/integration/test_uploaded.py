"""A bundle that was uploaded is hostile: it is one commit with all that it needs, as git accepts it, or nothing."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cloudagent_queue.repository import bundle_working_tree, import_upload
from cloudagent_queue.repository.bundles import BASE_BRANCH, read_header
from cloudagent_storage.errors import (
    CloudAgentError,
    InvalidRepositoryConfig,
    InvalidUpload,
    RepositoryTooLarge,
    UploadIncomplete,
)
from tests.support.forge import hostile
from tests.support.git_repos import Workshop, commit, files_of, git, make_repository, put

FILE, LINK, SUBMODULE = "100644", "120000", "160000"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    shop = make_repository(tmp_path / "shop", {"a.txt": "one\n", "sub/b.txt": "b\n"})
    return commit(shop, {"a.txt": "one\ntwo\n"})


def nothing(_: Sequence[str]) -> bytes | None:
    return None


def refused(sent: bytes, error: type[CloudAgentError] = InvalidUpload) -> None:
    with pytest.raises(error) as caught:
        import_upload(sent, nothing)
    assert caught.value.message.isprintable() and "/tmp" not in caught.value.message


def bundle_of(folder: Path, *tips: str) -> bytes:
    """A bundle with these on the expected branch, the first one there."""
    names = [BASE_BRANCH, *(f"refs/heads/other-{number}" for number in range(1, len(tips)))]
    for name, tip in zip(names, tips, strict=True):
        git(folder, "update-ref", name, tip)
    git(folder, "bundle", "create", "--quiet", ".git/made", *names)
    return (folder / ".git" / "made").read_bytes()


def pack(*objects: bytes, count: int | None = None) -> bytes:
    body = b"PACK" + struct.pack(">II", 2, len(objects) if count is None else count) + b"".join(objects)
    return body + hashlib.sha1(body).digest()


def entry(kind: int, data: bytes, size: int | None = None) -> bytes:
    """An object as a pack has it; `size` is what it says of itself."""
    left = len(data) if size is None else size
    head = bytearray([kind << 4 | left & 15])
    left >>= 4
    while left:
        head[-1] |= 128
        head.append(left & 127)
        left >>= 7
    return bytes(head) + zlib.compress(data)


def header(tip: str, ref: str = BASE_BRANCH, *needs: str) -> bytes:
    return "\n".join(["# v2 git bundle", *(f"-{name}" for name in needs), f"{tip} {ref}", "", ""]).encode()


def unpacked(bundle: bytes, folder: Path) -> Path:
    return Workshop(folder, bundle).folder


def test_an_honest_bundle_is_taken_as_it_is(shop: Path) -> None:
    put(shop, {"a.txt": "mine\n", "new.txt": "new\n", ".cloudagent.toml": "setup = 'make'\n"})
    tree = bundle_working_tree(shop, base_ref=None)
    found = import_upload(tree.bundle, nothing)
    assert (found.bundle, found.base_sha) == (tree.bundle, tree.base_sha)
    assert (found.config, found.manifests) == (tree.config, tree.manifests)
    assert found.commits == (tree.base_sha, *git(shop, "rev-list", "HEAD").split())


def test_what_is_left_out_is_put_back_from_what_was_uploaded_before(shop: Path, tmp_path: Path) -> None:
    commit(shop, {"large.bin": b"".join(hashlib.sha512(b"%d" % number).digest() for number in range(1000))})
    first = import_upload(bundle_working_tree(shop, base_ref=None).bundle, nothing)
    put(shop, {"a.txt": "later\n"})
    asked: list[Sequence[str]] = []

    def held(commits: Sequence[str]) -> Sequence[str]:
        asked.append(commits)
        return [name for name in commits if name in first.commits]

    tree = bundle_working_tree(shop, base_ref=None, held=held)
    assert asked[0][0] == tree.base_sha and len(tree.bundle) < 2000 < len(first.bundle)
    assert read_header(tree.bundle).prerequisites == (first.base_sha,)
    found = import_upload(tree.bundle, lambda needs: first.bundle if set(needs) <= set(first.commits) else None)
    assert files_of(unpacked(found.bundle, tmp_path / "there")) == files_of(shop)
    refused(tree.bundle, UploadIncomplete)
    again = bundle_working_tree(shop, base_ref=None, held=lambda commits: commits[:1])
    assert (again.bundle, again.base_sha) == (b"", tree.base_sha)


def test_what_is_no_bundle_of_one_commit_on_the_one_branch_is_refused(shop: Path) -> None:
    tip, before = git(shop, "rev-parse", "HEAD"), git(shop, "rev-parse", "HEAD^")
    good = bundle_of(shop, tip)
    git(shop, "tag", "-a", "-m", "x", "v1", tip)
    tag = git(shop, "rev-parse", "refs/tags/v1")
    git(shop, "bundle", "create", "--quiet", ".git/made", "refs/tags/v1")
    tagged = (shop / ".git" / "made").read_bytes()
    cases: list[bytes] = [
        b"",
        b"garbage",
        b"\0" * 100_000,
        b"PACK" + b"\xff" * 1000,
        good[:-10],
        good[: len(good) // 2],
        good[: good.index(b"PACK")],
        good + b"more",
        good.replace(b"# v2", b"# v9"),
        good.replace(BASE_BRANCH.encode(), b"refs/heads/main"),
        good.replace(BASE_BRANCH.encode(), b"HEAD"),
        good.replace(BASE_BRANCH.encode(), b"refs/../../x"),
        bundle_of(shop, tip, before),
        tagged.replace(b"refs/tags/v1", BASE_BRANCH.encode()),
        header(tag) + tagged[tagged.index(b"PACK") :],
        header("0" * 40) + good[good.index(b"PACK") :],
        header(git(shop, "rev-parse", "HEAD^{tree}")) + good[good.index(b"PACK") :],
        b"# v3 git bundle\n@filter=blob:none\n" + good.partition(b"\n")[2],
        b"# v3 git bundle\n@object-format=sha256\n" + good.partition(b"\n")[2],
    ]
    import_upload(bundle_of(shop, tip), nothing)
    for sent in cases:
        refused(sent)


def test_what_claims_to_be_huge_costs_nothing(shop: Path) -> None:
    tip = git(shop, "rev-parse", "HEAD")
    for made in (pack(entry(3, b"x"), count=2**32 - 1), pack(entry(3, b"x", size=2**50)), pack(entry(3, b"x" * 10, 4))):
        refused(header(tip) + made)


def test_a_commit_without_its_files_or_its_history_is_refused(shop: Path) -> None:
    tip = git(shop, "rev-parse", "HEAD")
    alone = git_bytes(shop, "cat-file", "commit", tip)
    refused(header(tip) + pack(entry(1, alone)))
    objects = git(shop, "rev-list", "--objects", tip).split("\n")
    blob = next(line.split()[0] for line in objects if line.endswith("b.txt"))
    kinds = {"commit": 1, "tree": 2, "blob": 3}
    kept = [
        entry(kinds[kind], git_bytes(shop, "cat-file", kind, name))
        for name in (line.split()[0] for line in objects)
        if name != blob
        for kind in [git(shop, "cat-file", "-t", name)]
    ]
    refused(header(tip) + pack(*kept))


def git_bytes(folder: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True).stdout


HOSTILE: list[tuple[str, bytes, bytes]] = [
    (FILE, b".git/config", b"[core]\n\tfsmonitor = evil\n"),
    (FILE, b".GIT/hooks/post-checkout", b"evil"),
    (FILE, b"git~1/config", b"evil"),
    (FILE, b"../evil", b"evil"),
    (FILE, b"x%2f..%2fevil", b"evil"),
    (FILE, b".gitmodules", b'[submodule "../../evil"]\n\tpath = x\n\turl = https://example.com/x\n'),
    (FILE, b".gitmodules", b'[submodule "x"]\n\tpath = x\n\turl = --upload-pack=evil\n'),
    (LINK, b".gitmodules", b"a.txt"),
]


@pytest.mark.parametrize("what", HOSTILE, ids=[f"{mode} {path.decode()}" for mode, path, _ in HOSTILE])
def test_files_that_no_working_tree_may_hold_are_refused(
    shop: Path, tmp_path: Path, what: tuple[str, bytes, bytes]
) -> None:
    workshop = Workshop(tmp_path / "workshop", bundle_working_tree(shop, base_ref=None).bundle)
    result = hostile(workshop, what)
    (tip, _) = read_header(result.result_bundle).refs[0]
    refused(bundle_of(workshop.folder, tip))


def test_a_submodule_a_link_and_the_flaws_of_old_tools_are_taken(shop: Path, tmp_path: Path) -> None:
    workshop = Workshop(tmp_path / "workshop", bundle_working_tree(shop, base_ref=None).bundle)
    result = hostile(workshop, (SUBMODULE, b"vendor", b"somewhere"), (LINK, b"out", b"../outside"))
    (tip, _) = read_header(result.result_bundle).refs[0]
    assert import_upload(bundle_of(workshop.folder, tip), nothing).base_sha == tip
    tree = git(workshop.folder, "rev-parse", f"{tip}^{{tree}}")
    flawed = f"tree {tree}\nauthor dev <> 0 +0000\ncommitter dev 0 +00000\n\nold\n".encode()
    old = git(workshop.folder, "hash-object", "-t", "commit", "-w", "--stdin", "--literally", stdin=flawed)
    assert import_upload(bundle_of(workshop.folder, old), nothing).base_sha == old


def test_what_it_is_built_on_makes_it_no_larger_than_may_be(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = import_upload(bundle_working_tree(shop, base_ref=None).bundle, nothing)
    put(shop, {"a.txt": "later\n"})
    thin = bundle_working_tree(shop, base_ref=None, held=lambda commits: [c for c in commits if c in first.commits])
    monkeypatch.setattr("cloudagent_queue.repository.uploaded.BUNDLE_LIMIT", 100)
    with pytest.raises(RepositoryTooLarge):
        import_upload(thin.bundle, lambda _: first.bundle)


def test_settings_that_cannot_be_used_are_refused_by_what_is_wrong(shop: Path) -> None:
    commit(shop, {".cloudagent.toml": "nonsense = 1\n"})
    refused(bundle_of(shop, git(shop, "rev-parse", "HEAD")), InvalidRepositoryConfig)


def test_prerequisites_without_end_are_refused(shop: Path) -> None:
    tip = git(shop, "rev-parse", "HEAD")
    find: Callable[[Sequence[str]], bytes | None] = lambda _: pytest.fail("asked for")  # noqa: E731
    with pytest.raises(InvalidUpload):
        import_upload(header(tip, BASE_BRANCH, *(f"{n:040x}" for n in range(300))) + pack(), find)
