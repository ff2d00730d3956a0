"""`ca task`: tasks, for people."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cloudagent_mcp.cli_shared import EXIT_FAILED, as_json, client, given, print_answer, task_options

if TYPE_CHECKING:
    from cloudagent_mcp.client import Client

task_id = click.argument("task_id", metavar="TASK")
candidate = click.option("--candidate", type=click.IntRange(1), metavar="K", help="Which candidate. Default: the best.")


@click.group()
def task() -> None:
    """Create, watch and apply tasks. A task is named by its id, or by any beginning of it that is unique."""


@task.command()
@click.argument("prompt")
@task_options
@click.option("--continue", "continue_task_id", metavar="TASK", help="Go on from this ended task: branch and talk.")
@click.option(
    "--session",
    metavar="current|ID",
    help="Take this conversation of your own Claude Code along: the one that you are in, or by its id.",
)
@click.option(
    "--allow-secret",
    "allow_secrets",
    multiple=True,
    metavar="FILE",
    help="Take a file along that looks like a secret. What .gitignore names stays at home anyway.",
)
@click.option("--idempotency-key", help="Repeating the command with the same key is still one task.")
@click.option(
    "--send-credentials",
    is_flag=True,
    help="Give the server that CLOUDAGENT_URL names your environment's ANTHROPIC_API_KEY and GH_TOKEN or GITHUB_TOKEN.",
)
@click.option("--watch", is_flag=True, help="Then watch it to its end.")
@as_json
def create(
    prompt: str, tags: tuple[str, ...], send_credentials: bool, watch: bool, as_json: bool, **options: Any
) -> None:
    """Submit a task. PROMPT is what the agent should do; - reads it from standard input."""
    if prompt == "-":
        prompt = sys.stdin.read()
    from cloudagent_mcp.settings import Settings

    arguments = given(options)
    if "session" in arguments:
        from cloudagent_mcp.session_home import take_along

        environment = Settings.read().environment
        arguments["session"] = take_along(arguments["session"], directory=Path.cwd(), environment=environment)
    if send_credentials:
        from cloudagent_mcp.operations.credentials import arguments_of

        arguments |= arguments_of(Settings.read().environment)
    with client() as api:
        if "continue_task_id" in arguments:
            arguments["continue_task_id"] = api.resolve(arguments["continue_task_id"])
        created = api.call("submit_task", prompt=prompt, tags=list(tags), **arguments)
        if as_json and not watch:
            click.echo(json.dumps(created))
            return
        if not as_json:
            from cloudagent_mcp.render import show_created

            show_created(created, hint=not watch)
        if watch:
            sys.exit(_watch(api, created["task_id"], as_json))


@task.command("list")
@click.option("--status", type=click.Choice(["queued", "running", "waiting", "completed", "failed", "cancelled"]))
@click.option("--repository")
@click.option("--tag")
@click.option("--schedule", "schedule_id", help="Only those that this schedule submitted.")
@click.option("--candidates", is_flag=True, default=None, help="With the candidates of other tasks.")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True)
@click.option("--cursor", help="next_cursor of the list before.")
@as_json
def list_tasks(as_json: bool, **options: Any) -> None:
    """List tasks, newest first."""
    with client() as api:
        if options["schedule_id"]:
            from cloudagent_mcp.client import resolve_schedule

            options["schedule_id"] = resolve_schedule(api, options["schedule_id"])
        page = api.call("list_tasks", **given(options))
    print_answer(page, as_json, "show_list")


@task.command()
@click.argument("task_ids", metavar="TASK...", nargs=-1, required=True)
@as_json
def show(task_ids: tuple[str, ...], as_json: bool) -> None:
    """Show tasks: status, result, cost, last log lines."""
    _for_each("get_task", task_ids, as_json, "show_task")


@task.command()
@task_id
@click.option("--after", type=click.IntRange(0), default=0, help="Show what follows this line.")
@click.option("--limit", type=click.IntRange(1), help="At most so many lines.")
@click.option("--level", type=click.Choice(["debug", "info", "warning", "error"]), help="The lowest level to show.")
@click.option("--kind", "kinds", multiple=True, help="Only this kind; may be given several times.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the task ends.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document a line.")
def logs(
    task_id: str, after: int, limit: int | None, level: str | None, kinds: tuple[str, ...], follow: bool, as_json: bool
) -> None:
    """Show a task's log."""
    from cloudagent_mcp.client import log_lines
    from cloudagent_mcp.render import show_line

    with client() as api:
        name = api.resolve(task_id)
        for count, line in enumerate(log_lines(api, name, after=after, level=level, kinds=kinds, follow=follow), 1):
            if as_json:
                click.echo(json.dumps(line))
            else:
                show_line(line)
            if count == limit:
                return


