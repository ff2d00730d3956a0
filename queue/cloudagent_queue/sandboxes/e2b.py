# pyright: basic
"""Sandboxes in the cloud, through the `e2b` SDK: Novita, E2B, and servers of one's own that speak the same protocol.

The control plane makes, finds and kills sandboxes; a daemon in each runs commands and takes files. All that is done in
a sandbox goes through `inside.py`, which is put there first, in short calls that may be repeated. No call holds a
stream for as long as an agent or a command runs: streams get cut, and one that hangs looks like one that waits.

Every exception of the SDK, and of the HTTP clients below it, is translated here and in `e2b_api.py`, the control plane.
What does not answer is `SandboxUnreachable`; only the control plane, asked again, makes it `SandboxGone`.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import logging
import re
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cloudagent_queue.sandboxes import (
    PLAIN,
    CommandResult,
    Resources,
    SandboxInfo,
    SandboxSpec,
    Watched,
    inside,
    preparation,
    safe_files,
)
from cloudagent_queue.sandboxes.e2b_api import CREATE_S, DATA_S, E2B, NOVITA, Api, Service, resources_of
from cloudagent_storage.errors import ProviderBusy, SandboxError, SandboxGone, SandboxUnavailable, SandboxUnreachable

if TYPE_CHECKING:
    import e2b

log = logging.getLogger(__name__)

T = TypeVar("T")

INLINE_MAX = 64_000
"""Up to so many bytes, compressed, travel in a call's environment, of which the kernel takes 128 KB a variable."""
WAIT_S = 15.0
"""How long one call waits for a command of `run`; then the next one goes on waiting."""
TRY_AGAIN_WITHIN_S = 30.0
SLOWEST_BYTES_PER_S = 200_000
PREPARE_S = 600.0
SNAPSHOT_S = 180.0
_TRIES = 3
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_INSIDE = Path(inside.__file__)
_CALL = f"exec {inside.FOLDER}/python -I -S {inside.FOLDER}/inside.py"
_NO_SUCH_PROGRAM = (126, 127)


