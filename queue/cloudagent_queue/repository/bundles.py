"""A bundle's header, and the quarantine: a bare repository of its own in which a hostile bundle is looked at."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cloudagent_queue import git
from cloudagent_storage.errors import UnsafeChange

BASE_BRANCH = "refs/heads/cloudagent-base"
"""The one ref of an input bundle: where the agent starts."""
BUNDLE_LIMIT = 200_000_000
"""Bytes: what the store keeps as one."""
HARMLESS_FLAWS = (
    *["badDate", "badDateOverflow", "badTimezone", "missingEmail", "missingNameBeforeEmail", "missingSpaceBeforeDate"],
    *["missingSpaceBeforeEmail", "missingTaggerEntry", "multipleAuthors", "zeroPaddedDate", "zeroPaddedFilemode"],
)
"""Flaws that old tools left in the history of honest repositories, and that harm nobody."""
DIFF_LIMIT = 5 * git.MB
BINARY_DIFF_LIMIT = 10 * git.MB
"""A larger file is only named in a diff, not contained."""

MEMORY_LIMIT = 3 * 1024 * git.MB
NAMES_LIMIT = 64 * git.MB
"""Of all paths of a result together: five times those of the largest repositories."""
_HEADER_LIMIT = 64 * 1024
_FORMATS = {"sha1": 40, "sha256": 64}
_STATUS = {"A": "added", "M": "modified", "D": "deleted", "R": "renamed", "C": "added", "T": "modified"}


@dataclass(frozen=True)
class Header:
    """What a bundle says of itself before its pack begins."""

    object_format: str
    prerequisites: tuple[str, ...]
    refs: tuple[tuple[str, str], ...]
    """Pairs of a commit's id and the ref that names it."""
    pack_at: int


def read_header(bundle: bytes) -> Header:
    """Raises `ValueError` for anything but a whole bundle of version 2 or 3 without a filter."""
    head, separator, _ = bundle[:_HEADER_LIMIT].partition(b"\n\n")
    lines = head.decode("ascii").split("\n")
    if not separator or lines[0] not in ("# v2 git bundle", "# v3 git bundle"):
        raise ValueError("no bundle")
    object_format, prerequisites, refs = "sha1", list[str](), list[tuple[str, str]]()
    for line in lines[1:]:
        if line.startswith("@"):
            key, _, object_format = line[1:].partition("=")
            if key != "object-format" or object_format not in _FORMATS:
                raise ValueError("a capability that is not known")
        elif match := re.fullmatch(r"-([0-9a-f]+)(?: .*)?", line):
            prerequisites.append(match[1])
        elif match := re.fullmatch(r"([0-9a-f]+) (refs/[!-~]+)", line):
            refs.append((match[1], match[2]))
        else:
            raise ValueError("a line that is not known")
    if any(len(name) != _FORMATS[object_format] for name in [*prerequisites, *(sha for sha, _ in refs)]):
        raise ValueError("an id of the wrong length")
    return Header(object_format, tuple(prerequisites), tuple(refs), len(head) + 2)


def with_ref(bundle: bytes, branch: str) -> bytes:
    """A result's bundle as another task's, on that one's branch. Raises `UnsafeChange` for one that is no result."""
    try:
        header = read_header(bundle)
        ((head, ref),) = header.refs
        lines = bundle[: header.pack_at].decode("ascii").split("\n")
    except ValueError as error:
        raise UnsafeChange("The result is no well-formed git bundle.") from error
    renamed = [f"{head} refs/heads/{branch}" if line == f"{head} {ref}" else line for line in lines]
    return "\n".join(renamed).encode() + bundle[header.pack_at :]


