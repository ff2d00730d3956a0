# pyright: basic
"""Sandboxes in the cloud, through the `e2b` SDK: Novita, E2B, and servers of one's own that speak the same protocol.

The control plane makes, finds and kills sandboxes; a daemon in each runs commands and takes files. All that is done in
a sandbox goes through `inside.py`, which is put there first, in short calls that may be repeated. No call holds a
stream for as long as an agent or a command runs: streams get cut, and one that hangs looks like one that waits.

Every exception of the SDK, and of the HTTP clients below it, is translated here. What does not answer is
`SandboxUnreachable`; only the control plane, asked again, makes it `SandboxGone`.
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
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cloudagent_queue.sandboxes import (
    PLAIN,
    CommandResult,
    Resources,
    SandboxInfo,
    SandboxSpec,
    inside,
    preparation,
    safe_files,
)
from cloudagent_storage.errors import (
    ProviderBusy,
    SandboxError,
    SandboxGone,
    SandboxUnavailable,
    SandboxUnreachable,
)

if TYPE_CHECKING:
    import e2b
    import httpx

log = logging.getLogger(__name__)

T = TypeVar("T")

INLINE_MAX = 64_000
"""Up to so many bytes, compressed, travel in a call's environment, of which the kernel takes 128 KB a variable."""
CONTROL_S = 15.0
CALL_S = 25.0
CREATE_S = 60.0
WAIT_S = 15.0
"""How long one call waits for a command of `run`; then the next one goes on waiting."""
TRY_AGAIN_WITHIN_S = 30.0
SLOWEST_BYTES_PER_S = 200_000
PREPARE_S = 600.0
_TRIES = 3
_MARK = "cloudagent_create"
"""The key of a create's own mark in its metadata: what we find by it was made by that create and no other."""
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_DENY_ALL = "0.0.0.0/0"
_INSIDE = Path(inside.__file__)
_CALL = f"exec {inside.FOLDER}/python -I -S {inside.FOLDER}/inside.py"
_NO_SUCH_PROGRAM = (126, 127)


@dataclass(frozen=True)
class Service:
    """Somebody who offers sandboxes of this protocol."""

    name: str
    title: str
    key: str
    """The variable with the API key; the next one is what such keys begin with."""
    prefix: str
    domain: str
    """The variable with the domain."""
    default_domain: str
    where_keys_are: str


NOVITA = Service(
    "novita",
    "Novita",
    key="NOVITA_API_KEY",
    prefix="nvta_",
    domain="NOVITA_DOMAIN",
    default_domain="us-phx-1.sandbox.novita.ai",
    where_keys_are="https://novita.ai/settings/key-management",
)
E2B = Service(
    "e2b",
    "E2B",
    key="E2B_API_KEY",
    prefix="e2b_",
    domain="E2B_DOMAIN",
    default_domain="e2b.app",
    where_keys_are="https://e2b.dev/dashboard?tab=keys",
)