class E2BSandbox:
    """A sandbox of a provider's, reached through its API."""

    root = inside.ROOT
    python = f"{inside.FOLDER}/python"

    def __init__(
        self, api: Api, sandbox_id: str, resources: Resources | None, attached: e2b.Sandbox | None = None
    ) -> None:
        self.id = sandbox_id
        self.resources = resources
        self.remark: str | None = None
        self._api = api
        self._attached = attached
        self._attaching = threading.Lock()

    def start(self, command: Sequence[str], *, env: Mapping[str, str], number: int = 1) -> None:
        _check(command, env)
        request: dict[str, Any] = {"command": list(command), "env": dict(env), "token": secrets.token_hex(16)}
        if not self._call("start", **request, number=number)["started"]:
            raise SandboxError("That command was started already, or another one runs.")

    def alive(self) -> bool:
        return self._call("alive")["alive"]

    def stop(self) -> None:
        self._call("stop")

    def end_processes(self) -> None:
        self._call("end_processes")

    def run(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        home: str | None = None,
    ) -> CommandResult:
        _check(command, env or {})
        request: dict[str, Any] = {
            "token": secrets.token_hex(16),
            "command": list(command),
            "env": dict(env or {}),
            "cwd": "/".join(safe_files.path_parts(cwd)),
            "home": None if home is None else "/".join(safe_files.path_parts(home)),
            "timeout_s": timeout_s,
        }
        while True:
            answer = self._call("run", **request, wait_s=WAIT_S)
            if "running" not in answer:
                return CommandResult(exit_code=answer["exit_code"], output=answer["output"])

    def read(self, path: str, *, offset: int = 0, max_bytes: int) -> bytes:
        parts = safe_files.path_parts(path)
        if not parts:
            return b""
        answer = self._call("read", path=parts, offset=offset, max_bytes=max_bytes, token=secrets.token_hex(16))
        return self._content(answer, max_bytes)

    def watch(self, path: str, *, offset: int, max_bytes: int, wait_s: float) -> Watched:
        request = {"path": safe_files.path_parts(path), "offset": offset, "max_bytes": max_bytes}
        answer = self._call("watch", **request, token=secrets.token_hex(16), wait_s=min(wait_s, WAIT_S))
        return Watched(self._content(answer, max_bytes), answer["alive"])

    def _content(self, answer: dict[str, Any], max_bytes: int) -> bytes:
        """The part of a file that an answer holds or names."""
        if "staged" not in answer:
            return zlib.decompress(base64.b64decode(answer["data"]))[:max_bytes]
        size = min(answer["size"], max_bytes)
        return self._repeat(lambda box: _download(box, answer["staged"], size))

    def write(self, path: str, data: bytes) -> None:
        parts = safe_files.path_parts(path)
        if not parts:
            raise SandboxError("A file in a sandbox needs a name.")
        packed = base64.b64encode(zlib.compress(data, 1)).decode() if len(data) <= 10 * INLINE_MAX else ""
        if packed and len(packed) <= INLINE_MAX:
            self._call("write", path=parts, data=packed, staged=None)
            return
        staged = secrets.token_hex(16)
        within = DATA_S + len(data) / SLOWEST_BYTES_PER_S
        self._repeat(
            lambda box: box.files.write(f"{inside.STAGING}/{staged}", data, user=inside.USER, request_timeout=within)
        )
        self._call("write", path=parts, data=None, staged=staged)

    def output(self, *, max_bytes: int = 40_000) -> bytes:
        return zlib.decompress(base64.b64decode(self._call("output", max_bytes=max_bytes)["data"]))[-max_bytes:]

    def extend(self, seconds: float) -> None:
        """Never less than what it has already, nor beyond the session cap.

        Raises `SandboxError` when the provider refuses.
        """
        self._api.keep(self.id, seconds)

    def blocked(self) -> Sequence[str]:
        return ()  # the protocol has no way to ask

    def limits_met(self) -> Sequence[str]:
        return ()

    def snapshot(self) -> str | None:
        try:
            made = self._api.about(
                self.id, lambda sdk, options: sdk.Sandbox.create_snapshot(self.id, **options), within_s=SNAPSHOT_S
            )
        except (SandboxGone, SandboxUnreachable):
            raise
        except SandboxError:
            return None  # this service, or this plan, has none
        finally:
            self._attached = None  # it was paused meanwhile
        return made.snapshot_id

    def kill(self) -> None:
        self._api.kill(self.id)

    def prepare(self) -> None:
        """Make a new sandbox ready for all of the above. Raises `SandboxUnavailable` with the remedy."""
        missing = self._check_contents()
        if missing:
            began = time.monotonic()
            self._install()
            if missing := self._check_contents():
                raise SandboxUnavailable(
                    f"The sandbox has no {missing}, and installing it did not help.", remedy=self._api.build_a_template
                )
            self.remark = (
                f"Prepared a plain sandbox in {time.monotonic() - began:.0f} s; a template makes this needless."
            )
            log.info("%s: %s", self._api.service.name, self.remark)

    def _check_contents(self) -> str:
        envs = {"CLOUDAGENT_INSIDE": _INSIDE.read_text(), inside.REQUEST: json.dumps({"do": "prepare"})}
        answer = self._shell(preparation.CHECK, envs)
        if "refused" in answer:
            raise SandboxUnavailable(answer["refused"], remedy=self._api.build_a_template)
        return " and no ".join(answer.get("missing", "").split())

    def _install(self) -> None:
        library = f"claude-agent-sdk=={importlib.metadata.version('claude-agent-sdk')}"

        def ask(command: str) -> str:
            return self._repeat(
                lambda box: box.commands.run(
                    command, user="root", cwd="/", envs={"CLOUDAGENT_LIBRARY": library}, timeout=DATA_S
                ).stdout.strip()
            )

        log.info("%s: preparing a plain sandbox with git and %s", self._api.service.name, library)
        ask(preparation.START_INSTALLING)
        deadline = time.monotonic() + PREPARE_S
        while not (code := ask(preparation.INSTALLED)):
            if time.monotonic() > deadline:
                break
            time.sleep(1)
        if code != "0":
            raise SandboxUnavailable(
                "A plain sandbox could not be prepared: installing git and claude-agent-sdk "
                + ("failed." if code else "took too long."),
                remedy=self._api.build_a_template,
            )

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """A call of inside.py. Raises `SandboxError` when it refuses."""
        request = json.dumps({"do": do, **arguments})
        if len(request) > 120_000:
            raise SandboxError("The command and its environment are too long.")
        answer = self._shell(_CALL, {inside.REQUEST: request})
        if "refused" in answer:
            raise SandboxError(answer["refused"])
        return answer

    def _shell(self, script: str, envs: dict[str, str]) -> dict[str, Any]:
        """Run a script as root whose last line is a JSON object."""
        sdk = self._api.sdk

        def attempt(box: e2b.Sandbox) -> dict[str, Any]:
            try:
                printed = box.commands.run(script, user="root", cwd="/", envs=envs, timeout=DATA_S).stdout
            except sdk.CommandExitException as error:
                if error.exit_code in _NO_SUCH_PROGRAM:
                    raise SandboxError("What works for us in the sandbox is not there any more.") from error
                raise  # somebody killed it, as `end_processes` of another thread does: once more
            return json.loads(printed.rstrip().rpartition("\n")[2])

        return self._repeat(attempt)

    def _repeat(self, attempt: Callable[[e2b.Sandbox], T]) -> T:
        """Do in the sandbox what may be done twice.

        Raises `SandboxGone` when the control plane confirms it, else `SandboxUnreachable`.
        """
        sdk = self._api.sdk
        began = time.monotonic()
        for number in range(1, _TRIES + 1):
            try:
                return attempt(self._attach())
            except SandboxError:
                raise
            except sdk.InvalidArgumentException as error:
                raise SandboxError("The sandbox does not accept that.") from error
            except sdk.NotEnoughSpaceException as error:
                raise SandboxError("The disk of the sandbox is full.") from error
            except Exception as error:
                log.debug("%s: attempt %d failed: %s", self.id, number, type(error).__name__)
                self._attached = None  # with a fresh token, should it have been paused
                self._api.confirm(self.id)  # raises when it is gone, or nobody can tell
                if number == _TRIES or time.monotonic() - began > TRY_AGAIN_WITHIN_S:
                    raise SandboxUnreachable from error
                time.sleep(0.2 * number)
        raise AssertionError("unreachable")

    def _attach(self) -> e2b.Sandbox:
        with self._attaching:
            if self._attached is None:
                self._attached = self._api.attach(self.id)
            return self._attached


