"""What every sandbox provider promises, as checks of a real one: the tests run them, and so does `ca doctor`.

A check is a function that takes a `Trial`; its name says what it finds true. It raises `ProviderBroken` where that is
not so, and lets through whatever error of the provider's stopped it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from cloudagent_queue.sandboxes import PLAIN, Provider, Resources, Sandbox, SandboxSpec
from cloudagent_storage.errors import CloudAgentError, ProviderBroken, SandboxError, SandboxGone

AWKWARD = 'it\'s "quoted" $(id) `id` \\ \n second line\ttab · 漢字 🦀 '

# Runs on as a process that has left its parents, its session and its signals behind, and holds a lock to tell of it.
ESCAPED = """
import fcntl, os, signal, sys, time
if os.fork():
    while not os.path.exists("held"):
        time.sleep(0.01)
    if sys.argv[1:] == ["stay"]:
        time.sleep(600)
    sys.exit(0)
os.setsid()
if os.fork():
    os._exit(0)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
null = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
lock = open("lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
open("held", "w").close()
time.sleep(600)
"""
LOCK_IS_FREE = "import fcntl; fcntl.flock(open('lock'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

STANDARD_SIGNALS = 0x7FFF_FFFF
"""1 to 31; the two after them are the C library's own."""
_PATIENCE_S = 30.0


@dataclass
class Life:
    """How long a sandbox lived, in monotonic time, for its bill."""

    resources: Resources | None
    began: float
    ended: float | None = None


class Trial:
    """A provider that is tried, and the sandboxes that were made for it."""

    def __init__(self, provider: Provider, *, spec: SandboxSpec = PLAIN) -> None:
        self.provider = provider
        self.mark = {"trial": secrets.token_hex(8)}
        """In the metadata of every sandbox made here: in a real account there may be others."""
        self.lives: dict[str, Life] = {}
        self._spec = spec
        self._shared: Sandbox | None = None

    def fresh(self, **metadata: str) -> Sandbox:
        """A new sandbox."""
        began = time.monotonic()
        made = self.provider.create(self._spec, metadata={**self.mark, **metadata})
        self.lives[made.id] = Life(made.resources, began)
        return made

    @property
    def shared(self) -> Sandbox:
        """A sandbox for checks that start nothing and mind no files of others."""
        if self._shared is None:
            self._shared = self.fresh()
        return self._shared

    def end_fresh(self) -> None:
        """Kill all but the shared one."""
        self._kill_but(None if self._shared is None else self._shared.id)

    def end(self) -> None:
        """Kill every sandbox that was made here, known or not. Raises what keeps it from being certain."""
        self._kill_but(None)
        self._shared = None

    def _kill_but(self, kept: str | None) -> None:
        for info in self.provider.list(self.mark):
            if info.id != kept:
                with suppress(SandboxGone):
                    self.provider.connect(info.id).kill()
        for sandbox_id, life in self.lives.items():
            if sandbox_id != kept and life.ended is None:
                life.ended = time.monotonic()


Check = Callable[[Trial], None]


def a_command_runs_to_its_end_and_tells_its_code_and_output(trial: Trial) -> None:
    box = trial.shared
    done = box.run(["sh", "-c", 'printf "%s" "$1"; echo err >&2; exit 7', "sh", AWKWARD], timeout_s=20)
    same((done.exit_code, done.output), (7, f"{AWKWARD}err\n"), "the exit code and the output of a command")
    same(box.run(["sh", "-c", "kill -9 $$"], timeout_s=20).exit_code, 137, "the exit code after a signal")
    same(box.run(["no-such-command"], timeout_s=20).exit_code, 127, "the exit code of a command that does not exist")


def a_command_gets_its_environment_its_folder_and_its_home(trial: Trial) -> None:
    box = trial.shared
    box.write("a/b/file", b"")
    script = """
import json, os
print(json.dumps([os.getcwd(), os.environ["AWKWARD"], os.environ["HOME"], os.listdir(os.environ["HOME"])]))
"""
    done = box.run([box.python, "-c", script], timeout_s=20, env={"AWKWARD": AWKWARD}, cwd="a/b", home="homes/fresh")
    expected: list[object] = [f"{box.root}/a/b", AWKWARD, f"{box.root}/homes/fresh", []]
    same(json.loads(done.output), expected, "what a command finds around it")


def a_command_whose_time_is_up_dies_with_its_children(trial: Trial) -> None:
    box = trial.shared
    box.write("late/escaped.py", ESCAPED.encode())
    done = box.run(["sh", "-c", f"echo begun; {box.python} escaped.py stay"], timeout_s=3, cwd="late")
    same((done.exit_code, done.output), (None, "begun\n"), "how a command ends whose time is up")
    same(box.run(["test", "-e", "late/held"], timeout_s=20).exit_code, 0, "whether its child had begun")
    _no_lock_is_held(box, "late")


def what_a_command_leaves_running_ends_with_it(trial: Trial) -> None:
    box = trial.shared
    box.write("left/escaped.py", ESCAPED.encode())
    same(box.run([box.python, "escaped.py"], timeout_s=20, cwd="left").exit_code, 0, "whether the command ended well")
    _no_lock_is_held(box, "left")


def of_a_long_output_the_beginning_and_the_end_are_kept(trial: Trial) -> None:
    box = trial.shared
    done = box.run([box.python, "-c", "print('first'); print('x' * 50_000_000); print('last')"], timeout_s=60)
    true(done.output.startswith("first\n") and done.output.endswith("\nlast\n"), "a long output lost its ends")
    true("bytes left out" in done.output and len(done.output) < 100_000, "a long output was not cut")


def commands_inherit_no_signal_handling(trial: Trial) -> None:
    ignored = int(trial.shared.run(["grep", "SigIgn", "/proc/self/status"], timeout_s=20).output.split()[1], 16)
    same(ignored & STANDARD_SIGNALS, 0, "the signals that a command ignores from its start")


def files_arrive_unharmed_in_folders_that_did_not_exist(trial: Trial) -> None:
    box = trial.shared
    data = secrets.token_bytes(3_000_000) + bytes(range(256)) * 10_000
    for path in ("big.bin", "made/b/c/spaces and 漢字.bin"):
        box.write(path, data)
        true(box.read(path, max_bytes=10**8) == data, "a large file is not the same after its way in and out")
    done = box.run(["sha256sum", "big.bin"], timeout_s=20)
    same(done.output.split()[0], hashlib.sha256(data).hexdigest(), "the checksum of a file inside")
    true(box.read("big.bin", offset=1234, max_bytes=2_000_000) == data[1234:2_001_234], "a part of a file is wrong")
    true(box.read("big.bin", offset=5_000_000, max_bytes=99) == data[5_000_000:5_000_099], "a part of a file is wrong")
    box.write("big.bin", b"")
    same(box.read("big.bin", max_bytes=10), b"", "the content of an emptied file")


def an_absent_file_reads_as_empty(trial: Trial) -> None:
    box = trial.shared
    box.write("folder/file", b"x")
    for path in ("nothing", "no/folder", "folder", "folder/file/below", ".", "n" * 5000):
        same(box.read(path, max_bytes=10), b"", "what is read where there is no file")


def no_symlink_is_followed(trial: Trial) -> None:
    box = trial.shared
    done = box.run(
        [
            "sh",
            "-c",
            "mkdir -p links/real; echo secret > links/real/file; ln -s real links/folder; ln -s real/file links/file",
        ],
        timeout_s=20,
    )
    same(done.exit_code, 0, "whether links could be made")
    for path in ("links/file", "links/folder/file"):
        same(box.read(path, max_bytes=10), b"", "what is read through a symlink")
    refused(lambda: box.write("links/folder/new", b"x"), "a file was written through a symlink")
    box.write("links/file", b"mine")
    same(box.read("links/real/file", max_bytes=10), b"secret\n", "what a symlink in the place of a file led to")
    same(box.read("links/file", max_bytes=10), b"mine", "the file that replaced a symlink")


def a_path_that_leaves_the_sandbox_is_refused(trial: Trial) -> None:
    box = trial.shared
    for path in ("../outside", "a/../../outside", "/etc/passwd", "nul\0byte", "half\ud800"):
        refused(lambda path=path: box.read(path, max_bytes=10), "a path outside was read")
        refused(lambda path=path: box.write(path, b"x"), "a path outside was written")
        refused(lambda path=path: box.run(["true"], timeout_s=20, cwd=path), "a command ran in a path outside")
        refused(lambda path=path: box.run(["true"], timeout_s=20, home=path), "a command had its home outside")


def an_impossible_variable_is_refused(trial: Trial) -> None:
    box = trial.shared
    for name, value in (("", "x"), ("A=B", "x"), ("A\0B", "x"), ("A", "x\0--bind\0/\0/mnt")):
        refused(
            lambda name=name, value=value: box.run(["true"], timeout_s=20, env={name: value}),
            "an impossible variable was accepted",
        )


def git_works_inside(trial: Trial) -> None:
    box = trial.shared
    box.write("repository/file", b"content\n")
    env = {f"GIT_{who}_{what}": "agent@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for command in (
        ["git", "init", "--quiet"],
        ["git", "add", "file"],
        ["git", "commit", "--quiet", "-m", AWKWARD],
        ["git", "bundle", "create", "--quiet", "../result.bundle", "HEAD"],
    ):
        done = box.run(command, timeout_s=60, cwd="repository", env=env)
        same(done.exit_code, 0, f"how `git {command[1]}` ended")
    true(box.read("result.bundle", max_bytes=20).startswith(b"# v2 git bundle"), "git made no bundle")


def python_inside_can_import_the_library_of_the_agent(trial: Trial) -> None:
    box = trial.shared
    done = box.run([box.python, "-c", "import claude_agent_sdk"], timeout_s=60)
    same((done.exit_code, done.output), (0, ""), "how the import of claude_agent_sdk ended")


def a_command_is_started_once_however_many_try(trial: Trial) -> None:
    box = trial.fresh()
    true(not box.alive(), "a sandbox in which nothing was started says that it runs")
    ends = _race(trial, box.id, ["sh", "-c", "echo ran >> log"], number=1)
    same(ends, ["refused"] * 3 + ["started"], "what four got who wanted to start the command")
    until(ended(box), "the started command did not end")
    same(box.read("log", max_bytes=100), b"ran\n", "what the started command wrote")
    refused(lambda: box.start(["true"], env={}), "the command was started again")


def a_later_command_starts_once_too_when_the_one_before_has_ended(trial: Trial) -> None:
    box = trial.fresh()
    box.start(["sh", "-c", "echo first >> log; sleep 600"], env={})
    until(has(box, "log"), "the first command did not begin")
    again = trial.provider.connect(box.id)
    refused(lambda: again.start(["true"], env={}, number=2), "a second command was started beside the first")
    true(box.alive(), "a start that was refused has ended what ran")
    again.end_processes()
    ends = _race(trial, box.id, ["sh", "-c", "echo second >> log; until [ -e go ]; do sleep 0.02; done"], number=2)
    same(ends, ["refused"] * 3 + ["started"], "what four got who wanted to start the second command")
    until(lambda: box.read("log", max_bytes=100).endswith(b"second\n"), "the second command did not begin")
    true(box.alive() and trial.provider.connect(box.id).alive(), "a second command that runs is said to have ended")
    refused(lambda: box.start(["true"], env={}), "the first command was started again beside the second")
    box.write("go", b"")
    until(ended(box), "the end of the second command is not seen")
    for number in (1, 2):
        refused(lambda number=number: box.start(["true"], env={}, number=number), "a command was started again")
    same(box.read("log", max_bytes=100), b"first\nsecond\n", "what the started commands wrote")
    box.start(["sleep", "600"], env={}, number=4)
    box.stop()
    until(ended(box), "a later command was not stopped")


def a_started_command_begins_in_the_root_with_its_environment(trial: Trial) -> None:
    box = trial.fresh()
    script = (
        "import json, os; print('printed', flush=True); "
        "json.dump([os.getcwd(), os.environ['AWKWARD'], os.environ['HOME']], open('seen', 'w'))"
    )
    box.start([box.python, "-c", script], env={"AWKWARD": AWKWARD})
    until(ended(box), "the started command did not end")
    seen = json.loads(box.read("seen", max_bytes=10_000))
    same(seen, [box.root, AWKWARD, f"{box.root}/home"], "what the started command finds around it")
    same(box.output(), b"printed\n", "what the started command printed")


def whoever_connects_reads_on_from_an_offset_beside_the_started_command(trial: Trial) -> None:
    first = trial.fresh()
    script = "mkdir run; echo one >> run/log; until [ -e go ]; do sleep 0.02; done; echo two >> run/log"
    first.start(["sh", "-c", script], env={})
    box = trial.provider.connect(first.id)
    until(has(box, "run/log"), "the started command wrote nothing")
    true(box.alive(), "the started command is said to have ended")
    same(box.run(["true"], timeout_s=20).exit_code, 0, "how a command ends that runs beside the started one")
    true(box.alive(), "a command that ran beside the started one has ended it")
    same(box.read("run/log", max_bytes=1000), b"one\n", "the first line")
    same(box.read("run/log", offset=4, max_bytes=1000), b"", "what follows the first line")
    box.write("go", b"")
    until(ended(box), "the started command did not end")
    same(box.read("run/log", offset=4, max_bytes=1000), b"two\n", "what follows the first line, later")
    same(box.read("run/log", offset=1, max_bytes=4), b"ne\nt", "four bytes from the second on")
    same(box.read("run/log", offset=10**12, max_bytes=10), b"", "what is beyond the end")


def ending_the_processes_reaches_one_that_hides_and_keeps_the_files(trial: Trial) -> None:
    box = trial.fresh()
    box.write("escaped.py", ESCAPED.encode())
    box.start([box.python, "escaped.py"], env={})
    until(ended(box), "the started command did not end")
    same(box.run([box.python, "-c", LOCK_IS_FREE], timeout_s=20).exit_code, 1, "whether its child lives on")
    trial.provider.connect(box.id).end_processes()
    _no_lock_is_held(box, ".")
    same(box.read("escaped.py", max_bytes=10_000), ESCAPED.encode(), "a file, after the processes were ended")
    true(not box.alive(), "an ended command is said to run")


def ending_the_processes_ends_a_command_that_is_waited_for(trial: Trial) -> None:
    box = trial.fresh()
    found: list[int | None] = []
    script = "echo > begun; sleep 600"
    thread = threading.Thread(target=lambda: found.append(box.run(["sh", "-c", script], timeout_s=600).exit_code))
    thread.start()
    until(has(box, "begun"), "the command did not begin")
    trial.provider.connect(box.id).end_processes()
    thread.join(_PATIENCE_S)
    same(found, [137], "how a command ended whose processes were ended")


def a_stopped_command_can_clean_up(trial: Trial) -> None:
    box = trial.fresh()
    script = "trap 'echo clean > cleaned; exit' TERM; echo > ready; while :; do sleep 0.02; done"
    box.start(["sh", "-c", script], env={})
    until(has(box, "ready"), "the started command did not begin")
    trial.provider.connect(box.id).stop()
    until(ended(box), "the stopped command did not end")
    same(box.read("cleaned", max_bytes=100), b"clean\n", "what the stopped command left")
    box.stop()


def a_log_is_watched_until_it_grows_or_its_command_ends(trial: Trial) -> None:
    box = trial.fresh()
    script = (
        "until [ -e go ]; do sleep 0.02; done; echo one >> log; until [ -e end ]; do sleep 0.02; done; echo two >> log"
    )
    box.start(["sh", "-c", script], env={})
    seen = box.watch("log", offset=0, max_bytes=1000, wait_s=0.2)
    same(seen, (b"", True), "what is seen while nothing happens")
    box.write("go", b"")
    seen = box.watch("log", offset=0, max_bytes=1000, wait_s=_PATIENCE_S)
    same(seen, (b"one\n", True), "what is seen when the log has grown")
    box.write("end", b"")
    until(lambda: not box.watch("log", offset=4, max_bytes=1000, wait_s=1).alive, "the end of the command is not seen")
    same(box.watch("log", offset=4, max_bytes=1000, wait_s=_PATIENCE_S), (b"two\n", False), "what is seen at the end")
    same(box.watch("log", offset=8, max_bytes=1000, wait_s=_PATIENCE_S), (b"", False), "what is seen after the end")
    same(box.watch("nothing/here", offset=0, max_bytes=9, wait_s=0.1).data, b"", "what is seen of an absent file")


def a_command_that_is_stopped_at_once_ends(trial: Trial) -> None:
    box = trial.fresh()
    box.start(["sleep", "600"], env={})
    box.stop()
    until(ended(box), "the stopped command did not end")


def sandboxes_are_listed_by_their_metadata(trial: Trial) -> None:
    first, second = trial.fresh(number="1"), trial.fresh(number="2")
    provider, mark = trial.provider, trial.mark
    listed = {info.id for info in provider.list(mark)}
    true({first.id, second.id} <= listed, "a sandbox is not in the list")
    found = [(info.id, dict(info.metadata)) for info in provider.list({**mark, "number": "2"})]
    same(found, [(second.id, {**mark, "number": "2"})], "the sandboxes with given metadata")
    same(list(provider.list({**mark, "number": "3"})), [], "the sandboxes with metadata that none has")
    second.kill()
    left = {info.id for info in provider.list(mark)}
    true(first.id in left and second.id not in left, "a killed sandbox is in the list, or another one is not")


def a_killed_sandbox_is_gone_for_everyone(trial: Trial) -> None:
    box = trial.fresh()
    box.start(["sleep", "600"], env={})
    box.extend(60)
    second = trial.provider.connect(box.id)
    true(second.alive(), "a started command is said to have ended")
    box.kill()
    box.kill()
    second.kill()
    uses: list[Callable[[], object]] = [
        lambda: trial.provider.connect(box.id),
        lambda: second.start(["true"], env={}),
        second.alive,
        second.stop,
        second.end_processes,
        lambda: second.run(["true"], timeout_s=20),
        lambda: second.read("file", max_bytes=1),
        lambda: second.watch("file", offset=0, max_bytes=1, wait_s=1),
        lambda: second.write("file", b"x"),
        lambda: second.extend(60),
    ]
    for use in uses:
        gone(use, "a killed sandbox does not count as gone")


def an_id_that_names_no_sandbox_is_gone(trial: Trial) -> None:
    for name in ("", ".", "..", "../sandboxes", "sbx_", "sbx_" + "a" * 25 + "/", "sbx_" + "a" * 26, "i" + "0" * 19):
        gone(lambda name=name: trial.provider.connect(name), "an id of nothing does not count as gone")


CHECKS: Sequence[Check] = (
    a_command_runs_to_its_end_and_tells_its_code_and_output,
    a_command_gets_its_environment_its_folder_and_its_home,
    python_inside_can_import_the_library_of_the_agent,
    git_works_inside,
    files_arrive_unharmed_in_folders_that_did_not_exist,
    an_absent_file_reads_as_empty,
    no_symlink_is_followed,
    a_path_that_leaves_the_sandbox_is_refused,
    an_impossible_variable_is_refused,
    of_a_long_output_the_beginning_and_the_end_are_kept,
    a_command_whose_time_is_up_dies_with_its_children,
    what_a_command_leaves_running_ends_with_it,
    commands_inherit_no_signal_handling,
    a_started_command_begins_in_the_root_with_its_environment,
    a_command_is_started_once_however_many_try,
    a_later_command_starts_once_too_when_the_one_before_has_ended,
    whoever_connects_reads_on_from_an_offset_beside_the_started_command,
    a_log_is_watched_until_it_grows_or_its_command_ends,
    a_stopped_command_can_clean_up,
    a_command_that_is_stopped_at_once_ends,
    ending_the_processes_reaches_one_that_hides_and_keeps_the_files,
    ending_the_processes_ends_a_command_that_is_waited_for,
    sandboxes_are_listed_by_their_metadata,
    a_killed_sandbox_is_gone_for_everyone,
    an_id_that_names_no_sandbox_is_gone,
)


def name_of(check: Check) -> str:
    """The sentence that a check finds true."""
    return getattr(check, "__name__", "a check").replace("_", " ")


# -- how a check says what it found ------------------------------------------------------------------------------------


def true(found: bool, message: str) -> None:
    if not found:
        raise ProviderBroken(f"{message[0].upper()}{message[1:]}.")


def same(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise ProviderBroken(f"Wrong: {what}. Expected {_short(expected)}, found {_short(found)}.")


def refused(use: Callable[[], object], message: str) -> None:
    """`SandboxError` itself, not one of those that say something else."""
    try:
        use()
    except CloudAgentError as error:
        if type(error) is SandboxError:
            return
        raise
    true(False, message)


def gone(use: Callable[[], object], message: str) -> None:
    try:
        use()
    except SandboxGone:
        return
    except CloudAgentError as error:
        raise ProviderBroken(f"{message[0].upper()}{message[1:]}, but as {error.code}.") from error
    true(False, message)


def until(condition: Callable[[], object], message: str) -> None:
    deadline, pause = time.monotonic() + _PATIENCE_S, 0.01
    while not condition():
        true(time.monotonic() < deadline, message)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.5)


def has(box: Sandbox, path: str) -> Callable[[], bool]:
    return lambda: box.read(path, max_bytes=1) != b""


def ended(box: Sandbox) -> Callable[[], bool]:
    return lambda: not box.alive()


def _race(trial: Trial, sandbox_id: str, command: Sequence[str], *, number: int) -> list[str]:
    """What four got who wanted to start the command at once."""
    ends: list[str] = []

    def begin() -> None:
        try:
            trial.provider.connect(sandbox_id).start(command, env={}, number=number)
            ends.append("started")
        except SandboxError:
            ends.append("refused")

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(ends)


def _no_lock_is_held(box: Sandbox, folder: str) -> None:
    found = box.run([box.python, "-c", LOCK_IS_FREE], timeout_s=20, cwd=folder)
    same(found.exit_code, 0, "whether every process has ended")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:200]} … {text[-80:]}"