class E2BSandbox:
    """A sandbox of a provider's, reached through its API."""

    root = inside.ROOT
    python = f"{inside.FOLDER}/python"

    def __init__(self, api: _Api, sandbox_id: str, resources: Resources | None, remark: str | None = None) -> None:
        self.id = sandbox_id
        self.resources = resources
        self.remark = remark
        self._api = api
        self._attached: e2b.Sandbox | None = None
        self._attaching = threading.Lock()

    def start(self, command: Sequence[str], *, env: Mapping[str, str]) -> None:
        _check(command, env)
        answer = self._call("start", command=list(command), env=dict(env), token=secrets.token_hex(16))
        if not answer["started"]:
            raise SandboxError("The sandbox has run its command already.")

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
        within = CALL_S + len(data) / SLOWEST_BYTES_PER_S
        self._repeat(
            lambda box: box.files.write(f"{inside.STAGING}/{staged}", data, user=inside.USER, request_timeout=within)
        )
        self._call("write", path=parts, data=None, staged=staged)

    def output(self, *, max_bytes: int = 40_000) -> bytes:
        return zlib.decompress(base64.b64decode(self._call("output", max_bytes=max_bytes)["data"]))[-max_bytes:]

    def extend(self, seconds: float) -> None:
        """Raises `SandboxError` when the provider does not keep a sandbox for that long."""
        until = int(min(seconds, self._api.session_s))
        self._api.about(self.id, lambda sdk, options: sdk.Sandbox.set_timeout(self.id, until, **options))

    def blocked(self) -> Sequence[str]:
        return ()  # the protocol has no way to ask

    def snapshot(self) -> str | None:
        def create(sdk: Any, options: dict[str, Any]) -> str | None:
            try:
                return sdk.Sandbox.create_snapshot(self.id, **options).snapshot_id
            except sdk.SandboxNotFoundException:
                raise
            except sdk.SandboxException as error:
                if error.status_code in (400, 403, 404, 405, 501):
                    return None  # this provider, or this plan, has none
                raise

        found = self._api.about(self.id, create, within_s=CREATE_S * 3)
        self._attached = None  # it was paused meanwhile
        return found

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
                    command, user="root", cwd="/", envs={"CLOUDAGENT_LIBRARY": library}, timeout=CALL_S
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
                printed = box.commands.run(script, user="root", cwd="/", envs=envs, timeout=CALL_S).stdout
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

    def use(self, attached: e2b.Sandbox) -> None:
        """Spare the first call asking for what the create told."""
        self._attached = attached


