# pyright: basic
"""The control plane of a service that speaks E2B's protocol: makes, finds and kills sandboxes, and says why not.

Like `e2b.py` beside it, it wraps the SDK and translates its exceptions. What does not answer is `SandboxUnreachable`;
`SandboxGone` only comes from an answer that says so.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from cloudagent_queue.sandboxes import Resources, SandboxInfo, SandboxSpec
from cloudagent_storage.errors import (
    ProviderBusy,
    SandboxError,
    SandboxGone,
    SandboxUnavailable,
    SandboxUnreachable,
    TemplateNotFound,
)

if TYPE_CHECKING:
    import e2b
    import httpx

log = logging.getLogger(__name__)

T = TypeVar("T")

CONTROL_S = 15.0
"""For writing a request, and again for reading its answer: a service that is silent is given up after both."""
CREATE_S = 60.0
KILL_S = 10.0
LOOK_FOR_S = 15.0
"""How long to look for what a failed create may have made."""
DATA_S = 25.0
"""How long a request to a sandbox's daemon may take where nothing else is said."""
_MARK = "cloudagent_create"
"""The key of a create's own mark in its metadata: what we find by it was made by that create and no other."""
_DENY_ALL = "0.0.0.0/0"


@dataclass(frozen=True)
class Service:
    """Somebody who offers sandboxes of this protocol."""

    name: str
    title: str
    key: str
    """The variable with the API key; the next one is what such keys begin with."""
    prefix: str
    domain: str
    """The variable with the domain; the next two are those with addresses of its API and of its sandboxes instead."""
    api_url: str
    sandbox_url: str
    default_domain: str
    where_keys_are: str


NOVITA = Service(
    "novita",
    "Novita",
    key="NOVITA_API_KEY",
    prefix="nvta_",
    domain="NOVITA_DOMAIN",
    api_url="NOVITA_API_URL",
    sandbox_url="NOVITA_SANDBOX_URL",
    default_domain="us-phx-1.sandbox.novita.ai",
    where_keys_are="https://novita.ai/settings/key-management",
)
E2B = Service(
    "e2b",
    "E2B",
    key="E2B_API_KEY",
    prefix="e2b_",
    domain="E2B_DOMAIN",
    api_url="E2B_API_URL",
    sandbox_url="E2B_SANDBOX_URL",
    default_domain="e2b.app",
    where_keys_are="https://e2b.dev/dashboard?tab=keys",
)


@dataclass(frozen=True)
class Made:
    """A sandbox that was made."""

    id: str
    resources: Resources | None
    attached: e2b.Sandbox | None = None
    """The way into it, where the create told it."""


