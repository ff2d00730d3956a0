"""The repository in a sandbox: a bundle in, a bundle out. git runs inside; the host only writes and reads files."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloudagent_queue.agents import REPOSITORY_FOLDER, RUN_FOLDER
from cloudagent_queue.repository.bundles import BASE_BRANCH, BUNDLE_LIMIT, empty_repository, read_header
from cloudagent_queue.repository.inside import NOTHING
from cloudagent_queue.sandboxes import CommandResult, Sandbox
from cloudagent_storage.errors import SandboxError
from cloudagent_storage.records import VerifyResult

VERIFY_FOLDER = "verify"
VERIFY_HOME = "verify-home"
OUTPUT_LIMIT = 8192
"""How much of the end of a command's output is kept, in characters."""
NAMES_LIMIT = 64 * 1024

_INSIDE = Path(__file__).with_name("inside.py")
_GIT_WITHIN_S = 600.0
_AT_WORK_S = 60.0
"""While the agent works, nobody looks whether it is to be stopped."""
WORK_IN_PROGRESS = "Work in progress"
"""The message of the commit that holds what was not committed at a checkpoint."""


def check_out(
    sandbox: Sandbox, *, bundle: bytes | None, base_sha: str | None, branch: str, keep_files: bool = False
) -> str:
    """Put a bundle into the sandbox's `repository/`, on `branch`, and tell the commit that it starts from.

    Without a bundle the repository is empty; without `base_sha` it starts from the bundle's one ref. What was in that
    folder is deleted; with `keep_files` only what git knew there, so that what a set-up has made stays.
    Raises `SandboxError` for a bundle that git does not accept.
    """
    if bundle is None:
        bundle, base_sha = empty_repository()
    object_format, base = _start_of(bundle)
    base_sha = base_sha or base
    sandbox.write(f"{RUN_FOLDER}/input.bundle", bundle)
    _run_inside(
        sandbox,
        "check_out",
        {"base": base_sha, "branch": branch, "object_format": object_format, "keep_files": keep_files},
    )
    return base_sha


def collect(sandbox: Sandbox, *, base_sha: str, branch: str, message: str) -> bytes | None:
    """Everything that the agent did since `check_out` as a bundle of `base..branch`; None when nothing changed.

    The agent's own commits are in it, and one more, with `message`, for what it left uncommitted. The result is what is
    checked out at the end, on whatever branch; with a broken repository it is the files alone. No process of the agent
    may be left. Untrusted: look at it with `inspect`.
    """
    return _collect(sandbox, base_sha=base_sha, branch=branch, message=message, at_work=False)


def _collect(sandbox: Sandbox, *, base_sha: str, branch: str, message: str, at_work: bool) -> bytes | None:
    request = {
        "base": base_sha,
        "branch": branch,
        "message": message,
        "object_format": "sha256" if len(base_sha) == 64 else "sha1",
        "at_work": at_work,
    }
    if _run_inside(sandbox, "collect", request, timeout_s=_AT_WORK_S if at_work else _GIT_WITHIN_S) == NOTHING:
        return None
    bundle = sandbox.read(f"{RUN_FOLDER}/out.bundle", max_bytes=BUNDLE_LIMIT + 1)
    if not bundle:
        raise SandboxError("The sandbox gave no result.")
    if len(bundle) > BUNDLE_LIMIT:
        raise SandboxError("The result is larger than 200 MB.", remedy="Have the agent commit no large files.")
    return bundle


def checkpoint(sandbox: Sandbox, *, base_sha: str, branch: str) -> bytes | None:
    """What `collect` answers, while the agent is at work: nothing of its own is touched. For `restore`."""
    return _collect(sandbox, base_sha=base_sha, branch=branch, message=WORK_IN_PROGRESS, at_work=True)


def changed_files(sandbox: Sandbox) -> list[str]:
    """The files in which the last `checkpoint` differs from the base, as far as 64 kB name them. Untrusted."""
    names = sandbox.read(f"{RUN_FOLDER}/changed_files", max_bytes=NAMES_LIMIT)
    return [name for name in names[: names.rfind(b"\0") + 1].decode("utf-8", "replace").split("\0") if name]


