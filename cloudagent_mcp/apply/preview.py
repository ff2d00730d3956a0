"""What an apply would do, told before it is done: in numbers, in dangers, and as a token that binds it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from cloudagent_mcp.apply.journal import Step
from cloudagent_mcp.apply.outcome import AppliedFile, Danger, Onto, Totals
from cloudagent_mcp.apply.policy import is_notable, is_sensitive, matches, shown
from cloudagent_mcp.apply.tree import File
from cloudagent_queue import git
from cloudagent_queue.repository import ChangedFile, Quarantine

LARGE_BINARY = git.MB
_LINK = "120000"

# The first that fits says why; what is sensitive and fits none is told in general words.
_REASONS: Sequence[tuple[str, tuple[str, ...]]] = (
    (
        "runs on `git commit` and other commands of git",
        (".husky", ".githooks", ".pre-commit-config.yaml", "lefthook.y*ml", ".lefthook.y*ml"),
    ),
    (
        "a CI workflow: runs on the CI's machines, with its secrets",
        (
            *(".github/workflows", ".github/actions", ".gitlab-ci.y*ml", ".circleci", ".travis.yml", ".drone.yml"),
            *("azure-pipelines*.yml", "bitbucket-pipelines.yml", "jenkinsfile", ".buildkite", ".woodpecker*"),
            *("appveyor.yml", ".appveyor.yml", ".forgejo", ".gitea"),
        ),
    ),
    ("an editor may run it when the folder is opened", (".vscode", ".idea", "*.code-workspace", ".devcontainer*")),
    (
        "instructs or configures agents that work in this folder",
        (
            *(".claude", "claude.md", "claude.local.md", "agents.md", "gemini.md", ".mcp.json", ".cursor*"),
            *(".gemini", ".codex", ".windsurf*", ".clinerules", ".roo", ".aider*", ".github/copilot*"),
        ),
    ),
    ("runs when a shell enters the folder", (".envrc", "mise.toml", ".mise.toml", ".mise")),
    ("sets variables that programs take over", (".env", ".env.*")),
    ("changes how git treats files, or where it fetches from", (".gitattributes", ".gitmodules", ".gitconfig")),
    ("changes where packages are installed from", (".npmrc", ".yarnrc*", "pip.conf")),
    ("runs at every start of Python", ("*.pth", "sitecustomize.py", "usercustomize.py")),
    ("is run by later tasks, or becomes a command of yours", (".cloudagent.toml", ".cloudagent/prompts")),
    ("runs with the tests", ("conftest.py",)),
    ("runs when it is built or installed", ("setup.py",)),
    ("runs with `make`", ("makefile", "gnumakefile")),
    ("its scripts run with npm, some by installing", ("package.json",)),
)


def files_of(
    quarantine: Quarantine, changes: Sequence[ChangedFile], *, merged: Iterable[str] = ()
) -> tuple[AppliedFile, ...]:
    """The files of a result; `changes` are the same without renames, `merged` those that are merged here."""
    sensitive = {file.path for file in changes if is_sensitive(file.path) or is_notable(file)}
    mixed = set(merged)
    return tuple(
        AppliedFile.model_validate(
            {
                "path": file.path,
                "change": file.status,
                "sensitive": bool({file.path, file.old_path} & sensitive),
                "insertions": file.insertions,
                "deletions": file.deletions,
                "binary": file.binary,
                "executable": _becomes_executable(file),
                "merged": file.path in mixed,
            }
        )
        for file in quarantine.changed_files(renames=True)
    )


def totals_of(files: Sequence[AppliedFile]) -> Totals:
    return Totals(
        files=len(files),
        insertions=sum(file.insertions for file in files),
        deletions=sum(file.deletions for file in files),
        binary=sum(file.binary for file in files),
        merged=sum(file.merged for file in files),
    )


def why_sensitive(path: str) -> str:
    """Why a file of that name needs to be named before it is written."""
    return _reason(path) or "can make a machine execute things"


def dangers_of(
    quarantine: Quarantine, changes: Sequence[ChangedFile], *, binary: Container[str], earlier: Sequence[str] = ()
) -> tuple[Danger, ...]:
    """What somebody should know, those first that need to be named. `binary` ones are told by git; `earlier` are
    sensitive files that only commits before the last one have."""
    large = [file for file in changes if file.path in binary and file.new_mode not in ("000000", _LINK)]
    sizes = quarantine.sizes([file.new_id for file in large])
    found: list[tuple[int, Danger]] = [
        (0, Danger(path=path, why=f"{why_sensitive(path)}; in an earlier commit of the branch")) for path in earlier
    ]
    for file in changes:
        reasons: list[str] = []
        if is_sensitive(file.path):
            reasons.append(why_sensitive(file.path))
        elif (why := _reason(file.path)) is not None:
            reasons.append(why)
        if _becomes_executable(file):
            reasons.append("becomes executable")
        if file.new_mode == _LINK:
            target = quarantine.run("cat-file", "blob", file.new_id).out.decode("utf-8", "surrogateescape")
            reasons.append(f"a symlink to {shown(target)}")
        if file.status == "deleted":
            reasons.append("deletes the file")
        size = sizes.get(file.new_id, 0)
        if file in large and size > LARGE_BINARY:
            reasons.append(f"a large binary of {size / git.MB:.1f} MB")
        if reasons:
            found.append((0 if is_sensitive(file.path) else 1, Danger(path=file.path, why="; ".join(reasons))))
    return tuple(danger for _, danger in sorted(found, key=lambda one: one[0]))


def token_of(
    *,
    task_id: str,
    top: Path,
    onto: Onto,
    fingerprint: str,
    steps: Sequence[Step] = (),
    bound: Sequence[str] = (),
) -> str:
    """The same as long as exactly the same would be done: to the same place, from the same, with the same outcome.

    It is no secret and allows nothing: whoever has it has only said what they mean. `bound` says what a branch is to
    be called and to hold.
    """
    about = {
        "version": 1,
        "task": task_id,
        "top": str(top),
        "onto": onto,
        "result": fingerprint,
        "steps": [[step.path, _digest(step.before), _digest(step.after)] for step in steps],
        "bound": list(bound),
    }
    return f"pv_{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:40]}"


def _reason(path: str) -> str | None:
    return next((why for why, patterns in _REASONS if matches(path, patterns)), None)


def _digest(file: File | None) -> list[object] | None:
    if file is None:
        return None
    return [hashlib.sha256(file.data).hexdigest(), file.mode, file.link]


def _becomes_executable(file: ChangedFile) -> bool:
    return file.new_mode == "100755" and file.old_mode != "100755"