@functools.cache
def empty_repository() -> tuple[bytes, str]:
    """The bundle that `repository: none` stands for, and its one commit, without a file; always the same."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        git.run("init", "--quiet", "--bare", "--template=", ".", folder=folder)
        tree = git.run("mktree", folder=folder).text
        date = {"GIT_AUTHOR_DATE": "@0 +0000", "GIT_COMMITTER_DATE": "@0 +0000"}
        commit = git.run("commit-tree", tree, "-m", "Start empty", folder=folder, env={**git.AUTHOR, **date}).text
        git.run("update-ref", BASE_BRANCH, commit, folder=folder)
        return git.run("bundle", "create", "--quiet", "-", BASE_BRANCH, folder=folder).out, commit


@dataclass(frozen=True)
class ChangedFile:
    """One file that differs between base and result. Paths are untrusted; bytes that are no UTF-8 are surrogates."""

    path: str
    status: str
    """added, modified, deleted or renamed"""
    old_path: str | None
    """Where a renamed file was."""
    old_mode: str
    new_mode: str
    """As git writes them: 100644, 100755, 120000 (symlink), 160000 (submodule), 000000 (absent)."""
    old_id: str
    new_id: str
    insertions: int = 0
    deletions: int = 0
    binary: bool = False


@dataclass(frozen=True)
class Changes:
    """What a task changed, looked at in quarantine."""

    head: str
    """The result's newest commit."""
    commits: int
    files: tuple[ChangedFile, ...]
    insertions: int
    deletions: int
    diff: bytes
    """A unified diff; a large binary file is only named in it."""
    truncated: bool
    """Was the diff longer than 5 MB?"""


class Quarantine:
    """A temporary bare repository that holds base and result, and nothing else."""

    def __init__(self, folder: Path, base: str, head: str, result_pack: bytes) -> None:
        self.folder = folder
        self.base = base
        self.head = head
        self._result_pack = result_pack

    @classmethod
    @contextmanager
    def holding(
        cls, input_bundle: bytes | None, base_sha: str, result_bundle: bytes, branch: str, *, strict: bool = True
    ) -> Generator[Quarantine]:
        """Import both bundles. Without `strict` the caller looks at the result first and then calls `check_objects`.

        Raises `UnsafeChange` when the result is malformed, or not one commit on `branch` that grows out of the input.
        """
        if input_bundle is None:
            input_bundle, _ = empty_repository()
        with tempfile.TemporaryDirectory(prefix="cloudagent-quarantine-") as name:
            folder = Path(name)
            try:
                given, result = read_header(input_bundle), read_header(result_bundle)
                if result.object_format != given.object_format or len(result_bundle) > BUNDLE_LIMIT:
                    raise ValueError("not the format or the size that was expected")
                ((head, ref),) = result.refs
                if ref != f"refs/heads/{branch}":
                    raise ValueError("not the ref that was expected")
                quarantine = cls(folder, base_sha, head, result_bundle[result.pack_at :])
                quarantine.run(
                    "init", "--quiet", "--bare", "--template=", f"--object-format={given.object_format}", "."
                )
                quarantine.run("index-pack", "--fix-thin", "--stdin", stdin=input_bundle[given.pack_at :])
                quarantine._expect_commits([base_sha, *result.prerequisites])
                quarantine.run("update-ref", BASE_BRANCH, base_sha)
                # Not `git fetch`: it would take refs as the bundle has them, and does not check a bundle's objects.
                if strict:
                    quarantine.check_objects()
                else:
                    quarantine.run("index-pack", "--fix-thin", "--stdin", stdin=quarantine._result_pack)
                quarantine._expect_commits([head])
                # Everything that the result needs is there, and nothing of it is read from anywhere else.
                quarantine.run("rev-list", "--objects", "--quiet", head, "--not", base_sha)
                quarantine._expect_few_names()
                quarantine.run("update-ref", ref, head)
            except (ValueError, git.GitFailed) as error:
                raise UnsafeChange("The result is no well-formed git bundle on top of the task's base.") from error
            yield quarantine

    def run(self, *arguments: str, **options: object) -> git.Done:
        """git in the quarantine, with limits on time and memory."""
        return git.run(*arguments, folder=self.folder, max_memory=MEMORY_LIMIT, **options)  # pyright: ignore[reportArgumentType]

    def changed_files(self, *, renames: bool, lines: bool = True) -> tuple[ChangedFile, ...]:
        """What differs between base and result. Without `lines` none are counted, and no content is read.

        Raises `UnsafeChange` where git cannot tell, in bounds of time and memory.
        """
        how = ["-M" if renames else "--no-renames", "-l1000", *(["--numstat"] if lines else [])]
        options = ["-r", "-z", *how, "--raw", "--full-index", "--no-ext-diff", "--no-textconv"]
        try:
            out = self.run("diff-tree", *options, self.base, self.head).out
        except (git.GitFailed, git.TooMuchOutput):
            raise UnsafeChange("The result's files cannot be compared with those that the task started from.") from None
        fields = iter(out.decode("utf-8", "surrogateescape").split("\0")[:-1])
        files: list[ChangedFile] = []
        counted = 0
        for field in fields:
            if field.startswith(":"):
                old_mode, new_mode, old_id, new_id, status = field[1:].split(" ")
                first = next(fields)
                path = next(fields) if status[0] in "RC" else first
                old_path = first if status[0] == "R" else None
                files.append(ChangedFile(path, _STATUS[status[0]], old_path, old_mode, new_mode, old_id, new_id))
                continue
            insertions, deletions, path = field.split("\t", 2)
            if path == "":  # a rename: both names follow
                next(fields)
                next(fields)
            if insertions == "-":
                files[counted] = replace(files[counted], binary=True)
            else:
                files[counted] = replace(files[counted], insertions=int(insertions), deletions=int(deletions))
            counted += 1
        return tuple(files)

    def sizes(self, ids: Sequence[str]) -> dict[str, int]:
        """How large these objects are, in bytes."""
        asked = "".join(f"{name}\n" for name in ids).encode()
        out = self.run("cat-file", "--batch-check=%(objectname) %(objectsize)", stdin=asked).text
        return {name: int(size) for name, size in (line.split(" ") for line in out.splitlines())}

    def contents(self, ids: Iterable[str]) -> dict[str, bytes]:
        """What these objects hold. They have to be there."""
        asked = list(dict.fromkeys(ids))
        out = self.run("cat-file", "--batch", stdin="".join(f"{name}\n" for name in asked).encode()).out
        found: dict[str, bytes] = {}
        at = 0
        for name in asked:
            end = out.index(b"\n", at)
            size = int(out[at:end].split(b" ")[2])
            found[name], at = out[end + 1 : end + 1 + size], end + size + 2
        return found

    def check_objects(self) -> None:
        """Have git check every object of the result: malformed ones, and names that no working tree may hold.

        Raises `UnsafeChange`.
        """
        try:
            self.run("index-pack", "--strict", "--fix-thin", "--stdin", stdin=self._result_pack)
        except git.GitFailed:
            raise UnsafeChange("The result holds objects that git does not accept.") from None

    def _expect_few_names(self) -> None:
        # A few objects can stand for a billion files: whatever lists them has to find out in time.
        try:
            self.run("ls-tree", "-r", "-z", "--name-only", self.head, max_bytes=NAMES_LIMIT)
        except git.TooMuchOutput:
            raise UnsafeChange("The result holds more files than any working tree.") from None

    def _expect_commits(self, ids: Sequence[str]) -> None:
        asked = "".join(f"{name}\n" for name in ids).encode()
        kinds = self.run("cat-file", "--batch-check=%(objecttype)", stdin=asked).text.splitlines()
        if any(kind != "commit" for kind in kinds):
            raise ValueError("a commit is missing")