@task.command()
@task_id
@as_json
def watch(task_id: str, as_json: bool) -> None:
    """Watch a task to its end. Ctrl-C stops the watching, not the task."""
    with client() as api:
        sys.exit(_watch(api, api.resolve(task_id), as_json))


@task.command()
@click.argument("task_ids", metavar="TASK...", nargs=-1, required=True)
@click.option("--any", "any_", is_flag=True, help="Until one of them has ended, not all.")
@click.option("--timeout", type=click.FloatRange(0), help="Seconds; then exit with 1.")
@as_json
def wait(task_ids: tuple[str, ...], any_: bool, timeout: float | None, as_json: bool) -> None:
    """Wait until tasks have ended. Exit 0 when all that ended completed and no verdict failed."""
    import time

    with client() as api:
        names = [api.resolve(name) for name in task_ids]
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = 50.0 if deadline is None else max(0.0, min(50.0, deadline - time.monotonic()))
            found = api.call("wait_tasks", task_ids=names, mode="any" if any_ else "all", timeout_seconds=left)
            if found["finished"] or (deadline is not None and time.monotonic() >= deadline):
                break
    print_answer(found, as_json, "show_list")
    ended = [task for task in found["tasks"] if task["completed_at"]]
    sys.exit(max((exit_code(task) for task in ended), default=0) if found["finished"] else EXIT_FAILED)


@task.command()
@task_id
@click.option("--path", help="Only this file, or this folder.")
@click.option("--stat", "stat_only", is_flag=True, help="Only the list of files.")
@click.option("--lines", "numbered", is_flag=True, help="With the numbers by which `ca task comment` names lines.")
@candidate
@as_json
def diff(task_id: str, path: str | None, stat_only: bool, numbered: bool, candidate: int | None, as_json: bool) -> None:
    """Show what a task changed. In a pipe it is a patch."""
    wanted = {"path": path, "stat_only": stat_only, **given({"candidate": candidate})}
    with client() as api:
        found = api.call("get_task_diff", task_id=api.resolve(task_id), **wanted)
    print_answer(found, as_json, "show_numbered" if numbered and not stat_only else "show_diff")


@task.command()
@task_id
@click.argument("comments", metavar="FILE[:LINE] TEXT...", nargs=-1, required=True)
@click.option("--message", help="What to say of all of it.")
@click.option("--watch", is_flag=True, help="Then watch the task that has the comments to its end.")
@as_json
def comment(task_id: str, comments: tuple[str, ...], message: str | None, watch: bool, as_json: bool) -> None:
    """Comment on lines of a task's diff, for its agent to mend; once it has ended, a follow-up task does.

    LINE is a number in the new file, or -N for line N of the old one that was deleted; `ca task diff --lines` shows
    them. After each FILE:LINE stands its TEXT; one that is - is read from standard input. A file whose own name has a
    colon is written with one more at its end.
    """
    said = [_comment(spec, text) for spec, text in _pairs(comments)]
    with client() as api:
        done = api.call("comment_task", task_id=api.resolve(task_id), comments=said, message=message)
        if not watch:
            print_answer(done, as_json, "show_commented")
            return
        if not as_json:
            from cloudagent_mcp.render import show_commented

            show_commented(done, hint=False)
        sys.exit(_watch(api, done["task_id"], as_json))


