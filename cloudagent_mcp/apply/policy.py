"""Which changes may be written to a working tree at all, and which only when the user has named them.

git keeps paths inside the tree; what a path *means* to the machines and the agents that read it is decided here.
"""

from __future__ import annotations

import functools
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from cloudagent_queue import git
from cloudagent_queue.repository import ChangedFile, Quarantine
from cloudagent_storage.errors import UnsafeChange

FILES_LIMIT = 2_000
TOTAL_LIMIT = 50 * git.MB
FILE_LIMIT = 10 * git.MB

_SYMLINK = "120000"
# As a tree's bytes have it. 100664 is what git itself wrote in its first months.
_TREE_MODES = frozenset({"40000", "100644", "100755", "100664", "120000", "160000"})

# Matched against every folder and file name of a path, without regard to case. A pattern with a slash covers names
# that follow each other.
_EXECUTES = (
    *[".claude", "claude.md", "claude.local.md", "agents.md", "gemini.md", ".mcp.json", ".cursor", ".cursorrules"],
    *[".gemini", ".codex", ".windsurf", ".windsurfrules", ".clinerules", ".roo", ".aider*", ".github/copilot*"],
    *[".kiro", ".amazonq", ".continue", ".junie", ".opencode", "opencode.json*", ".trae", ".augment*", ".goosehints"],
    *[".vscode", ".idea", ".zed", "*.code-workspace", ".devcontainer", ".devcontainer.json", ".gitpod.yml"],
    *[".exrc", ".vimrc", ".nvimrc", ".nvim.lua", ".dir-locals.el", ".gdbinit", ".lldbinit", ".pdbrc", ".pdbrc.py"],
    *[".github/workflows", ".github/actions", ".gitlab-ci.yml", ".gitlab-ci.yaml", ".circleci", ".travis.yml"],
    *["azure-pipelines*.yml", "bitbucket-pipelines.yml", "jenkinsfile", ".drone.yml", ".buildkite", ".woodpecker*"],
    *["appveyor.yml", ".appveyor.yml", ".forgejo", ".gitea"],
    *[".husky", ".githooks", ".pre-commit-config.yaml", "lefthook.y*ml", ".lefthook.y*ml"],
    *[".envrc", ".env", ".env.*", "mise.toml", ".mise.toml", ".mise", ".gitattributes", ".gitmodules", ".gitconfig"],
    *[
        ".npmrc",
        ".yarnrc*",
        ".yarn",
        ".pnpmfile.cjs",
        ".cargo",
        "pip.conf",
        "*.pth",
        "sitecustomize.py",
        "usercustomize.py",
    ],
    # What later tasks run before their agents, reach, and are verified by.
    ".cloudagent.toml",
    # What becomes a command of its user's.
    ".cloudagent/prompts",
)
_ORDINARY_WORK = ("conftest.py", "setup.py", "makefile", "gnumakefile", "package.json")

_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_GIT_SHORT_NAME = re.compile(r"(git|gitmod|gi[0-9a-f]{4}|gi7eba)~[0-9]+", re.IGNORECASE)
# Letters and marks that nobody sees, beside the format characters that are refused anyway.
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
_PATH_LIMIT = 1000
"""Bytes: less than the 1,024 of macOS, whose folder for temporary files is counted, too."""
_SHOWN_LIMIT = 200


def shown(path: str) -> str:
    """A hostile path as it may be shown to a person or a model."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in path)
    return text if len(text) <= _SHOWN_LIMIT else f"{text[:_SHOWN_LIMIT]}…"


def listed(paths: Iterable[str]) -> str:
    """Several of them, the first twenty by name."""
    names = [shown(path) for path in paths]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def is_sensitive(path: str) -> bool:
    """Can a file of this name make a machine, or somebody's agent, execute things without being asked?"""
    return matches(path, _EXECUTES)


def is_notable(file: ChangedFile) -> bool:
    """Ordinary work, but worth a look: a file that builds and tests run by themselves, or that becomes executable."""
    return matches(file.path, _ORDINARY_WORK) or (file.new_mode == "100755" and file.old_mode != "100755")


def check_changes(quarantine: Quarantine, files: Sequence[ChangedFile]) -> None:
    """Raises `UnsafeChange`, naming the path, for a change that is never written."""
    for file in files:
        check_path(file.path)
    _check_tree_modes(quarantine)
    for file in files:
        if "160000" in (file.new_mode, file.old_mode):
            raise unsafe(file.path, "is a submodule")
    _check_limits(quarantine, files)
    quarantine.check_objects()
    modes = _modes(quarantine)
    _check_collisions([file.path for file in files if file.old_mode == "000000"], modes)
    links = [file for file in files if file.new_mode == _SYMLINK]
    targets = quarantine.contents(file.new_id for file in links)
    for file in links:
        _check_link(file.path, targets[file.new_id], modes)


@functools.lru_cache(maxsize=100_000)
def folded(name: str) -> str:
    """What a file system that ignores case, composition and invisible characters makes of a name."""
    visible = "".join(c for c in _UNSEEN.sub("", name) if unicodedata.category(c) != "Cf")
    return unicodedata.normalize("NFC", visible.casefold())