class _E2BProvider:
    """What the providers of this module share: all but whose they are."""

    service: Service
    place: str | None = None

    def __init__(self, env: Mapping[str, str], *, create_s: float = CREATE_S) -> None:
        """`env` are the provider's variables; `create_s` is how long a create may take."""
        self.name = self.service.name
        self._api = Api(self.service, env, create_s=create_s)
        self.session_cap_s: float | None = self._api.session_s
        self.template = self._api.template

    def create(self, spec: SandboxSpec = PLAIN, *, metadata: Mapping[str, str]) -> E2BSandbox:
        made = self._api.create(spec, metadata)
        sandbox = E2BSandbox(self._api, made.id, made.resources, made.attached)
        try:
            sandbox.prepare()
        except BaseException as error:
            with suppress(SandboxError):
                sandbox.kill()
            if isinstance(error, SandboxError):
                raise ProviderBusy("The provider made a sandbox that does not work.") from error
            raise
        return sandbox

    def connect(self, sandbox_id: str) -> E2BSandbox:
        if not _ID.fullmatch(sandbox_id):
            raise SandboxGone
        return E2BSandbox(self._api, sandbox_id, resources_of(self._api.info(sandbox_id)))

    def list(self, metadata: Mapping[str, str]) -> Sequence[SandboxInfo]:
        return self._api.find(metadata)

    def forget(self, template: str) -> None:
        self._api.forget(template)

    def self_check(self) -> str:
        count = len(self._api.find({}))
        template = self._api.template or "plain sandboxes, prepared each time"
        return f"{self._api.url}, {count} sandboxes live, sessions of {self._api.session_s / 60:.0f} min, {template}"


class NovitaProvider(_E2BProvider):
    """Sandboxes of Novita's."""

    service = NOVITA


class E2BProvider(_E2BProvider):
    """Sandboxes of E2B's, or of a server of one's own that E2B_DOMAIN or E2B_API_URL and E2B_SANDBOX_URL name."""

    service = E2B


def _check(command: Sequence[str], env: Mapping[str, str]) -> None:
    if any(not name or "=" in name or "\0" in name + value for name, value in env.items()):
        raise SandboxError("A variable of the environment has an impossible name or value.")
    if not command or any("\0" in argument for argument in command):
        raise SandboxError("That is no command.")


def _download(box: e2b.Sandbox, path: str, size: int) -> bytes:
    within = DATA_S + size / SLOWEST_BYTES_PER_S
    data = bytearray()
    with box.files.read(path, format="stream", user=inside.USER, request_timeout=within) as chunks:
        for chunk in chunks:
            data += chunk
            if len(data) >= size:
                break
    if len(data) < size:
        raise ConnectionError("the transfer ended early")
    return bytes(data[:size])
