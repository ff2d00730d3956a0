# pyright: basic
"""The template that sandboxes of a cloud provider start from, and how the provider is had to build it.

Everything that a task needs is in it, so that preparing such a sandbox installs nothing. There is one Claude Code in
it, the one that comes with the library: a second one, from npm, would be of another version, and nobody could tell
which of the two had run.

Like `e2b_api.py`, this file wraps the SDK and translates its exceptions.
"""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cloudagent_queue.sandboxes import entry_of, inside
from cloudagent_queue.sandboxes.e2b_api import CREATE_S, E2B, NOVITA, Api
from cloudagent_queue.sandboxes.preparation import TEMPLATE_FOLDER
from cloudagent_storage.errors import (
    InvalidInput,
    ProviderBusy,
    SandboxUnavailable,
    TemplateBuildFailed,
    UnknownProvider,
)
from cloudagent_storage.records import Record

if TYPE_CHECKING:
    from e2b.template.types import BuildInfo

SERVICES = {service.name: service for service in (NOVITA, E2B)}

NODE_IMAGE = "26-trixie-slim"
"""Of Node's official images: the release with long-term support, on Debian 13, whose Python is 3.13."""
UV = "0.13.9"
PACKAGES = (
    *["git", "git-lfs", "gh", "openssh-client", "ca-certificates", "curl", "ripgrep", "jq", "less", "procps", "sudo"],
    *["python3", "python3-dev", "python3-venv", "python3-pip", "python-is-python3"],
    *["build-essential", "pkg-config", "unzip", "zip", "xz-utils"],
)

CPUS = 2
MEMORY_MB = 4096
"""Claude Code takes about 250 MB; the rest is for what it runs: builds, tests, language servers."""

BUILD_S = 1800.0
CALL_S = 30.0
SILENT_S = 60.0
"""How long a service may answer nothing about a build that goes on before it is given up."""
POLL_S = 0.5
LAST_LINES = 5
"""So much of its log is told with a build that failed."""

_PYTHON = f"{TEMPLATE_FOLDER}/bin/python"
_CLI = "import claude_agent_sdk as sdk, pathlib; print(pathlib.Path(sdk.__file__).with_name('_bundled') / 'claude')"
_TOOLS = ("claude", "git", "gh", "node", "npm", "python3", "uv", "rg", "curl", "make", "cc")
_WORKS = " && ".join(
    ["export HOME=$(mktemp -d)", f"{_PYTHON} -c 'import claude_agent_sdk'", *(f"{tool} --version" for tool in _TOOLS)]
)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


class Built(Record):
    """A template that was built."""

    provider: str
    name: str
    template_id: str
    build_id: str
    cpus: int
    memory_mb: int
    seconds: float
    sandbox_template: str
    """The value for SANDBOX_TEMPLATE: the name, or the id where the service knows no names."""


def recipe(sdk: Any) -> Any:
    """What the template is made of, for the SDK.

    The last step is run by the user that agents will be, and fails a build that lacks something. The ready command is
    the same once more, in the machine whose memory is kept: what it has read is not read from disk by later sandboxes.
    """
    library = f"claude-agent-sdk=={importlib.metadata.version('claude-agent-sdk')}"
    return (
        sdk.Template()
        .from_node_image(NODE_IMAGE)
        .apt_install([*PACKAGES], no_install_recommends=True)
        .run_cmd(
            [
                f"id {inside.USER} >/dev/null 2>&1 || useradd --create-home --shell /bin/bash {inside.USER}",
                # As in any container: what `pip install` gives the whole machine ends with it.
                r"printf '[global]\nbreak-system-packages = true\n' > /etc/pip.conf",
            ],
            user="root",
        )
        .run_cmd(
            [
                f"python3 -m venv {TEMPLATE_FOLDER}",
                f"{_PYTHON} -m pip install --no-input --no-cache-dir {library} uv=={UV}",
                f"ln -s {TEMPLATE_FOLDER}/bin/uv {TEMPLATE_FOLDER}/bin/uvx /usr/local/bin/",
                f'ln -s "$({_PYTHON} -c "{_CLI}")" /usr/local/bin/claude',
                f"chmod -R a+rX {TEMPLATE_FOLDER}",
            ],
            user="root",
        )
        .run_cmd(_WORKS, user=inside.USER)
        .set_ready_cmd(_WORKS)
    )


def default_name() -> str:
    """Names this version of the product; services take no dots in a name."""
    return re.sub(r"[^a-z0-9]+", "-", f"cloudagent-{importlib.metadata.version('cloudagent-mcp')}".lower()).strip("-")


def api_of(provider: str, env: Mapping[str, str]) -> Api:
    """The service that builds templates for a provider. `env` are the provider's variables.

    Raises `UnknownProvider`, naming the choices, and `InvalidInput` for a provider without templates.
    """
    choices = " or ".join(f"--provider {name}" for name in SERVICES)
    if (service := SERVICES.get(provider)) is not None:
        return Api(service, env, create_s=CREATE_S)
    try:
        entry_of(provider)
    except UnknownProvider:
        raise UnknownProvider(remedy=f"Templates are built with {choices}.") from None
    raise InvalidInput(
        f"{provider} has no templates: its agents use what is installed on the worker's machine.",
        remedy=f"Nothing is to be built for it. For the cloud: {choices}.",
        field="provider",
    )


