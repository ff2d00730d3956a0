"""Which repository addresses and refs are accepted at all, judged before git sees them."""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from cloudagent_storage.errors import CredentialsInUrl, InvalidRef, RepositoryNotAllowed

REF_LIMIT = 255

_SCP = re.compile(
    r"(?P<user>[^\s@:/]+(?::[^\s@/]*)?)@(?P<host>[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):(?P<path>.+)"
)
_UPLOAD = re.compile(r"upload:(upl_[a-z2-7]{26})")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*|[0-9A-Fa-f:.]+")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]|[\ud800-\udfff]")
_NOT_IN_A_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\\ud800-\udfff]|\.\.|@\{|//")


def check_address(repository: str, *, local_paths_allowed: bool) -> str:
    """The normalised address: `none`, https://…, ssh://…, user@host:path, or, where allowed, a local path as it is.

    Where local paths are not, hosts that are plainly not public are not either: whoever asks from elsewhere must not
    reach into this machine's network. Raises `RepositoryNotAllowed`, and `CredentialsInUrl` when it holds a password or
    a token.
    """
    if not repository or _CONTROL.search(repository) or repository.startswith("-"):
        raise RepositoryNotAllowed()
    if repository == "none":
        return repository
    if _URL.match(repository):
        address = _check_url(repository)
        if not local_paths_allowed:
            _check_public(urlsplit(address).hostname or "")
        return address
    if scp := _SCP.fullmatch(repository):
        if ":" in scp["user"]:
            raise CredentialsInUrl()
        if not _USER.fullmatch(scp["user"]) or scp["path"].startswith("-"):
            raise RepositoryNotAllowed()
        if not local_paths_allowed:
            _check_public(scp["host"].strip("[]"))
        return repository
    if ":" in repository.partition("/")[0]:
        raise RepositoryNotAllowed()  # ext::…, file:…, and host:path, which ssh://host/path says without doubt
    if not local_paths_allowed:
        raise RepositoryNotAllowed(
            "A path on this machine is not allowed from here.",
            remedy="Pass an https:// or ssh:// address, git@host:path, or none.",
        )
    return repository


def upload_in(repository: str) -> str | None:
    """The id in `upload:upl_…`: what was uploaded to a server before; None for any other address."""
    found = _UPLOAD.fullmatch(repository)
    return None if found is None else found[1]


def is_remote(address: str) -> bool:
    """Does a checked address name another machine?"""
    return bool(_URL.match(address) or _SCP.fullmatch(address))


def check_ref(ref: str) -> str:
    """The ref, when git could have a branch, tag or commit of that name. Raises `InvalidRef`."""
    bad = (
        not ref
        or len(ref) > REF_LIMIT
        or ref == "@"
        or ref.startswith(("-", "/"))
        or ref.endswith(("/", "."))
        or _NOT_IN_A_REF.search(ref)
        or any(part.startswith(".") or part.endswith(".lock") for part in ref.split("/"))
    )
    if bad:
        raise InvalidRef()
    return ref


def _check_public(host: str) -> None:
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith((".localhost", ".local", ".internal")) or not _is_global(name):
        raise RepositoryNotAllowed(
            "That host is not public.", remedy="Pass the address of a repository that is on the public internet."
        )


def _is_global(name: str) -> bool:
    """Is this an address of the public internet, or a name? The C library also reads 127.1, 0x7f.1 and 2130706433."""
    try:
        number = ipaddress.ip_address(name)
    except ValueError:
        try:
            number = ipaddress.ip_address(socket.inet_aton(name))
        except OSError:
            return True
    mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
    return (mapped or number).is_global


def _check_url(address: str) -> str:
    try:
        url = urlsplit(address)
        port, host = url.port, url.hostname or ""
    except ValueError:
        raise RepositoryNotAllowed() from None
    scheme = url.scheme.lower()
    if scheme == "http":
        raise RepositoryNotAllowed("http:// is not encrypted.", remedy="Pass the same address with https://.")
    if scheme not in ("https", "ssh"):
        raise RepositoryNotAllowed()
    if url.password is not None or (scheme == "https" and url.username is not None):
        raise CredentialsInUrl()
    # A user or a host that begins with a hyphen would be an option of ssh.
    if url.username is not None and not _USER.fullmatch(url.username):
        raise RepositoryNotAllowed()
    if not _HOST.fullmatch(host) or url.query or url.fragment or " " in address or "\\" in address:
        raise RepositoryNotAllowed()
    user = f"{url.username}@" if url.username else ""
    place = f"[{host}]" if ":" in host else host
    return f"{scheme}://{user}{place}{'' if port is None else f':{port}'}{url.path.rstrip('/')}"
