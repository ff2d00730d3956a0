"""How `ca` shows things to people: colours and tables on a terminal, plain text in a pipe."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from cloudagent_mcp.checked import what_was_checked
from cloudagent_mcp.untrusted import clean, cut, named

if TYPE_CHECKING:
    from cloudagent_mcp.client import Client
    from cloudagent_mcp.doctor import Finding

console = Console(highlight=False, soft_wrap=True)

STATUS_STYLES = {"completed": "green", "failed": "red", "cancelled": "yellow", "running": "cyan", "waiting": "magenta"}
VERDICT_STYLES = {"passed": "green", "failed": "red", "unverified": "dim"}
OUTCOME_STYLES = {"submitted": "green", "skipped": "yellow", "missed": "red"}
KIND_STYLES = {"text": "", "thinking": "dim italic", "tool_use": "cyan", "tool_result": "dim", "error": "red"}
LEVEL_STYLES = {"warning": "yellow", "error": "red"}
LINE_MAX, OUTPUT_SHOWN = 2000, 600


def show_created(task: dict[str, Any], *, hint: bool = True) -> None:
    console.print(f"[bold]{_short(task)}[/] queued: {_safe(task['title'])}")
    if hint:
        console.print(f"[dim]Watch it with[/] ca task watch {_short(task)}")


def show_list(page: dict[str, Any]) -> None:
    """Tasks in a table; in a pipe, tabs between the columns."""
    tasks = page["tasks"]
    if not console.is_terminal:
        for task in tasks:
            columns = (task["task_id"], task["status"], task["verdict"] or "", task["created_at"], task["title"])
            print("\t".join(clean(column).replace("\t", " ").replace("\n", " ") for column in columns))
        return
    if not tasks:
        console.print('No tasks. [dim]Submit one with[/] ca task create "…"')
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("task", "status", "verdict", "created", "title"):
        table.add_column(column, no_wrap=column != "title")
    for task in tasks:
        table.add_row(
            Text(_short(task), "bold"),
            _status(task),
            _verdict(task),
            task["created_at"][:16].replace("T", " "),
            Text(clean(task["title"])),
        )
    console.print(table)
    if page.get("next_cursor"):
        console.print(f"[dim]{page['total']} in all; more with[/] --cursor {page['next_cursor']}")


def show_keys(page: dict[str, Any]) -> None:
    """API keys in a table; in a pipe, tabs between the columns."""
    names = ("key", "account", "ends in", "state", "last used", "name")
    rows = [
        (key["key_id"], key["account_id"], key["hint"], _key_state(key), key["last_used_at"] or "", clean(key["name"]))
        for key in page["keys"]
    ]
    if not console.is_terminal:
        for row in rows:
            print("\t".join(row))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(name, no_wrap=name != "name")
    for key_id, account, hint, state, used, name in rows:
        table.add_row(Text(key_id, "bold"), account, hint, state, used[:16].replace("T", " "), Text(name))
    console.print(table)


def _key_state(key: dict[str, Any]) -> str:
    if key["revoked_at"]:
        return "revoked"
    return f"until {key['expires_at'][:10]}" if key["expires_at"] else "valid"


def show_task(task: dict[str, Any]) -> None:
    """One task, its result and its last log lines."""
    head = Text.assemble((task["task_id"], "bold"), "  ", _status(task))
    if task["phase"]:
        head.append(f" ({task['phase']})")
    if task["verdict"]:
        head.append("  verdict ")
        head.append_text(_verdict(task))
    console.print(head)
    usage = task["usage"]
    result: dict[str, Any] = task["result"] or {}
    artifacts: dict[str, Any] = result.get("artifacts") or {}
    verify: dict[str, Any] | None = result.get("verify")
    cut_short: dict[str, Any] | None = result.get("retry_error")
    rows = {
        "title": task["title"],
        "repository": task["repository"],
        "base": (task["base_sha"] or "")[:12],
        "branch": task["branch"],
        "model": task["model"],
        "changes": _changes(artifacts) if artifacts else None,
        "checked": what_was_checked(task["verdict"], verify) if artifacts.get("files_changed") or verify else None,
        "output": verify["output"][-OUTPUT_SHOWN:].strip() if verify and task["verdict"] == "failed" else None,
        "retry": f"cut short by {cut_short['code']}: {cut_short['message']}" if cut_short else None,
        "cost": f"${usage['cost_usd']:.4f}, {usage['turns']} turns" if usage["turns"] else None,
        "sandbox": _sandbox_cost(usage),
        "error": f"{task['error']['code']}: {task['error']['message']}" if task["error"] else None,
        "summary": cut(result.get("summary"), LINE_MAX),
    }
    for name, value in rows.items():
        if value:
            console.print(f"  [dim]{name:<10}[/] {_safe(str(value))}")
    for overlap in task.get("overlaps") or ():
        files = named(overlap["files"], most=3)
        console.print(f"  [yellow]{'overlap':<10} {_short(overlap)} also changes {_safe(files)}[/]")
    if task.get("asked"):
        show_question(task["question"], task["asked"])
    if place := task.get("queue"):
        when = place["starts_in_seconds"]
        when = "nobody can tell when" if when is None else f"about {_duration(when)} from now" if when else "at once"
        console.print(f"  [dim]{'queue':<10}[/] number {place['position']}, {when}; waits for {place['waiting_for']}")
    if candidates := task.get("candidates"):
        show_candidates(candidates)
    for line in task.get("log") or ():
        console.print(f"  [dim]{_safe(line)}[/]")
    console.print(f"[dim]Next:[/] {_safe(_next(task, artifacts))}")


def show_candidates(candidates: list[dict[str, Any]]) -> None:
    """How the tries at one prompt compare, the best first; in a pipe, tabs between the columns."""
    names = ("rank", "candidate", "task", "status", "verdict", "changes", "cost", "model", "provider")
    rows = [
        (
            Text(str(found["rank"] or "-")),
            Text(str(found["candidate"])),
            Text(_short(found), "bold"),
            _status(found),
            _verdict(found),
            Text(_changes(found) if found["files_changed"] else "none" if found["rank"] else ""),
            Text(f"${found['cost_usd']:.4f}"),
            Text(clean(found["model"] or "")),
            Text(clean(found["provider"] or "")),
        )
        for found in candidates
    ]
    if not console.is_terminal:
        for row in [names, *((cell.plain for cell in row) for row in rows)]:
            print("  " + "\t".join(row))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in names:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _next(task: dict[str, Any], artifacts: dict[str, Any]) -> str:
    """What a person types next, where `next_action` names the tools that a model calls."""
    name = _short(task)
    if task.get("asked"):
        return _answer_with(task)
    if task.get("asking"):
        return ", ".join(_answer_with({"task_id": candidate}) for candidate in task["asking"])
    if not task["completed_at"]:
        return f"ca task watch {name}"
    steps = [task["error"]["remedy"]] if task["error"] else []
    if artifacts.get("files_changed"):
        steps += [f"ca task diff {name}", f"ca task apply {name}"]
        steps += ["--candidate K takes another than the best"] if task.get("best") else []
    elif task["error"]:
        steps.append(f"ca task logs {name}")
    return ", ".join(steps) or "nothing; no file was changed"


def show_cancelled(task: dict[str, Any]) -> None:
    if task["changed"]:
        word = "cancelled" if task["completed_at"] else "is being cancelled; what was done is saved"
    else:
        word = f"had nothing to cancel: it is {task['status']}"
    console.print(f"{_short(task)} {word}")


def show_sent(task: dict[str, Any]) -> None:
    how = "has its answer" if task["answered"] else "is told; it reads that at its next turn"
    console.print(f"The agent of {_short(task)} {how}")


def show_commented(task: dict[str, Any], *, hint: bool = True) -> None:
    """Whether comments reached an agent, or became a task."""
    name = _short(task)
    if task["outcome"] == "follow_up":
        console.print(f"[bold]{name}[/] goes on from {_short({'task_id': task['parent_task_id']})} with the comments")
        if hint:
            console.print(f"[dim]Watch it with[/] ca task watch {name}")
    else:
        show_sent({**task, "answered": task["outcome"] == "answered"})


def show_questions(found: dict[str, Any]) -> None:
    """Every open question, and how to answer it."""
    for question in found["questions"]:
        console.print(Text.assemble((_short(question), "bold"), "  ", clean(_title(question))))
        show_question(question["question"], question)
        console.print(f"  [dim]Answer with[/] {_answer_with(question)}")
    if not found["questions"]:
        console.print("No agent asks anything.")
    elif found["more"]:
        console.print("[dim]There are more.[/]")


def show_question(question: str, asked: dict[str, Any]) -> None:
    console.print(f"  [magenta]{'asks':<10}[/] {_safe(cut(question, LINE_MAX) or '')}")
    for choice in asked["choices"]:
        console.print(f"  {'':<10} [dim]-[/] {_safe(choice)}")


def _answer_with(task: dict[str, Any]) -> str:
    return f'ca task send {_short(task)} "…"'


def show_schedules(found: dict[str, Any]) -> None:
    """Schedules in a table; in a pipe, tabs between the columns."""
    schedules = found["schedules"]
    if not console.is_terminal:
        for schedule in schedules:
            state = "enabled" if schedule["enabled"] else "paused"
            due = next(iter(schedule["next_due_at"]), "")
            columns = (schedule["schedule_id"], state, schedule["cron"], schedule["timezone"], due, schedule["name"])
            print("\t".join(clean(column).replace("\t", " ").replace("\n", " ") for column in columns))
        return
    if not schedules:
        console.print('No schedules. [dim]Make one with[/] ca schedule create NAME "0 3 * * 1-5" "…"')
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("schedule", "cron", "time zone", "next due (UTC)", "last", "name"):
        table.add_column(column, no_wrap=column != "name")
    for schedule in schedules:
        due = [_minute(moment) for moment in schedule["next_due_at"][:1]]
        last = [run["outcome"] for run in schedule["last_runs"][:1]]
        table.add_row(
            Text(_short({"task_id": schedule["schedule_id"]}), "bold"),
            Text(schedule["cron"]),
            Text(schedule["timezone"]),
            Text(due[0]) if due else Text("paused", "yellow"),
            _outcome(last[0]) if last else Text("-", "dim"),
            Text(clean(schedule["name"])),
        )
    console.print(table)


def show_schedule(schedule: dict[str, Any]) -> None:
    """One schedule, its task, its next due times and its last ones."""
    head = Text.assemble((schedule["schedule_id"], "bold"), "  ", clean(schedule["name"]))
    if not schedule["enabled"]:
        head.append("  paused", "yellow")
    console.print(head)
    task = schedule["task"]
    rows: dict[str, Any] = {
        "cron": f"{schedule['cron']}  {schedule['timezone']}",
        "next due": ", ".join(_minute(moment) for moment in schedule["next_due_at"]),
        "prompt": cut(task["prompt"], LINE_MAX),
        **{name: task[name] for name in ("repository", "base_ref", "model", "verify", "setup")},
    }
    for name, value in rows.items():
        if value:
            console.print(f"  [dim]{name:<10}[/] {_safe(str(value))}")
    for run in schedule["last_runs"]:
        line = Text.assemble(f"  {_minute(run['due_at'])}  ", _outcome(run["outcome"]))
        line.append(f"  {clean(run['task_id'] or run['reason'] or '')}")
        console.print(line)


def show_deleted(schedule: dict[str, Any]) -> None:
    console.print(f"{schedule['schedule_id']} is deleted: {_safe(schedule['name'])}")


def show_ran(schedule: dict[str, Any]) -> None:
    name = _short(schedule["run"])
    console.print(f"[bold]{name}[/] queued by {_safe(schedule['name'])}")
    console.print(f"[dim]Watch it with[/] ca task watch {name}")


def _outcome(outcome: str) -> Text:
    return Text(outcome, OUTCOME_STYLES.get(outcome, ""))


def _minute(moment: str) -> str:
    return moment[:16].replace("T", " ")


def show_line(line: dict[str, Any]) -> None:
    """One line of a log."""
    console.print(_line(line))


def show_queue(queue: dict[str, Any]) -> None:
    """What waits, what runs where, the workers, and what went wrong for good."""
    now = datetime.now(UTC)

    def ago(moment: str | None) -> str:
        return "never" if moment is None else f"{_duration((now - datetime.fromisoformat(moment)).total_seconds())} ago"

    def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        console.print(f"[bold]{title}[/]" if rows else f"[bold]{title}[/] [dim]none[/]")
        shown = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        for column in columns:
            shown.add_column(column, no_wrap=True)
        for row in rows:
            shown.add_row(*(Text(clean(cell)) for cell in row))
        if rows:
            console.print(shown)

    accounts = [
        (found["account_id"], str(found["queued"]), str(found["running"]), ago(found["oldest_at"]))
        for found in queue["accounts"]
    ]
    table("Accounts", ("account", "waiting", "running", "oldest"), accounts)
    running = [
        (
            _short(task),
            task["account_id"],
            task["phase"] or "",
            str(task["attempt"]),
            task["worker"] or "no worker",
            "expired"
            if task["lease_until"] and datetime.fromisoformat(task["lease_until"]) < now
            else "held"
            if task["lease_until"]
            else "given back",
            _title(task),
        )
        for task in queue["running"]
    ]
    table("Running", ("task", "account", "phase", "attempt", "worker", "lease", "title"), running)
    workers = [
        (
            found["name"],
            found["version"],
            f"{found['running']} of {found['concurrency']}",
            ago(found["seen_at"]),
            ago(found["swept_at"]),
        )
        for found in queue["workers"]
    ]
    table("Workers", ("worker", "version", "busy", "seen", "swept"), workers)
    dead = [(_short(task), ago(task["completed_at"]), task["title"][:50]) for task in queue["dead_letters"]]
    table("Dead letters", ("task", "ended", "title"), dead)
    if dead:
        console.print("[dim]Try one once more with[/] ca task retry TASK")


def show_numbered(diff: dict[str, Any]) -> None:
    """A diff with what names each line in `ca task comment`: its number in the new file, or -N for a deleted one."""
    from cloudagent_mcp.operations.diffs import files_of

    for file, lines in files_of(diff["diff"]):
        console.print(f"[bold]{_safe(file.path)}[/] [dim]{file.change}{', binary' if file.binary else ''}[/]")
        for line in lines:
            style = {"+": "green", "-": "red"}.get(line.mark, "")
            console.print(Text(f"{line.number:>7} {line.mark}{clean(line.text)}", style), soft_wrap=True)


def show_diff(diff: dict[str, Any]) -> None:
    """A diff, coloured on a terminal; a patch, to the byte, in a pipe."""
    if not console.is_terminal:
        if diff["diff"]:
            sys.stdout.write(diff["diff"])
        else:
            for file in diff["files"]:
                print(f"{file['change']}\t{file['insertions']}\t{file['deletions']}\t{clean(file['path'])}")
        return
    for file in diff["files"]:
        counts = "binary" if file["binary"] else f"[green]+{file['insertions']}[/] [red]-{file['deletions']}[/]"
        console.print(f"{file['change']:<9}{_safe(file['path'])} {counts}")
    if diff["diff"]:
        console.print(Syntax(clean(diff["diff"]), "diff", background_color="default", word_wrap=True))


def show_applied(done: dict[str, Any]) -> None:
    for file in done["files"]:
        size = "binary" if file["binary"] else f"+{file['insertions']} -{file['deletions']}"
        merged = " [yellow](merged with your commits)[/]" if file["merged"] else ""
        console.print(f"  {file['change'] or '':<9}{_safe(file['path'])} [dim]{size}[/]{merged}")
    if done.get("dangers") and done["outcome"] != "undone":
        console.print("[yellow]Worth a look:[/]")
        for danger in done["dangers"]:
            console.print(f"  {_safe(danger['path'])}: {_safe(danger['why'])}", soft_wrap=True)
    console.print(_safe(done["message"]))
    if done.get("worktree") and done["outcome"] == "applied":
        console.print(f"[dim]Worktree:[/] {_safe(done['worktree'])}", soft_wrap=True)
    if done.get("preview"):
        console.print(f"[dim]To write exactly this:[/] --preview {_safe(done['preview'])}", soft_wrap=True)
    if done.get("backup_ref"):
        console.print(f"[dim]Backup:[/] {done['backup_ref']}")
    if done.get("resume"):
        console.print(f"[dim]Go on with its agent:[/] {_safe(done['resume'])}", soft_wrap=True)
    elif done.get("session_refused"):
        console.print(f"[dim]Its session did not come along ({done['session_refused']}); `ca task resume` says why.[/]")


def show_applied_in_order(done: dict[str, Any]) -> None:
    for step in done["steps"]:
        verdict = step["verdict"] or "-"
        style = VERDICT_STYLES.get(verdict, "dim")
        name = step["task_id"].removeprefix("task_")[:8]
        console.print(f"[bold]{name}[/] {step['outcome']:<9} [{style}]{verdict:<11}[/]{_safe(step['message'])}")
    if undone := [step for step in done["steps"] if step["outcome"] == "undone"]:
        by = (undone[0]["verified_by"] or "").removeprefix("task_")[:8]
        console.print(f"[dim]Why:[/] ca task logs {by}[dim]; to have it mended:[/] ca task create … --continue TASK")
    else:
        console.print(_safe(done["next_action"]))


def show_resumed(home: dict[str, Any]) -> None:
    """Where a session is, and the line to type."""
    there = {"placed": "is here now", "extended": "is here, with what was new", "already_here": "was here already"}
    console.print(f"The session {there[home['outcome']]}: {home['turns']} messages. Go on with it:")
    console.print(_safe(home["command"]), soft_wrap=True)


def show_finding(finding: Finding) -> None:
    mark = "[green]ok[/]  " if finding.ok else "[red]FAIL[/]"
    if finding.seconds is None:
        console.print(f"{mark} {finding.name:<14} {_safe(finding.message)}")
    else:
        cost = "" if finding.cost_usd is None else f"${finding.cost_usd:.5f}"
        console.print(f"{mark} {finding.seconds:6.1f} s {cost:>9} {finding.name:<68} [dim]{_safe(finding.message)}[/]")
    if finding.remedy:
        console.print(f"     {'':<14} [yellow]{_safe(finding.remedy)}[/]")


def watch(api: Client, name: str, as_json: bool) -> dict[str, Any]:
    """Show a task's log while it happens; the task at its end."""
    from cloudagent_mcp.client import log_lines

    if as_json:
        while not (task := api.call("get_task", task_id=name, wait_seconds=50))["completed_at"]:
            pass
        print(_json(task))
        return task
    spinner = Spinner("dots", text=Text("queued", "dim"))
    with Live(spinner, console=console, transient=True, refresh_per_second=8) if console.is_terminal else _Quiet():
        for line in log_lines(api, name, follow=True):
            show_line(line)
            if line["kind"] == "question":
                console.print(f"[dim]Answer with[/] {_answer_with({'task_id': name})}")
            spinner.update(text=Text(cut(" ".join(clean(line["message"]).split()), 60) or "", "dim"))
    task = api.call("get_task", task_id=name, log_lines=0)
    show_task(task)
    return task


