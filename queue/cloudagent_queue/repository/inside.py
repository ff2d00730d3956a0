"""What git has to do INSIDE a sandbox: `inside.py check_out|restore|collect|clone`, its request in run/git.json.

It runs alone there, with nothing but the standard library. The repository may be hostile by the time that it runs, and
then harms only its own sandbox; but what an honest agent has done must come out, whatever state it left git in.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

NOTHING = 3
"""The exit code that says: there is no change."""
FILE_LIMIT = 50 * 1024 * 1024
"""A larger file that is not committed yet is left out, and said so."""
OFF = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.splitIndex": "false",
    "commit.gpgSign": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "advice.addEmbeddedRepo": "false",
}

RUN = Path(__file__).resolve().parent
ROOT = RUN.parent


class Failed(Exception):
    """git ended with an error."""


def git(*arguments: str, env: dict[str, str] | None = None, stdin: bytes = b"", ok: tuple[int, ...] = (0,)) -> bytes:
    """Run git at the root, without the agent's own configuration."""
    options = [part for key, value in OFF.items() for part in ("-c", f"{key}={value}")]
    # The sandbox's own environment: this file knows no settings.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}  # noqa: TID251
    environment |= {"LC_ALL": "C.UTF-8", "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null"}
    environment |= {"GIT_TERMINAL_PROMPT": "0", "GIT_NO_REPLACE_OBJECTS": "1", "GIT_LFS_SKIP_SMUDGE": "1"}
    for role in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{role}_NAME": "cloudagent", f"GIT_{role}_EMAIL": "cloudagent@localhost"}
    command = ["git", *options, *arguments]
    done = subprocess.run(command, input=stdin, stdout=subprocess.PIPE, cwd=ROOT, env=environment | (env or {}))
    if done.returncode not in ok:
        raise Failed(f"git {arguments[0]}: exit code {done.returncode}")
    return done.stdout


def word(output: bytes) -> str:
    return output.decode().strip()


def names(output: bytes) -> list[str]:
    return [os.fsdecode(name) for name in output.split(b"\0") if name]


def check_out(request: dict[str, Any]) -> int:
    """The base in a fresh repository, on the task's branch."""
    if request["keep_files"] and (ROOT / "repository" / ".git").is_dir():
        for name in names(git("-C", "repository", "ls-files", "-z")):
            remove(ROOT / "repository" / name)
            for folder in Path(name).parents[:-1]:
                with contextlib.suppress(OSError):  # something else is in it
                    (ROOT / "repository" / folder).rmdir()
        remove(ROOT / "repository" / ".git")
    else:
        remove(ROOT / "repository")
    make("repository", request, bundles=["input.bundle"])
    inside = ("-C", "repository")
    for name, value in (("user.name", "cloudagent"), ("user.email", "cloudagent@localhost")):
        if not git(*inside, "config", name, ok=(0, 1)):
            git(*inside, "config", name, value)
    git(*inside, "update-ref", "refs/cloudagent/base", request["base"])
    git(*inside, "reset", "--quiet", "--hard", request["base"])
    return 0


def restore(request: dict[str, Any]) -> int:
    """A checkpoint in the repository that was just checked out: its commits, and as changes what was not committed."""
    inside = ("-C", "repository")
    git(*inside, "bundle", "unbundle", str(RUN / "checkpoint.bundle"))
    git(*inside, "reset", "--quiet", "--hard", request["tip"])
    if word(git(*inside, "log", "-1", "--format=%s")) == request["message"]:
        git(*inside, "reset", "--quiet", "--mixed", "HEAD~1")
    return 0


def clone(request: dict[str, Any]) -> int:
    """The result in a fresh repository that knows nothing of the agent's, and an empty home beside it."""
    remove(ROOT / "verify")
    make("verify", request, bundles=["verify-input.bundle", *(["verify-result.bundle"] if request["result"] else [])])
    git("-C", "verify", "checkout", "--quiet", "--detach", request["tip"])
    remove(ROOT / "verify-home")
    (ROOT / "verify-home").mkdir()
    return 0


def make(folder: str, request: dict[str, Any], *, bundles: list[str]) -> None:
    form = f"--object-format={request['object_format']}"
    git("init", "--quiet", form, f"--initial-branch={request['branch']}", folder)
    for bundle in bundles:
        git("-C", folder, "bundle", "unbundle", str(RUN / bundle))


def collect(request: dict[str, Any]) -> int:
    """All that the agent did as run/out.bundle: its own commits, and one more with what it left uncommitted."""
    (RUN / "out.bundle").unlink(missing_ok=True)
    try:
        return Collection(request, history=True).save()
    except (Failed, OSError) as error:
        # Its repository is gone or broken: then at least the files as they are now, on top of the base.
        print(f"The agent's repository cannot be used ({error}).", file=sys.stderr)
        return Collection(request, history=False).save()