def _pairs(words: tuple[str, ...]) -> list[tuple[str, str]]:
    if len(words) % 2:
        raise click.UsageError(f'After "{words[-1]}" its text is missing. Write FILE:LINE "TEXT" for each comment.')
    pairs = list(zip(words[::2], words[1::2], strict=True))
    if [text for _, text in pairs].count("-") > 1:
        raise click.UsageError("Only one text can be read from standard input.")
    return pairs


def _comment(spec: str, text: str) -> dict[str, Any]:
    file, colon, line = spec.rpartition(":")
    if not colon:
        file, line = spec, ""
    if not file or not re.fullmatch(r"|-?[1-9][0-9]{0,6}", line):
        raise click.UsageError(
            f'"{spec}" is not FILE, FILE:LINE or FILE:-LINE. Write each comment as FILE:LINE "TEXT", such as '
            'calc.py:12 "use sum()".'
        )
    comment: dict[str, Any] = {"file": file, "text": sys.stdin.read() if text == "-" else text}
    return {**comment, "line": int(line)} if line else comment


directory = click.option(
    "--directory", type=click.Path(path_type=Path), help="The working tree. Default: where you are."
)


onto = (
    click.option(
        "--branch",
        metavar="[NAME]",
        is_flag=False,
        flag_value="",
        help="As a branch (the task's, or NAME); your files stay as they are.",
    ),
    click.option(
        "--worktree",
        metavar="[PATH]",
        is_flag=False,
        flag_value="",
        help="As a branch that is checked out in a new worktree, beside the repository or at PATH.",
    ),
)


