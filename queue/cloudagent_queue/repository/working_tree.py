"""A repository on the user's own machine: what is in the working tree becomes a bundle, and nothing there is changed.

Objects are written to a temporary place, the index is a copy, no ref is moved, and no hook, filter or fsmonitor that
the repository may configure is run. Of the user's own configuration only what decides which files count is heeded.
"""

from __future__ import annotations

import difflib
import functools
import posixpath
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloudagent_queue import git
from cloudagent_queue.repository.bundles import BASE_BRANCH, BUNDLE_LIMIT
from cloudagent_queue.repository.config import config_in
from cloudagent_queue.repository.manifests import manifests_in
from cloudagent_storage.errors import (
    RefNotFound,
    RepositoryEmpty,
    RepositoryNotAllowed,
    RepositoryNotFound,
    RepositoryTooLarge,
    SecretsFound,
)

ORIGIN = "Based-on"
"""The trailer of a commit that holds uncommitted work: the commit that the user was on."""

_SECRET = re.compile(
    r"\.env(\..+)?|.+\.(pem|key|p12|pfx|jks|keystore|kdbx)|id_(rsa|dsa|ecdsa|ed25519)[^/]*|\.netrc|\.pypirc|\.git-credentials",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(r"\.env\.(example|sample|template|dist|defaults)|id_.+\.pub", re.IGNORECASE)
_NPM_TOKEN = re.compile(rb"_(authToken|auth|password)\s*=")
_HEEDED = r"^(core\.(excludesfile|autocrlf|eol)|safe\.directory)$"
_NEAR_NAMES = 5
_COMMITS_ASKED = 256
_SUBMODULES_NAMED = 10
_SECRETS_NAMED = 20


@dataclass(frozen=True)
class WorkingTree:
    """A folder of the user's as a bundle with the one ref `refs/heads/cloudagent-base`."""

    top: Path
    bundle: bytes
    """Empty when whoever asked holds all of it."""
    base_sha: str
    """What the agent starts from: a commit of its own when something was not committed."""
    head: str
    """The user's branch, or the commit where there is none."""
    left_out: tuple[str, ...]
    """Untracked files that look like secrets, and nested repositories (with a final slash)."""
    allowed: tuple[str, ...]
    """What looks like a secret and goes along, as its user wants it."""
    pointers: tuple[str, ...]
    """What travels as the pointer that it is in git, in sentences: submodules and LFS files."""
    has_uncommitted: bool
    config: bytes | None
    """The `.cloudagent.toml` that is in it, checked."""
    manifests: str
    root: str | None
    """The first commit of its history, by which another working tree of the same repository is known; None where the
    history is cut off."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the folder the agent does not get, in sentences."""
        secret = [f"Left out, since it looks like a secret: {path}" for path in self.left_out if path[-1] != "/"]
        nested = [f"Left out, since it is a repository of its own: {path}" for path in self.left_out if path[-1] == "/"]
        allowed = [f"Goes along, though it looks like a secret: {path}" for path in self.allowed]
        return (*secret, *allowed, *nested, *self.pointers)


class LocalRepository:
    """A repository of the user's."""

    def __init__(self, top: Path, *, bare: bool, settings: Sequence[tuple[str, str]]) -> None:
        self.top = top
        self.bare = bare
        self.settings = settings
        """For git on other objects in the light of this repository."""

    @classmethod
    def find(cls, folder: Path) -> LocalRepository:
        """The repository that a folder lies in. Raises `RepositoryNotFound`."""
        if not folder.is_dir():
            raise RepositoryNotFound("There is no such folder.", remedy="Check the path.")
        settings = _heeded_settings(folder)
        try:
            bare, inside = git.run(
                "rev-parse", "--is-bare-repository", "--is-inside-work-tree", folder=folder, settings=settings
            ).text.split()
            if bare != "true" and inside != "true":
                raise RepositoryNotFound("The folder lies inside a .git folder.")
            top = "--absolute-git-dir" if bare == "true" else "--show-toplevel"
            path = Path(git.run("rev-parse", top, folder=folder, settings=settings).text)
            found = cls(path, bare=bare == "true", settings=settings)
            return cls(path, bare=found.bare, settings=[*settings, *found._filters_off()])
        except git.GitFailed as error:
            if "dubious ownership" in error.stderr:
                raise RepositoryNotFound(
                    "The repository belongs to another user.",
                    remedy="Allow it with `git config --global --add safe.directory FOLDER`.",
                ) from None
            raise RepositoryNotFound() from None

    def run(self, *arguments: str, **options: Any) -> git.Done:
        """git in this repository."""
        return git.run(*arguments, folder=self.top, settings=self.settings, **options)

    def path(self, name: str) -> Path:
        """Where git keeps something of this repository."""
        return self.top / self.run("rev-parse", "--git-path", name).text

    def commit(self, name: str) -> str | None:
        """The commit of that name."""
        done = self.run("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}", ok=(0, 1, 128))
        return done.text if done.exit_code == 0 else None

    def untracked(self) -> list[str]:
        """Files that are neither tracked nor ignored; a nested repository ends with a slash."""
        out = self.run("ls-files", "--others", "--exclude-standard", "-z").out
        return out.decode("utf-8", "surrogateescape").split("\0")[:-1]

    def snapshot(self, temporary: Path, *, leave_out: Iterable[str], env: Mapping[str, str] | None = None) -> str:
        """The id of a tree of all that is in the working tree and not ignored. `temporary` holds the copy of the index.

        `env` says where objects are written, the repository itself being the default.
        """
        index = temporary / "index"
        if self.path("index").exists():
            shutil.copy2(self.path("index"), index)  # with its time, by which git knows which files it need not read
        environment = {**(env or {}), "GIT_INDEX_FILE": str(index)}
        pathspec = ["."] + [f":(top,exclude,literal){path}" for path in leave_out]
        self.run(
            *["add", "--all", "--pathspec-from-file=-", "--pathspec-file-nul"],
            stdin="\0".join(pathspec).encode("utf-8", "surrogateescape"),
            env=environment,
            timeout_s=300,
        )
        staged = self.run("ls-files", "--cached", "-z", env=environment).out.decode("utf-8", "surrogateescape")
        left_out = set(leave_out) & set(staged.split("\0"))
        if left_out:
            paths = "\0".join(sorted(left_out)).encode("utf-8", "surrogateescape")
            self.run("update-index", "--force-remove", "-z", "--stdin", stdin=paths, env=environment)
        return self.run("write-tree", env=environment).text

    def _filters_off(self) -> list[tuple[str, str]]:
        """Settings that switch off the programs through which a repository may pass its files."""
        pattern = r"^filter\..*\.(clean|smudge|process|required)$"
        out = self.run("config", "--null", "--name-only", "--get-regexp", pattern, ok=(0, 1)).text
        return [(name, "false" if name.endswith(".required") else "") for name in out.split("\0") if name]


def bundle_working_tree(
    folder: Path,
    *,
    base_ref: str | None,
    held: Callable[[Sequence[str]], Collection[str]] | None = None,
    allow_secrets: Collection[str] | None = None,
) -> WorkingTree:
    """Bundle the repository that `folder` lies in: `base_ref` alone, or else HEAD and all that is not committed.

    `held` tells which of some commits, the newest ones, the receiver has with all their history: what is in these is
    not bundled again. Submodules and LFS files travel as the pointers that they are in git.

    Files that git does not know yet and that look like secrets go along if `allow_secrets` has their path from the
    top; others are refused with `SecretsFound`. None says that nobody is there to decide: then all of them stay.

    Raises `RepositoryNotFound`, `RepositoryEmpty`, `RepositoryNotAllowed` (a partial clone), `RefNotFound` with the
    nearest names, `InvalidRepositoryConfig` and `RepositoryTooLarge`; and what `held` does.
    """
    repository = LocalRepository.find(folder)
    if repository.run("config", "--get-regexp", r"^remote\..*\.promisor$", ok=(0, 1)).out:
        raise RepositoryNotAllowed(
            "A partial clone does not hold all of its files.",
            remedy="Pass the address that it was cloned from, or clone it again without --filter.",
        )
    if base_ref is None:
        head = repository.commit("HEAD")
        if head is None:
            raise RepositoryEmpty()
        name = repository.run("symbolic-ref", "--quiet", "--short", "HEAD", ok=(0, 1)).text or head
    else:
        head, name = _resolve(repository, base_ref), base_ref

    with tempfile.TemporaryDirectory(prefix="cloudagent-bundle-") as temporary:
        scratch = _Scratch(repository, Path(temporary))
        base, left_out, allowed = head, list[str](), list[str]()
        committed = tree = repository.run("rev-parse", f"{head}^{{tree}}").text
        if base_ref is None and not repository.bare:
            left_out = to_leave_out(repository)
            secrets = [path for path in left_out if not path.endswith("/")]
            if allow_secrets is not None:
                allowed = sorted({posixpath.normpath(path) for path in allow_secrets} & set(secrets))
                _check_secrets(set(secrets) - set(allowed))
                left_out = sorted(set(left_out) - set(secrets))
            tree = repository.snapshot(Path(temporary), leave_out=left_out, env=scratch.env)
        run = functools.partial(repository.run, env=scratch.env)
        config, manifests = config_in(run, tree), manifests_in(run, tree)
        if tree != committed or scratch.shallow:
            base = scratch.commit(tree, origin=head)
        there = held(scratch.newest(base)) if held is not None else ()
        try:
            bundle = b"" if base in there else scratch.bundle(base, without=there)
        except git.TooMuchOutput:
            raise RepositoryTooLarge(
                f"The repository makes a bundle of more than {BUNDLE_LIMIT // 1_000_000} MB, which is the limit."
            ) from None
        return WorkingTree(
            top=repository.top,
            bundle=bundle,
            base_sha=base,
            head=name,
            left_out=tuple(left_out),
            allowed=tuple(allowed),
            pointers=_pointers(run, tree),
            has_uncommitted=tree != committed,
            config=config,
            manifests=manifests,
            root=None if scratch.shallow else root_of(run, base),
        )


class _Scratch:
    """A temporary bare repository that reads the user's objects and takes the new ones."""

    def __init__(self, repository: LocalRepository, temporary: Path) -> None:
        self._repository = repository
        self._folder = temporary / "scratch.git"
        self._folder.mkdir()
        object_format = repository.run("rev-parse", "--show-object-format").text
        options = ["--quiet", "--bare", "--template=", f"--object-format={object_format}"]
        git.run("init", *options, ".", folder=self._folder)
        objects = repository.path("objects").resolve()
        self.env = {
            "GIT_OBJECT_DIRECTORY": str(self._folder / "objects"),
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": quoted(objects),
        }
        self.shallow = repository.run("rev-parse", "--is-shallow-repository").text == "true"

    def commit(self, tree: str, *, origin: str) -> str:
        # The origin's date: the same state is the same commit, whenever it is submitted.
        date = f"@{self._repository.run('show', '--no-patch', '--format=%ct', origin).text} +0000"
        # A bundle cannot say that its history is cut off, so that of a shallow clone begins here.
        parent = [] if self.shallow else ["-p", origin]
        message = f"The working tree as it was submitted\n\n{ORIGIN}: {origin}\n"
        dates = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        env = {**self.env, **git.AUTHOR, **dates}
        return self._repository.run("commit-tree", tree, *parent, stdin=message.encode(), env=env).text

    def newest(self, tip: str) -> list[str]:
        """A commit and those before it, the newest first."""
        if self.shallow:
            return [tip]
        listing = ["rev-list", f"--max-count={_COMMITS_ASKED}", tip]
        return self._repository.run(*listing, env=self.env).text.split("\n")

    def bundle(self, tip: str, *, without: Collection[str] = ()) -> bytes:
        env = {"GIT_ALTERNATE_OBJECT_DIRECTORIES": self.env["GIT_ALTERNATE_OBJECT_DIRECTORIES"]}
        git.run("update-ref", BASE_BRANCH, tip, folder=self._folder, env=env)
        return git.run(
            *["bundle", "create", "--quiet", "-", BASE_BRANCH, *(f"^{commit}" for commit in without)],
            folder=self._folder,
            env=env,
            max_bytes=BUNDLE_LIMIT,
            timeout_s=600,
        ).out


def root_of(run: Callable[..., git.Done], commit: str) -> str:
    """The first commit of its history, by first parents."""
    return run("rev-list", "--first-parent", "--max-parents=0", commit).text


def origin_of(message: str) -> str | None:
    """The commit that the user was on, from the message of a commit that holds uncommitted work."""
    match = re.search(rf"(?m)^{ORIGIN}: ([0-9a-f]{{40,64}})$", message)
    return match[1] if match else None


def near_names(wanted: str, names: Sequence[str]) -> str:
    """A remedy that names those refs that are most like the one that was wanted."""
    short = {name.removeprefix("origin/"): name for name in reversed(names) if len(name) <= 100}
    near = difflib.get_close_matches(wanted, list(short), n=_NEAR_NAMES, cutoff=0.4) or list(short)[-_NEAR_NAMES:]
    return f"Pass one that exists, such as {', '.join(short[name] for name in near)}." if near else RefNotFound.remedy


def _resolve(repository: LocalRepository, ref: str) -> str:
    found = repository.commit(ref) or repository.commit(f"refs/remotes/origin/{ref}")
    if found is not None:
        return found
    listing = ["refs/heads", "refs/remotes", "refs/tags"]
    names = repository.run("for-each-ref", "--format=%(refname:short)", *listing).text.splitlines()
    if not names and repository.commit("HEAD") is None:
        raise RepositoryEmpty()
    raise RefNotFound(remedy=near_names(ref, names))


def to_leave_out(repository: LocalRepository) -> list[str]:
    """Files that git does not know yet and that look like secrets, and repositories nested in this one."""
    untracked = repository.untracked()
    size = sum((repository.top / path).lstat().st_size for path in untracked if (repository.top / path).is_file())
    if size > BUNDLE_LIMIT:
        raise RepositoryTooLarge(
            f"Untracked files add up to {size // 1_000_000} MB; the limit is {BUNDLE_LIMIT // 1_000_000} MB.",
            remedy="Name what the agent does not need in .gitignore.",
        )
    listing = ["diff-index", "--cached", "--name-only", "--diff-filter=A", "-z", "HEAD"]
    staged = repository.run(*listing).out.decode("utf-8", "surrogateescape").split("\0")[:-1]
    return sorted(p for p in {*untracked, *staged} if p.endswith("/") or _looks_secret(repository.top / p))


def _check_secrets(paths: Collection[str]) -> None:
    if not paths:
        return
    names = sorted(path.encode("utf-8", "replace").decode() for path in paths)
    more = f" and {len(names) - _SECRETS_NAMED} more" if len(names) > _SECRETS_NAMED else ""
    refusal = SecretsFound(
        f"These look like secrets: {', '.join(names[:_SECRETS_NAMED])}{more}. Nothing was submitted."
    )
    refusal.files = tuple(names)
    raise refusal


def _looks_secret(path: Path) -> bool:
    if path.name.lower() == ".npmrc":
        try:
            return bool(_NPM_TOKEN.search(path.read_bytes()))
        except OSError:
            return True
    return bool(_SECRET.fullmatch(path.name)) and not _NO_SECRET.fullmatch(path.name)


def _heeded_settings(folder: Path) -> list[tuple[str, str]]:
    """What the user has configured, everywhere or here, and decides which files count and as what."""
    home = Path.home()
    out = git.run(
        *["config", "--null", "--includes", "--show-scope", "--get-regexp", _HEEDED],
        folder=folder,
        configured_by={"HOME": str(home), "PATH": git.PATH},
        ok=(0, 1),
    ).text
    fields = iter(out.split("\0")[:-1])
    entries = [entry.partition("\n") for scope, entry in zip(fields, fields, strict=True) if scope != "command"]
    found = [(key, value) for key, separator, value in entries if separator]
    if not any(key == "core.excludesfile" for key, _ in found):
        found.append(("core.excludesfile", "~/.config/git/ignore"))
    # There is no HOME where they are used.
    return [(key, str(home / value[2:]) if value.startswith("~/") else value) for key, value in found]


def _pointers(run: Callable[..., git.Done], tree: str) -> tuple[str, ...]:
    """What of a tree is not in git itself, in sentences."""
    entries = run("ls-tree", "-r", "-z", "--full-tree", tree).out.decode("utf-8", "surrogateescape").split("\0")
    submodules = [entry.partition("\t")[2] for entry in entries if entry.startswith("160000 ")]
    said = [
        f"The submodule {path} is an empty folder there: only which commit it is at travels, and none of its files."
        for path in submodules[:_SUBMODULES_NAMED]
    ]
    if len(submodules) > _SUBMODULES_NAMED:
        said.append(f"So are {len(submodules) - _SUBMODULES_NAMED} more submodules.")
    attributes = [entry for entry in entries if entry.rpartition("\t")[2].rpartition("/")[2] == ".gitattributes"]
    for entry in attributes[:_SUBMODULES_NAMED]:
        name = entry.partition("\t")[0].split(" ")[2]
        if b"filter=lfs" in run("cat-file", "blob", name, max_bytes=git.MB, cut=True).out:
            said.append("Files of Git LFS are pointers there, but for those that you have changed since your commit.")
            break
    return tuple(said)


def quoted(path: Path) -> str:
    """A path in a list that colons separate."""
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