def link_goal(path: str, target: str) -> str | None:
    """Where a symlink leads, as a path in the tree; None when it leads out of it or into .git, or may do so one day.

    A way up is a way up from the symlink's own folder. After any other name it is one from wherever that leads, once it
    is a symlink itself.
    """
    if not target or target.startswith("/") or any(odd in target for odd in "\0\\:"):
        return None
    parts = list(PurePosixPath(path).parts[:-1])
    descended = False
    for part in target.split("/"):
        if part == "..":
            if not parts or descended:
                return None
            parts.pop()
        elif part not in ("", "."):
            if _is_git_folder(part):
                return None
            parts.append(part)
            descended = True
    return "/".join(parts)


def check_path(path: str) -> None:
    """Raises `UnsafeChange` for a path that leads out of a tree, into git's folder, or elsewhere on other systems."""
    if path.startswith("/"):
        raise unsafe(path, "is no path in the tree")
    if len(path.encode("utf-8", "surrogateescape")) > _PATH_LIMIT:
        raise unsafe(path, "has a path that is too long")
    for part in path.split("/"):
        if part in ("", ".", ".."):
            raise unsafe(path, "leads out of the tree")
        if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in part):
            raise unsafe(path, "has invisible characters in its name, or is no Unicode")
        if _is_git_folder(part):
            raise unsafe(path, "lies in git's own folder")
        if ":" in part or "\\" in part or part.endswith((".", " ")) or _RESERVED.fullmatch(part):
            raise unsafe(path, "has a name that other systems read as something else")
        if len(part.encode()) > 255:
            raise unsafe(path, "has a name that is too long")


def _is_git_folder(part: str) -> bool:
    name = folded(part).rstrip(". ").partition(":")[0]
    return name == ".git" or bool(_GIT_SHORT_NAME.fullmatch(name))


def _check_tree_modes(quarantine: Quarantine) -> None:
    # git reads every mode as one of its own, so a setuid bit can only be seen in a tree's bytes.
    out = quarantine.run("diff-tree", "-r", "-t", "-z", "--raw", "--no-renames", quarantine.base, quarantine.head).out
    fields = iter(out.decode("utf-8", "surrogateescape").split("\0")[:-1])
    changed = ((path, about.split(" ")) for about, path in zip(fields, fields, strict=True))
    folders = {path: name for path, (_, mode, _, name, _) in changed if mode == "040000"}
    folders[""] = quarantine.run("rev-parse", f"{quarantine.head}^{{tree}}").text
    trees = quarantine.contents(folders.values())
    id_length = len(quarantine.head) // 2
    for path, tree in folders.items():
        data = trees[tree]
        while data:
            head, _, rest = data.partition(b"\0")
            mode, _, name = head.partition(b" ")
            if mode.decode("ascii", "replace") not in _TREE_MODES:
                raise unsafe(posixpath.join(path, name.decode("utf-8", "surrogateescape")), "is no ordinary file")
            data = rest[id_length:]


def _check_limits(quarantine: Quarantine, files: Sequence[ChangedFile]) -> None:
    if len(files) > FILES_LIMIT:
        raise UnsafeChange(f"The result changes {len(files)} files; the limit is {FILES_LIMIT}. Nothing was written.")
    written = [file for file in files if file.new_mode != "000000"]
    sizes = quarantine.sizes([file.new_id for file in written])
    for file in written:
        if sizes[file.new_id] > FILE_LIMIT:
            size = f"has {sizes[file.new_id] // git.MB} MB, and the limit is {FILE_LIMIT // git.MB} MB"
            raise unsafe(file.path, size)
    total = sum(sizes[file.new_id] for file in written)
    if total > TOTAL_LIMIT:
        raise UnsafeChange(
            f"The result's files add up to {total // git.MB} MB; the limit is {TOTAL_LIMIT // git.MB} MB. "
            "Nothing was written."
        )


def _modes(quarantine: Quarantine) -> dict[str, str]:
    """Every path of the result, and its mode."""
    out = quarantine.run("ls-tree", "-r", "-z", quarantine.head).out.decode("utf-8", "surrogateescape")
    entries = (entry.split("\t", 1) for entry in out.split("\0")[:-1])
    return {path: about.split(" ")[0] for about, path in entries}


def _check_collisions(added: Sequence[str], modes: Mapping[str, str]) -> None:
    names: dict[str, set[str]] = {}
    for path in modes:
        for name in _prefixes(path):
            names.setdefault(folded(name), set()).add(name)
    for path in added:
        if any(len(names[folded(name)]) > 1 for name in _prefixes(path)):
            raise unsafe(path, "differs from another name only in case or invisibly")


def _check_link(path: str, target: bytes, modes: Mapping[str, str]) -> None:
    goal = link_goal(path, target.decode("utf-8", "surrogateescape")) if len(target) <= 4096 else None
    if goal is None:
        raise unsafe(path, "is a symlink that leads out of the tree")
    if any(modes.get(name) == _SYMLINK for name in _prefixes(goal)):
        raise unsafe(path, "is a symlink that leads through another one")


def _prefixes(path: str) -> list[str]:
    """The path and the folders above it."""
    parts = path.split("/")
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Does a name, or several that follow each other, fit one of these?"""
    return _any_of(patterns).search(f"/{folded(path)}/") is not None


@functools.cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Matches between the slashes of a path that has one before and behind each name."""
    names = (re.escape(pattern).replace(r"\*", "[^/]*") for pattern in patterns)
    return re.compile(f"/(?:{'|'.join(names)})/", re.DOTALL)


def unsafe(path: str, what: str) -> UnsafeChange:
    """The refusal of a result because of one path in it."""
    return UnsafeChange(f"{shown(path)} {what}. Nothing was written.", files=[(shown(path), what)])