class _Api:
    """The control plane of one service."""

    def __init__(self, service: Service, env: Mapping[str, str], *, create_s: float) -> None:
        self.service = service
        self.domain = env.get(service.domain) or service.default_domain
        own = service is E2B
        self.url = (env.get("E2B_API_URL") if own else None) or f"https://api.{self.domain}"
        self._sandbox_url = (env.get("E2B_SANDBOX_URL") if own else None) or None
        self.at_home = self.url == f"https://api.{service.default_domain}"
        self.template = env.get("SANDBOX_TEMPLATE") or None
        self.session_s = float(env.get("SANDBOX_SESSION_MINUTES") or 60) * 60
        self._key = env.get(service.key) or ""
        self._create_s = create_s

    @property
    def sdk(self) -> Any:
        # Late, because it takes a second. Its process-wide pools need no tuning: this version has no limit of
        # connections any more (E2B_MAX_CONNECTIONS is not read), and no call of ours keeps one for long.
        import e2b

        return e2b

    @property
    def build_a_template(self) -> str:
        return (
            f"Build a template with `ca template build --provider {self.service.name}` and set SANDBOX_TEMPLATE to it."
        )

    def options(self, within_s: float = CONTROL_S) -> dict[str, Any]:
        """What every call is told. All of it, or the SDK would look into the environment for the rest."""
        if not self._key:
            raise SandboxUnavailable(
                f"There is no API key for {self.service.title}.",
                remedy=f"Set {self.service.key}; keys are made at {self.service.where_keys_are}.",
            )
        return {
            "api_key": self._key,
            "domain": self.domain,
            "api_url": self.url,
            "debug": False,
            "request_timeout": within_s,
        }

    def create(self, spec: SandboxSpec, metadata: Mapping[str, str]) -> E2BSandbox:
        mark = secrets.token_hex(16)
        template = spec.template or self.template or self.sdk.Sandbox.default_template
        body: dict[str, Any] = {
            "templateID": template,
            "timeout": int(self.session_s),
            "metadata": {**metadata, _MARK: mark},
            "secure": True,
            "allow_internet_access": spec.egress is None or bool(spec.egress),
        }
        if spec.egress:
            body["network"] = {"allowOut": _hosts(spec.egress), "denyOut": [_DENY_ALL]}
        response, cause = None, None
        try:
            response = self._post("/sandboxes", body)
        except SandboxUnavailable:
            raise
        except Exception as error:
            cause = error
        if response is not None and response.is_success:
            with suppress(ValueError, KeyError, TypeError):
                return self._created(response.json())
        if (
            response is not None
            and response.status_code < 500
            and not response.is_success
            and response.status_code != 408
        ):
            raise self._refusal(response, named=bool(spec.template or self.template))
        if (found := self._made_nevertheless(mark, response)) is not None:
            return found
        if response is None:
            message = f"{self.service.title} does not answer at its address."
            remedy = (
                f"Check {self._address_variable} and the network; or name another provider in SANDBOX_PROVIDER as well."
            )
            raise ProviderBusy(message, remedy=remedy) from cause
        raise ProviderBusy(
            f"{self.service.title} failed to make a sandbox ({response.status_code}).",
            retry_after_s=_retry_after(response),
        )

    def find(self, metadata: Mapping[str, str]) -> list[SandboxInfo]:
        """The sandboxes that have all of this in their metadata, whether or not the service can filter."""
        sdk, options = self.sdk, self.options()
        try:
            pages = sdk.Sandbox.list(sdk.SandboxQuery(metadata=dict(metadata)) if metadata else None, **options)
            found = []
            while pages.has_next:
                found += pages.next_items()
        except sdk.AuthenticationException as error:
            raise self._key_refused() from error
        except Exception as error:
            if getattr(error, "status_code", None) == 403:
                raise self._key_refused() from error
            raise SandboxUnreachable(
                f"{self.service.title} does not say which sandboxes there are.",
                remedy=f"Check {self._address_variable} and the network, and try again.",
            ) from error
        return [
            SandboxInfo(id=info.sandbox_id, metadata={k: v for k, v in info.metadata.items() if k != _MARK})
            for info in found
            if metadata.items() <= info.metadata.items()
        ]

    def about(self, sandbox_id: str, call: Callable[[Any, dict[str, Any]], T], *, within_s: float = CONTROL_S) -> T:
        """A call of the control plane about one sandbox, which may be repeated.

        Raises `SandboxGone` when it answers that there is none, `SandboxError` when it refuses, and else
        `SandboxUnreachable`.
        """
        sdk, options = self.sdk, self.options(within_s)
        try:
            return call(sdk, options)
        except sdk.SandboxNotFoundException as error:
            raise SandboxGone from error
        except sdk.AuthenticationException as error:
            raise self._unreachable_without_key() from error
        except Exception as error:
            if getattr(error, "status_code", None) == 403:
                raise self._unreachable_without_key() from error
            if getattr(error, "status_code", None) == 400:
                raise SandboxError(f"{self.service.title} refuses to do that with the sandbox.") from error
            raise SandboxUnreachable from error

    def info(self, sandbox_id: str) -> e2b.SandboxInfo:
        return self.about(sandbox_id, lambda sdk, options: sdk.Sandbox.get_info(sandbox_id, **options))

    def confirm(self, sandbox_id: str) -> None:
        """Ask whether a sandbox lives. Raises `SandboxGone` when not, `SandboxUnreachable` when nobody can tell."""
        self.info(sandbox_id)

    def kill(self, sandbox_id: str) -> None:
        for last in (False, True):
            try:
                if self.about(sandbox_id, lambda sdk, options: sdk.Sandbox.kill(sandbox_id, **options)):
                    return
                self.confirm(sandbox_id)
            except SandboxGone:
                return
            except SandboxUnreachable:
                if last:
                    raise
        raise SandboxUnreachable("The sandbox is said to be gone, and to live.")

    def attach(self, sandbox_id: str) -> e2b.Sandbox:
        """Get the token of a sandbox's daemon. Its time to live stays as it is."""

        def connect(sdk: Any, options: dict[str, Any]) -> e2b.Sandbox:
            info = sdk.Sandbox.get_info(sandbox_id, **options)
            left = max(60, int((info.end_at - datetime.now(UTC)).total_seconds()))
            url = self._data_url(sandbox_id, info.sandbox_domain)
            return sdk.Sandbox.connect(sandbox_id, timeout=left, **{**options, "sandbox_url": url})

        return self.about(sandbox_id, connect)

    def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        # Through the SDK's own client but not its function, which drops what is needed after a failure: Retry-After,
        # and the status of an answer that is no JSON. And it would wait by itself when asked to come back later, while
        # another provider could do the work at once.
        from e2b.api.client_sync import get_api_client
        from e2b.connection_config import ConnectionConfig

        config = ConnectionConfig(**self.options(self._create_s), retries=0)
        return get_api_client(config).get_httpx_client().request("POST", path, json=body)

    def _created(self, answer: dict[str, Any]) -> E2BSandbox:
        from e2b.connection_config import ConnectionConfig
        from packaging.version import Version

        sandbox_id, domain, token = answer["sandboxID"], answer.get("domain"), answer.get("envdAccessToken")
        headers = {"E2b-Sandbox-Id": sandbox_id, "E2b-Sandbox-Port": str(ConnectionConfig.envd_port)}
        if token:
            headers["X-Access-Token"] = token
        config = ConnectionConfig(
            **self.options(CALL_S), sandbox_url=self._data_url(sandbox_id, domain), extra_sandbox_headers=headers
        )
        attached = self.sdk.Sandbox(
            sandbox_id=sandbox_id,
            sandbox_domain=domain,
            envd_version=Version(answer["envdVersion"]),
            envd_access_token=token,
            traffic_access_token=answer.get("trafficAccessToken"),
            connection_config=config,
        )
        resources = None
        with suppress(SandboxError):
            resources = _resources(self.info(sandbox_id))
        sandbox = E2BSandbox(self, sandbox_id, resources)
        sandbox.use(attached)
        return sandbox

    def _made_nevertheless(self, mark: str, response: httpx.Response | None) -> E2BSandbox | None:
        """Adopt what a create made that ended in an error. One that is found twice stays with the sweeper."""
        busy = response is not None and response.status_code == 503  # by definition, nothing was done
        for pause in (0.0,) if busy else (0.0, 0.5, 1.5, 3.0):
            time.sleep(pause)
            with suppress(SandboxError):
                for info in self.find({_MARK: mark}):
                    log.warning("%s made %s, and answered with an error", self.service.title, info.id)
                    return E2BSandbox(self, info.id, _resources(self.info(info.id)))
        return None

    def _refusal(self, response: httpx.Response, *, named: bool) -> SandboxUnavailable:
        status, said = response.status_code, ""
        with suppress(ValueError, AttributeError):
            said = str(response.json().get("message", "")).lower()
        title = self.service.title
        if status == 429:
            return ProviderBusy(
                f"{title} has no room for another sandbox of this account, or gets too many requests (429).",
                retry_after_s=_retry_after(response),
            )
        if "template" in said and status in (400, 403, 404):
            name = "the template that SANDBOX_TEMPLATE names" if named else "its template `base`"
            return SandboxUnavailable(
                f"{title} does not have {name}.",
                remedy=f"Correct SANDBOX_TEMPLATE, or build one: `ca template build --provider {self.service.name}`. "
                "A template belongs to one account and one region.",
            )
        if status in (401, 403):
            return self._key_refused()
        if status in (404, 405):
            return SandboxUnavailable(
                f"{title} has no such call to make a sandbox ({status}): it speaks another version of the API.",
                remedy=f"Check {self._address_variable}; this release speaks the API of the e2b SDK "
                f"{importlib.metadata.version('e2b')}.",
            )
        if status == 402 or "quota" in said or "billing" in said or "balance" in said:
            return SandboxUnavailable(
                f"{title} wants the account to be paid for ({status}).", remedy=f"Look at the billing page of {title}."
            )
        if "timeout" in said:
            return SandboxUnavailable(
                f"{title} does not keep a sandbox for {self.session_s / 60:.0f} minutes with this account.",
                remedy="Lower SANDBOX_SESSION_MINUTES; plans without payment mostly allow 60.",
            )
        return SandboxUnavailable(
            f"{title} refuses to make a sandbox ({status}).",
            remedy=f"Run `ca doctor --provider {self.service.name}`.",
        )

    def _key_refused(self) -> SandboxUnavailable:
        service = self.service
        other = next(
            (other for other in (NOVITA, E2B) if other is not service and self._key.startswith(other.prefix)), None
        )
        if other is not None:
            return SandboxUnavailable(
                f"{service.title} refuses the API key: it is one of {other.title}'s.",
                remedy=f"Set {service.key} to a key that begins with {service.prefix}, "
                f"or {other.key} to this one and SANDBOX_PROVIDER={other.name}.",
            )
        looks = f" Keys of {service.title} begin with {service.prefix}." if self.at_home else ""
        if self.at_home and self._key.startswith(service.prefix):
            looks = " Or the domain is another region's."
        return SandboxUnavailable(
            f"{service.title} refuses the API key.",
            remedy=f"Correct {service.key}; keys are made at {service.where_keys_are}.{looks}",
        )

    def _unreachable_without_key(self) -> SandboxUnreachable:
        refused = self._key_refused()
        return SandboxUnreachable(refused.message, remedy=refused.remedy)

    @property
    def _address_variable(self) -> str:
        return "E2B_DOMAIN or E2B_API_URL" if self.service is E2B else self.service.domain

    def _data_url(self, sandbox_id: str, domain: str | None) -> str:
        from e2b.connection_config import ConnectionConfig
        from e2b.sandbox_domains import is_supported_sandbox_domain

        # Always given to the SDK: else it takes E2B_SANDBOX_URL for Novita's sandboxes, too, where both are in use.
        domain = domain or self.domain
        if self._sandbox_url is not None:
            return self._sandbox_url
        if is_supported_sandbox_domain(domain):
            return f"https://sandbox.{domain}"
        return f"https://{ConnectionConfig.envd_port}-{sandbox_id}.{domain}"