class Collection:
    """The agent's working tree, seen through a bare repository of our own, so that nothing of its own is in the way:
    no lock that a killed git left behind, no merge half done, no setting."""

    def __init__(self, request: dict[str, Any], *, history: bool) -> None:
        self.base: str = request["base"]
        self.request = request
        self.work = ROOT / "repository"
        self.store = RUN / "out.git"
        self.notes: list[str] = []
        index = self.store / "index"
        self.env = {"GIT_DIR": str(self.store), "GIT_WORK_TREE": str(self.work), "GIT_INDEX_FILE": str(index)}
        self.work.mkdir(exist_ok=True)
        remove(self.store)
        git("init", "--quiet", "--bare", f"--object-format={request['object_format']}", str(self.store))
        if history:
            agents = self.work / ".git"
            self.head = word(git(f"--git-dir={agents}", "rev-parse", "--verify", "HEAD^{commit}"))
            (self.store / "objects" / "info" / "alternates").write_text(f"{agents / 'objects'}\n")
            self.git("rev-list", "--objects", "--quiet", self.head, "--not", self.base)
            for name in ("index", "info/exclude"):
                if (agents / name).is_file():
                    shutil.copy2(agents / name, self.store / name)
        else:
            git("bundle", "unbundle", str(RUN / "input.bundle"), env=self.env)
            self.head = self.base
        try:
            known = index.exists() and self.git("ls-files", "--stage")
        except Failed:
            known = False
        if not known:
            index.unlink(missing_ok=True)
            self.git("read-tree", self.head)

    def git(self, *arguments: str, stdin: bytes = b"", ok: tuple[int, ...] = (0,)) -> bytes:
        return git(*arguments, env=self.env, stdin=stdin, ok=ok)

    def save(self) -> int:
        self.stage()
        tree, base_tree = word(self.git("write-tree")), self.tree_of(self.base)
        if self.request["at_work"]:
            (RUN / "changed_files").write_bytes(self.git("diff-tree", "-r", "-z", "--name-only", base_tree, tree))
        if tree == base_tree and not self.notes:
            return NOTHING
        tip = self.head
        on_top = int(self.git("rev-list", "--count", tip, "--not", self.base)) > 0
        if tree != self.tree_of(tip) or not on_top or self.notes:
            message = "\n\n".join([self.request["message"], *self.notes])
            parent = tip if on_top else self.base
            tip = word(self.git("commit-tree", tree, "-p", parent, stdin=message.encode("utf-8", "replace")))
        ref = f"refs/heads/{self.request['branch']}"
        self.git("update-ref", ref, tip)
        self.git("bundle", "create", "--quiet", str(RUN / "out.bundle"), ref, f"^{self.base}")
        return 0

    def stage(self) -> None:
        """Take every file that is not ignored into the index."""
        left_out = self.take_nested_repositories()
        for name in {*self.list("--others"), *self.list("--modified")}:
            path = self.work / name
            if not path.is_symlink() and path.is_file() and path.stat().st_size > FILE_LIMIT:
                left_out.append(name)
                self.notes.append(f"Left out, since it is larger than {FILE_LIMIT // 1024**2} MB: {name}")
        left_out += self.submodules_of(self.base)
        pathspec = "\0".join([".", *(f":(top,exclude,literal){name}" for name in left_out)])
        options = ["--all", "--ignore-errors", "--pathspec-from-file=-", "--pathspec-file-nul"]
        self.git("add", *options, stdin=os.fsencode(pathspec), ok=(0, 1))

    def take_nested_repositories(self) -> list[str]:
        """Make plain files of repositories that the agent created or cloned inside this one: git would keep only the id
        of a commit that exists nowhere else. What cannot be taken is returned."""
        left_out: set[str] = set()
        known = self.submodules_of(self.base)
        staged = self.submodules_of(None)
        for name in staged:
            if known.get(name) == staged[name]:
                continue
            if name in known:
                self.git("update-index", "--cacheinfo", f"160000,{known[name]},{name}")
                self.notes.append(f"Changes in a submodule are not part of this: {name}")
            else:
                self.git("update-index", "--force-remove", "-z", "--stdin", stdin=os.fsencode(name))
        while nested := {name for name in self.list("--others") if name.endswith("/")} - left_out:
            for name in nested:
                inner = self.work / name / ".git"
                if self.request["at_work"]:
                    left_out.add(name)
                elif inner.is_dir() and not inner.is_symlink():
                    aside = RUN / "nested"
                    aside.mkdir(exist_ok=True)
                    inner.rename(aside / str(len(list(aside.iterdir()))))
                    self.notes.append(f"Its files are here, the history of a nested repository is not: {name}")
                else:
                    left_out.add(name)
                    self.notes.append(f"Left out, since it is another working tree: {name}")
        return sorted(left_out)

    def list(self, kind: str) -> list[str]:
        return names(self.git("ls-files", kind, "--exclude-standard", "-z"))

    def submodules_of(self, commit: str | None) -> dict[str, str]:
        """Submodules and the commits that they are at, in a commit or, without one, in the index."""
        listing = self.git("ls-files", "--stage", "-z") if commit is None else self.git("ls-tree", "-r", "-z", commit)
        entries = (entry.split("\t", 1) for entry in names(listing) if entry.startswith("160000 "))
        return {name: about.split(" ")[1 if commit is None else 2] for about, name in entries}

    def tree_of(self, commit: str) -> str:
        return word(self.git("rev-parse", f"{commit}^{{tree}}"))


def remove(path: Path) -> None:
    """Delete whatever is there, also what its owner may not write to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        subprocess.run(["chmod", "-R", "u+rwX", str(path)], stderr=subprocess.DEVNULL)
        shutil.rmtree(path)


if __name__ == "__main__":
    action = {"check_out": check_out, "restore": restore, "collect": collect, "clone": clone}[sys.argv[1]]
    sys.exit(action(json.loads((RUN / "git.json").read_bytes())))