def restore(sandbox: Sandbox, bundle: bytes, *, branch: str) -> None:
    """Bring the repository, after `check_out`, to where a `checkpoint` was taken.

    What was not committed then is not committed now. Untrusted: git looks at the bundle in the sandbox alone.
    """
    try:
        ((tip, _),) = read_header(bundle).refs
    except ValueError as error:
        raise SandboxError("What was kept as a checkpoint is none.") from error
    sandbox.write(f"{RUN_FOLDER}/checkpoint.bundle", bundle)
    _run_inside(sandbox, "restore", {"tip": tip, "branch": branch, "message": WORK_IN_PROGRESS})


def verify(
    sandbox: Sandbox,
    *,
    input_bundle: bytes | None,
    result_bundle: bytes | None,
    base_sha: str | None = None,
    branch: str,
    command: str,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
) -> VerifyResult:
    """Run the user's command in a fresh clone of the result, with a fresh home. Without a result the base is checked.

    `env` is what the repository sets, beside what every command in a sandbox has.
    The bundles are those that were saved, not what lies in the sandbox. No process of the agent may be left. The output
    is all that was kept of it.
    Raises `SandboxError` when it could not be run at all.
    """
    if input_bundle is None:
        input_bundle, _ = empty_repository()
    object_format, base = _start_of(input_bundle)
    tip = base_sha or base
    sandbox.write(f"{RUN_FOLDER}/verify-input.bundle", input_bundle)
    if result_bundle is not None:
        sandbox.write(f"{RUN_FOLDER}/verify-result.bundle", result_bundle)
        ((tip, _),) = read_header(result_bundle).refs
    request = {"tip": tip, "branch": branch, "object_format": object_format, "result": result_bundle is not None}
    _run_inside(sandbox, "clone", request)
    shell, began = ["/bin/sh", "-c", command], time.monotonic()
    done = sandbox.run(shell, timeout_s=timeout_s, env=env, cwd=VERIFY_FOLDER, home=VERIFY_HOME)
    took_s = round(time.monotonic() - began, 1)
    return VerifyResult(command=command, exit_code=done.exit_code, output=done.output, commit=tip, seconds=took_s)


def run_setup(sandbox: Sandbox, command: str, timeout_s: float, env: Mapping[str, str] | None = None) -> CommandResult:
    """Run the set-up command in the agent's working tree, with what the repository sets as `env`."""
    done = sandbox.run(["/bin/sh", "-c", command], timeout_s=timeout_s, env=env, cwd=REPOSITORY_FOLDER)
    return CommandResult(exit_code=done.exit_code, output=done.output[-OUTPUT_LIMIT:])


def _start_of(bundle: bytes) -> tuple[str, str]:
    """The object format of an input bundle, and its one commit."""
    try:
        header = read_header(bundle)
        ((commit, ref),) = header.refs
        if ref != BASE_BRANCH or header.prerequisites:
            raise ValueError("not an input bundle")
    except ValueError as error:
        raise SandboxError("What was to be put into the sandbox is no bundle of a repository.") from error
    return header.object_format, commit


def _run_inside(sandbox: Sandbox, action: str, request: dict[str, Any], *, timeout_s: float = _GIT_WITHIN_S) -> int:
    # Written anew each time: the agent may have changed it. The request goes through a file, since process lists are
    # seen by everyone in the sandbox.
    sandbox.write(f"{RUN_FOLDER}/inside.py", _INSIDE.read_bytes())
    sandbox.write(f"{RUN_FOLDER}/git.json", json.dumps(request).encode())
    script = f"{sandbox.root}/{RUN_FOLDER}/inside.py"
    done = sandbox.run([sandbox.python, "-I", script, action], timeout_s=timeout_s)
    if done.exit_code is None:
        raise SandboxError("git did not end in time in the sandbox.")
    if done.exit_code not in (0, NOTHING):
        why = " ".join(["git failed in the sandbox.", *sandbox.limits_met()])
        raise SandboxError(why, remedy="Is git installed in the sandbox?")
    return done.exit_code