class _E2BProvider:
    """What the providers of this module share: all but whose they are."""

    service: Service
    place: str | None = None

    def __init__(self, env: Mapping[str, str], *, create_s: float = CREATE_S) -> None:
        """`env` are the provider's variables; `create_s` is how long a create may take."""
        self.name = self.service.name
        self._api = _Api(self.service, env, create_s=create_s)
        self.session_cap_s: float | None = self._api.session_s

    def create(self, spec: SandboxSpec = PLAIN, *, metadata: Mapping[str, str]) -> E2BSandbox:
        sandbox = self._api.create(spec, metadata)
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
        return E2BSandbox(self._api, sandbox_id, _resources(self._api.info(sandbox_id)))

    def list(self, metadata: Mapping[str, str]) -> Sequence[SandboxInfo]:
        return self._api.find(metadata)

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
    within = CALL_S + size / SLOWEST_BYTES_PER_S
    data = bytearray()
    with box.files.read(path, format="stream", user=inside.USER, request_timeout=within) as chunks:
        for chunk in chunks:
            data += chunk
            if len(data) >= size:
                break
    if len(data) < size:
        raise ConnectionError("the transfer ended early")
    return bytes(data[:size])


def _resources(info: e2b.SandboxInfo) -> Resources:
    return Resources(cpus=info.cpu_count, memory_mb=info.memory_mb)


def _hosts(egress: Sequence[str]) -> list[str]:
    """The protocol knows no ports: `host:port` is that host, on those that the provider filters by name."""
    return sorted({re.sub(r":\d+$", "", entry) for entry in egress})


def _retry_after(response: httpx.Response) -> float | None:
    with suppress(KeyError, ValueError):
        return max(0.0, float(response.headers["Retry-After"]))
    return None