class _Quiet:
    """In place of a live display, in a pipe."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _line(line: dict[str, Any]) -> Text:
    style = LEVEL_STYLES.get(line["level"]) or KIND_STYLES.get(line["kind"], "dim")
    message = cut(clean(line["message"]), LINE_MAX) or ""
    text = Text.assemble((f"{line['timestamp'][11:19]} ", "dim"), (f"{line['kind']:<12}", style or "bold"))
    text.append(message.replace("\n", "\n" + " " * 21), style)
    return text


def _status(task: dict[str, Any]) -> Text:
    return Text(task["status"], STATUS_STYLES.get(task["status"], ""))


def _verdict(task: dict[str, Any]) -> Text:
    return Text(task["verdict"] or "", VERDICT_STYLES.get(task["verdict"] or "", ""))


def _changes(artifacts: dict[str, Any]) -> str:
    files = artifacts["files_changed"]
    return f"{files} {'file' if files == 1 else 'files'}, +{artifacts['insertions']} -{artifacts['deletions']}"


def _sandbox_cost(usage: dict[str, Any]) -> str | None:
    if not usage["sandbox_seconds"]:
        return None
    # A server of an earlier version did not count it.
    cost = usage.get("sandbox_cost_usd")
    return f"{'cost not known' if cost is None else f'${cost:.4f}'}, {_duration(usage['sandbox_seconds'])}"


def _title(task: dict[str, Any]) -> str:
    """With which candidate it is, where it is one."""
    candidate = task.get("candidate")
    return task["title"][:50] + (f" (candidate {candidate})" if candidate else "")


def _short(task: dict[str, Any]) -> str:
    return task["task_id"].partition("_")[2][:8]


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _safe(text: str) -> str:
    return escape(clean(text))


def _json(value: Any) -> str:
    import json

    return json.dumps(value)