def inspect(input_bundle: bytes | None, base_sha: str, result_bundle: bytes, branch: str) -> Changes:
    """What a result changed. Raises `UnsafeChange` for a bundle that is not what `collect` makes."""
    with Quarantine.holding(input_bundle, base_sha, result_bundle, branch) as quarantine:
        files = quarantine.changed_files(renames=True)
        blobs = [
            name
            for file in files
            for name, mode in ((file.old_id, file.old_mode), (file.new_id, file.new_mode))
            if mode not in ("000000", "160000")
        ]
        whole = max(quarantine.sizes(blobs).values(), default=0) <= BINARY_DIFF_LIMIT
        diff = quarantine.run(
            *["diff", "--no-color", "--no-ext-diff", "--no-textconv", "-M", "-l1000", *(["--binary"] if whole else [])],
            *[quarantine.base, quarantine.head],
            settings=[("core.bigFileThreshold", str(BINARY_DIFF_LIMIT))],
            max_bytes=DIFF_LIMIT + 1,
            cut=True,
        ).out
        truncated = len(diff) > DIFF_LIMIT
        return Changes(
            head=quarantine.head,
            commits=int(quarantine.run("rev-list", "--count", quarantine.head, "--not", quarantine.base).text),
            files=files,
            insertions=sum(file.insertions for file in files),
            deletions=sum(file.deletions for file in files),
            diff=diff[: diff.rfind(b"\n", 0, DIFF_LIMIT) + 1] if truncated else diff,
            truncated=truncated,
        )