def places(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(onto):
        command = option(command)
    return command


@task.command("apply")
@click.argument("task_ids", metavar="TASK...", nargs=-1, required=True)
@directory
@click.option("--dry-run", is_flag=True, help="Only say what would be written.")
@click.option("--preview", metavar="TOKEN", help="Write what the dry run of that token showed, or nothing.")
@places
@click.option("--squash", is_flag=True, help="As one commit of that branch.")
@click.option("--allow-sensitive", multiple=True, metavar="FILE", help="A file that can make a machine execute things.")
@candidate
@as_json
def apply_(
    task_ids: tuple[str, ...],
    directory: Path | None,
    branch: str | None,
    worktree: str | None,
    allow_sensitive: tuple[str, ...],
    candidate: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a task's changes into a working tree: all or nothing, with a backup; or onto a branch of their own.

    Several are applied in order, each verified again on top of those before it, and taken back if that fails.
    """
    arguments = {"allow_sensitive": list(allow_sensitive), **_directory(directory)}
    where, first, more = _onto(branch, worktree), task_ids[0], task_ids[1:]
    if more:
        if where or any(options.values()):
            raise click.UsageError(
                "Several are applied to the files alone, and what comes of one is only known once the former is."
            )
        if candidate is not None:
            raise click.UsageError("Of several tasks, name candidates by their own ids.")
        sys.exit(_apply_in_order(task_ids, arguments, as_json))
    with client() as api:
        done = api.apply(api.resolve(first), **options, **where, **arguments, **given({"candidate": candidate}))
    print_answer(done, as_json, "show_applied")


def _apply_in_order(task_ids: tuple[str, ...], arguments: dict[str, Any], as_json: bool) -> int:
    with client() as api:
        names = [api.resolve(name) for name in task_ids]
        while not (done := api.apply_in_order(names, **arguments))["finished"]:
            pass  # it has waited for most of a minute
    print_answer(done, as_json, "show_applied_in_order")
    return EXIT_FAILED if any(step["outcome"] == "undone" for step in done["steps"]) else 0


@task.command()
@task_id
@directory
@places
@as_json
def undo(task_id: str, directory: Path | None, branch: str | None, worktree: str | None, as_json: bool) -> None:
    """Take an applied result back, exactly. Of several, the one that was applied last."""
    with client() as api:
        done = api.apply(api.resolve(task_id), undo=True, **_onto(branch, worktree), **_directory(directory))
    print_answer(done, as_json, "show_applied")


@task.command()
@task_id
@directory
@click.option("--run", is_flag=True, help="Start `claude` with it at once.")
@candidate
@as_json
def resume(task_id: str, directory: Path | None, run: bool, candidate: int | None, as_json: bool) -> None:
    """Bring a task's conversation home, to go on with it in Claude Code on this machine."""
    with client() as api:
        done = api.resume(api.resolve(task_id), (directory or Path()).absolute(), candidate)
    if run and not as_json:
        import os

        try:
            os.chdir(done["directory"])
            os.execvp("claude", ["claude", "--resume", done["session_id"]])
        except OSError:
            click.echo("`claude` is not to be found here; type this where it is:", err=True)
    print_answer(done, as_json, "show_resumed")


@task.command()
@task_id
@click.argument("message")
@click.option("--question", "question_id", metavar="ID", help="Only as the answer to this question: safe to repeat.")
@as_json
def send(task_id: str, message: str, question_id: str | None, as_json: bool) -> None:
    """Answer a task's question, or tell its agent something. MESSAGE - is read from standard input."""
    if message == "-":
        message = sys.stdin.read()
    with client() as api:
        told = api.call("send_message", task_id=api.resolve(task_id), message=message, question_id=question_id)
    print_answer(told, as_json, "show_sent")


@task.command()
@as_json
def questions(as_json: bool) -> None:
    """List what the agents of waiting tasks ask you."""
    with client() as api:
        print_answer(api.call("list_pending_questions"), as_json, "show_questions")


@task.command()
@click.argument("task_ids", metavar="TASK...", nargs=-1, required=True)
@as_json
def cancel(task_ids: tuple[str, ...], as_json: bool) -> None:
    """Stop tasks. What their agents did until then is saved."""
    _for_each("cancel_task", task_ids, as_json, "show_cancelled")


@task.command()
@task_id
@as_json
def retry(task_id: str, as_json: bool) -> None:
    """Try a task that has ended once more, as a new task."""
    with client() as api:
        created = api.call("retry_task", task_id=api.resolve(task_id))
    print_answer(created, as_json, "show_created")


@task.command()
@task_id
@click.option("--repository", help="Run it on this repository, such as . for what is here. Default: on its result.")
@click.option("--watch", is_flag=True, help="Then watch it to its end.")
@as_json
def verify(task_id: str, repository: str | None, watch: bool, as_json: bool) -> None:
    """Run the verify command of a task that has ended once more, in a sandbox, as a task without an agent."""
    from cloudagent_mcp.render import show_created

    with client() as api:
        created = api.call("verify_task", task_id=api.resolve(task_id), **given({"repository": repository}))
        if as_json and not watch:
            click.echo(json.dumps(created))
        elif not as_json:
            show_created(created, hint=not watch)
        if watch:
            sys.exit(_watch(api, created["task_id"], as_json))


def _for_each(operation: str, task_ids: tuple[str, ...], as_json: bool, how: str) -> None:
    """Call it for every task; of one, JSON is one answer."""
    with client() as api:
        tasks = [api.call(operation, task_id=api.resolve(name)) for name in task_ids]
    if as_json:
        click.echo(json.dumps(tasks[0] if len(tasks) == 1 else tasks))
        return
    for found in tasks:
        print_answer(found, False, how)


def exit_code(task: dict[str, Any]) -> int:
    """0 when a task has completed and its verdict is not failed."""
    return 0 if task["status"] == "completed" and task["verdict"] != "failed" else EXIT_FAILED


def _watch(api: Client, name: str, as_json: bool) -> int:
    from cloudagent_mcp.render import watch

    return exit_code(watch(api, name, as_json))


def _directory(directory: Path | None) -> dict[str, str]:
    return {} if directory is None else {"directory": str(directory.absolute())}


def _onto(branch: str | None, worktree: str | None) -> dict[str, str]:
    if branch is None and worktree is None:
        return {}
    found = {"onto": "branch" if worktree is None else "worktree"}
    if branch:
        found["branch"] = branch
    if worktree:
        found["path"] = str(Path(worktree).absolute())
    return found