class Api:
    """The control plane of one service."""

    def __init__(self, service: Service, env: Mapping[str, str], *, create_s: float) -> None:
        self.service = service
        self.domain = env.get(service.domain) or service.default_domain
        self.url = env.get(service.api_url) or f"https://api.{self.domain}"
        self._sandbox_url = env.get(service.sandbox_url) or None
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

    def options(self, within_s: float | None = None) -> dict[str, Any]:
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
            "request_timeout": within_s or CONTROL_S,
        }

    def create(self, spec: SandboxSpec, metadata: Mapping[str, str]) -> Made:
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
        # Without a connection nothing was asked for, and another provider is the sooner tried.
        if type(cause).__name__ != "ConnectError" and (found := self._made_nevertheless(mark, response)) is not None:
            return found
        if response is None:
            message = f"{self.service.title} does not answer at its address."
            remedy = (
                f"Check {self.address_variable} and the network; or name another provider in SANDBOX_PROVIDER as well."
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
            raise self.key_refused() from error
        except Exception as error:
            status = getattr(error, "status_code", None)
            if status == 403:
                raise self.key_refused() from error
            if status in (404, 405):
                raise self.other_api("lists sandboxes", status) from error
            raise SandboxUnreachable(
                f"{self.service.title} does not say which sandboxes there are.",
                remedy=f"Check {self.address_variable} and the network, and try again.",
            ) from error
        return [
            SandboxInfo(id=info.sandbox_id, metadata={k: v for k, v in info.metadata.items() if k != _MARK})
            for info in found
            if metadata.items() <= info.metadata.items()
        ]

    def about(self, sandbox_id: str, call: Callable[[Any, dict[str, Any]], T], *, within_s: float | None = None) -> T:
        """A call of the control plane about one sandbox, which may be repeated.

        Raises `SandboxGone` when there is none of that id, `SandboxError` when the service refuses, or has no such
        call, and else `SandboxUnreachable`.
        """
        sdk, options = self.sdk, self.options(within_s)
        try:
            return call(sdk, options)
        except sdk.SandboxNotFoundException as error:
            self.confirm(sandbox_id)
            # The SDK says this of every 404, also where the service has no such call.
            raise SandboxError(f"{self.service.title} cannot do that with a sandbox.") from error
        except Exception as error:
            if getattr(error, "status_code", None) in (400, 405, 501):
                raise SandboxError(f"{self.service.title} refuses to do that with the sandbox.") from error
            raise self._out_of_reach(error) from error

    def info(self, sandbox_id: str) -> e2b.SandboxInfo:
        """What the service knows of a sandbox: the one call whose "not found" counts.

        Raises `SandboxGone` or `SandboxUnreachable`.
        """
        sdk, options = self.sdk, self.options()
        try:
            return sdk.Sandbox.get_info(sandbox_id, **options)
        except sdk.SandboxNotFoundException as error:
            raise SandboxGone from error
        except Exception as error:
            raise self._out_of_reach(error) from error

    def confirm(self, sandbox_id: str) -> None:
        """Ask whether a sandbox lives. Raises `SandboxGone` when not, `SandboxUnreachable` when nobody can tell."""
        self.info(sandbox_id)

    def keep(self, sandbox_id: str, seconds: float) -> None:
        """Let a sandbox live that long from now: not beyond its session cap, and never shorter than it would."""
        info = self.info(sandbox_id)
        now = datetime.now(UTC)
        until = min(now + timedelta(seconds=seconds), info.started_at + timedelta(seconds=self.session_s))
        if until > info.end_at:
            left = int((until - now).total_seconds())
            self.about(sandbox_id, lambda sdk, options: sdk.Sandbox.set_timeout(sandbox_id, left, **options))

    def forget(self, snapshot: str) -> None:
        """Delete a snapshot; one that the service does not know is gone."""
        sdk, options = self.sdk, self.options()
        try:
            sdk.Sandbox.delete_snapshot(snapshot, **options)
        except Exception as error:
            if getattr(error, "status_code", None) in (400, 405, 409, 501):
                raise SandboxError(f"{self.service.title} refuses to delete the snapshot.") from error
            raise self._out_of_reach(error) from error

    def kill(self, sandbox_id: str) -> None:
        """Returns when the service says that there is no such sandbox; that it was killed, a proxy might say, too."""
        deadline = time.monotonic() + KILL_S
        while True:
            try:
                self.about(sandbox_id, lambda sdk, options: sdk.Sandbox.kill(sandbox_id, **options))
                self.confirm(sandbox_id)
            except SandboxGone:
                return
            except SandboxError:
                if time.monotonic() > deadline:
                    raise
            if time.monotonic() > deadline:
                raise SandboxUnreachable("The sandbox was killed, and is said to live.")
            time.sleep(0.5)

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
        # Its transport has one limit for a whole request: the sum of those for writing and for reading.
        return get_api_client(config).get_httpx_client().request("POST", path, json=body, timeout=self._create_s / 2)

    def _created(self, answer: dict[str, Any]) -> Made:
        from e2b.connection_config import ConnectionConfig
        from packaging.version import Version

        sandbox_id, domain, token = answer["sandboxID"], answer.get("domain"), answer.get("envdAccessToken")
        headers = {"E2b-Sandbox-Id": sandbox_id, "E2b-Sandbox-Port": str(ConnectionConfig.envd_port)}
        if token:
            headers["X-Access-Token"] = token
        config = ConnectionConfig(
            **self.options(DATA_S), sandbox_url=self._data_url(sandbox_id, domain), extra_sandbox_headers=headers
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
            resources = resources_of(self.info(sandbox_id))
        return Made(sandbox_id, resources, attached)

    def _made_nevertheless(self, mark: str, response: httpx.Response | None) -> Made | None:
        """Adopt what a create made that ended in an error. One that is found twice stays with the sweeper."""
        busy = response is not None and response.status_code == 503  # by definition, nothing was done
        deadline = time.monotonic() + LOOK_FOR_S
        for pause in (0.0,) if busy else (0.0, 0.5, 1.5, 3.0):
            time.sleep(pause)
            if time.monotonic() > deadline:
                break
            with suppress(SandboxError):
                for info in self.find({_MARK: mark}):
                    log.warning("%s made %s, and answered with an error", self.service.title, info.id)
                    return Made(info.id, resources_of(self.info(info.id)))
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
            return TemplateNotFound(
                f"{title} does not have {name}.",
                remedy=f"Correct SANDBOX_TEMPLATE, or build one: `ca template build --provider {self.service.name}`. "
                "A template belongs to one account and one region.",
            )
        if status in (401, 403):
            return self.key_refused()
        if status in (404, 405):
            return self.other_api("makes a sandbox", status)
        if status == 402 or "quota" in said or "billing" in said or "balance" in said:
            return SandboxUnavailable(
                f"{title} wants the account to be paid for ({status}).", remedy=f"Look at the billing page of {title}."
            )
        if "timeout" in said or "instance length" in said:
            return SandboxUnavailable(
                f"{title} does not keep a sandbox for {self.session_s / 60:.0f} minutes with this account.",
                remedy="Lower SANDBOX_SESSION_MINUTES; plans without payment mostly allow 60.",
            )
        return SandboxUnavailable(
            f"{title} refuses to make a sandbox ({status}).",
            remedy=f"Run `ca doctor --provider {self.service.name}`.",
        )

    def other_api(self, call: str, status: int) -> SandboxUnavailable:
        return SandboxUnavailable(
            f"{self.service.title} does not know the call that {call} ({status}): it has another version of the API.",
            remedy=f"Check {self.address_variable}; this release uses the API of the e2b SDK "
            f"{importlib.metadata.version('e2b')}.",
        )

    def key_refused(self) -> SandboxUnavailable:
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

    def _out_of_reach(self, error: Exception) -> SandboxUnreachable:
        if isinstance(error, self.sdk.AuthenticationException) or getattr(error, "status_code", None) == 403:
            refused = self.key_refused()
            return SandboxUnreachable(refused.message, remedy=refused.remedy)
        return SandboxUnreachable()

    @property
    def address_variable(self) -> str:
        if self.service is E2B:
            return "E2B_DOMAIN or E2B_API_URL"
        return f"{self.service.domain}, which names a region, such as {self.service.default_domain},"

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


def resources_of(info: e2b.SandboxInfo) -> Resources:
    """What a sandbox occupies."""
    return Resources(cpus=info.cpu_count, memory_mb=info.memory_mb)


def _hosts(egress: Sequence[str]) -> list[str]:
    """The protocol knows no ports: `host:port` is that host, on those that the provider filters by name."""
    return sorted({re.sub(r":\d+$", "", entry) for entry in egress})


def _retry_after(response: httpx.Response) -> float | None:
    with suppress(KeyError, ValueError):
        return max(0.0, float(response.headers["Retry-After"]))
    return None