def build(api: Api, *, name: str, cpus: int, memory_mb: int, tell: Callable[[str], None]) -> Built:
    """Build the template and wait for it; `tell` is given each line of the log as it comes.

    Raises `InvalidInput` for an impossible name, `SandboxUnavailable` with the remedy where the service refuses,
    `ProviderBusy` where it may do it later, and `TemplateBuildFailed`, with the last lines of the log.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            "A template cannot have that name.",
            remedy="Use lower-case letters, digits, - and _; at most 64, the first a letter or a digit.",
            field="name",
        )
    began, last = time.monotonic(), deque[str](maxlen=LAST_LINES)

    def hear(entry: Any) -> None:
        for line in entry.message.splitlines():
            last.append(_printable(line))
            tell(last[-1])

    sdk, options = api.sdk, api.options(CALL_S)
    try:
        begun = sdk.Template.build_in_background(
            recipe(sdk), name, cpu_count=cpus, memory_mb=memory_mb, on_build_logs=hear, **options
        )
    except Exception as error:
        raise _refusal(api, error) from error
    reason = _await_end(api, begun, hear, until=began + BUILD_S)
    if reason is not None:
        log = "".join(f"\n  | {line}" for line in last)
        raise TemplateBuildFailed(f"{api.service.title} could not build the template: {reason}{log}")
    return Built(
        provider=api.service.name,
        name=name,
        template_id=begun.template_id,
        build_id=begun.build_id,
        cpus=cpus,
        memory_mb=memory_mb,
        seconds=round(time.monotonic() - began, 1),
        sandbox_template=name if _is_known(api, name) else begun.template_id,
    )


def _await_end(api: Api, begun: BuildInfo, hear: Callable[[Any], None], *, until: float) -> str | None:
    """Follow a build to its end; why it failed, or None."""
    # Not the SDK's own loop, which gives a build up at the first answer that is lost, and else waits for ever.
    sdk, options = api.sdk, api.options(CALL_S)
    offset, answered = 0, time.monotonic()
    while True:
        now = time.monotonic()
        if now > until:
            return f"it has taken more than {BUILD_S / 60:.0f} minutes, and may still go on there"
        try:
            state = sdk.Template.get_build_status(begun, offset, **options)
        except Exception as error:
            if isinstance(error, sdk.AuthenticationException) or now - answered > SILENT_S:
                raise _refusal(api, error) from error
            time.sleep(POLL_S)
            continue
        answered = now
        for entry in state.log_entries:
            hear(entry)
        offset += len(state.log_entries)
        # An answer has a hundred lines at most: those that are left come first, also after the end.
        if not state.log_entries and state.status is sdk.TemplateBuildStatus.READY:
            return None
        if not state.log_entries and state.status is sdk.TemplateBuildStatus.ERROR:
            reason = state.reason
            step = f" (step {_printable(str(reason.step))})" if reason is not None and reason.step else ""
            return (_printable(reason.message) if reason is not None else "it does not say why") + step
        time.sleep(POLL_S)


def _is_known(api: Api, name: str) -> bool:
    try:
        return api.sdk.Template.exists(name, **api.options())
    except Exception:
        return False


def _refusal(api: Api, error: Exception) -> SandboxUnavailable:
    """Why a service builds nothing. The SDK's exceptions mostly have no status but in their text: `404: …`."""
    title, text = api.service.title, str(error)
    found = re.match(r"(\d{3}): (.*)", text, re.DOTALL)
    status = getattr(error, "status_code", None) or (int(found[1]) if found else None)
    said = _printable(found[2] if found else "")
    if isinstance(error, api.sdk.AuthenticationException):
        return api.key_refused()
    if status == 402 or (status in (400, 403) and re.search("quota|limit|billing|balance|blocked", said, re.I)):
        return SandboxUnavailable(
            f"{title} does not let this account build that ({status}): {said}",
            remedy=f"Ask for less with --cpus and --memory-mb, or look at the plan on {title}'s billing page.",
        )
    if status == 403:
        return api.key_refused()
    if status in (404, 405, 501):
        return SandboxUnavailable(
            f"{title} does not know the call that builds templates ({status}).",
            remedy=f"Check {api.address_variable}. Where it offers no builds, name a template that was made in its own "
            "way in SANDBOX_TEMPLATE; or leave that empty: each sandbox is then prepared first, a minute or more.",
        )
    if status == 429:
        return ProviderBusy(f"{title} gets too many requests, or builds as much for this account as it may (429).")
    if status is not None and status >= 500:
        return ProviderBusy(f"{title} failed to build the template ({status}).", remedy="Try again in a few minutes.")
    if status is not None:
        return SandboxUnavailable(
            f"{title} refuses to build the template ({status}): {said}", remedy="Correct --name, --cpus or --memory-mb."
        )
    # The SDK fails on an answer of another form, and its status is lost with it.
    answered = isinstance(error, ValueError | LookupError | api.sdk.BuildException)
    what = "answers with what is none of its API's" if answered else "does not answer"
    return ProviderBusy(
        f"{title} {what} at its address.", remedy=f"Check {api.address_variable} and the network, and try again."
    )


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text).strip()[:500]
