"""Which hosts may be reached: entries of an allow-list, and what they say about a name, a port and an address.

Whatever is not listed is refused. An entry is one of

    host            the ports 80 and 443 of that very host; a name, or an address
    host:port       that port alone
    *.domain        every name below a domain, at any depth, and not the domain itself; also with a port

A name that is listed still leads nowhere but to the public internet: where it resolves to an address of this machine
or of its network, that address must be listed, too. So who owns a listed name, or answers for it, reaches nothing here.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cloudagent_storage.errors import InvalidEgress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

WEB_PORTS = frozenset({80, 443})
ENTRIES_MAX = 200

_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_][a-z0-9_-]{0,62})*")
_LOOPBACK_PORTS_FROM = 1024
"""Listening below it takes a capability that nothing in a sandbox has."""


@dataclass(frozen=True)
class Rule:
    """One entry of an allow-list."""

    host: str
    """A name or an address as `canonical_host` writes it."""
    below: bool
    """Does it mean the names below `host`, and not `host` itself?"""
    ports: frozenset[int]

    def covers(self, host: str, port: int) -> bool:
        """Is a host, written as `canonical_host` does, listed by this entry with that port?"""
        return port in self.ports and (host.endswith(f".{self.host}") if self.below else host == self.host)

    @property
    def loopback(self) -> bool:
        """Does it name this very machine?"""
        address = address_of(self.host)
        return self.host == "localhost" or (address is not None and address.is_loopback)

    def __str__(self) -> str:
        name = ("*." if self.below else "") + (f"[{self.host}]" if ":" in self.host else self.host)
        return name if self.ports == WEB_PORTS else f"{name}:{min(self.ports)}"


def parse_rule(entry: str) -> Rule:
    """An entry of an allow-list as a rule. Raises `InvalidEgress`."""
    try:
        host, port = split_host(entry.strip().removeprefix("*."), default_port=None)
        host = canonical_host(host)
    except ValueError:
        raise InvalidEgress from None
    below = entry.strip().startswith("*.")
    rule = Rule(host, below, WEB_PORTS if port is None else frozenset({port}))
    address = address_of(host)
    if below and (address is not None or "." not in host):
        raise InvalidEgress("Only names below a domain of at least two parts can be listed together.")
    if address is not None and (address.is_unspecified or address.is_multicast):
        raise InvalidEgress("That address is no host's.")
    if rule.loopback and (port is None or port < _LOOPBACK_PORTS_FROM):
        raise InvalidEgress(
            "A host that is this very machine can only be listed with a port, from 1024 up.",
            remedy="Let the program there listen on a port such as 8080, and list it as localhost:8080.",
        )
    return rule


def check_egress(hosts: Iterable[str]) -> tuple[str, ...]:
    """Entries that a task may ask for, normalised, each once.

    Addresses that are not of the public internet are for the operator to list. Raises `InvalidEgress`.
    """
    rules = list(dict.fromkeys(parse_rule(entry) for entry in hosts))
    if len(rules) > ENTRIES_MAX:
        raise InvalidEgress(f"No more than {ENTRIES_MAX} hosts can be listed.")
    for rule in rules:
        address = address_of(rule.host)
        if rule.loopback or (address is not None and not is_public(address)):
            raise InvalidEgress(
                "A host of the worker's own network cannot be asked for by a task.",
                remedy="Leave it out, or have the operator put it into SANDBOX_EGRESS.",
            )
    return tuple(str(rule) for rule in rules)


class AllowList:
    """The rules of one sandbox."""

    def __init__(self, entries: Sequence[str]) -> None:
        """Raises `InvalidEgress`."""
        self.rules = [parse_rule(entry) for entry in entries]

    def lists(self, host: str, port: int) -> bool:
        """Is that host, written as `canonical_host` does, listed with that port?"""
        return any(rule.covers(host, port) for rule in self.rules)

    def admits(self, address: Address, port: int) -> bool:
        """May a listed name lead to this address? To the public internet, and to what is listed by its address."""
        local = address.is_loopback and self.lists("localhost", port)
        return local or self.lists(str(address), port) or (is_public(address) and not _is_of_this_machine(address))

    @property
    def of_this_machine(self) -> list[tuple[str, int]]:
        """The listed addresses and ports of this machine's loopback."""
        found = [(rule.host, min(rule.ports)) for rule in self.rules if rule.loopback]
        return list(
            dict.fromkeys(
                (address, port)
                for host, port in found
                for address in (["127.0.0.1", "::1"] if host == "localhost" else [host])
            )
        )


def canonical_host(host: str) -> str:
    """The one way to write a host: a name in lower case without the last dot, or an address as `ipaddress` writes it.

    The C library also reads 127.1, 0x7f.1 and 2130706433 as addresses, and so must whoever refuses some.
    Raises ValueError for what is neither.
    """
    if ":" in host:
        address = ipaddress.IPv6Address(host)
        if address.scope_id is not None:
            raise ValueError("an address with a zone")
        return str(address.ipv4_mapped or address)
    if not host.isascii():
        host = host.encode("idna").decode("ascii")
    name = host.lower().removesuffix(".")
    if not _NAME.fullmatch(name):
        raise ValueError("not a host")
    try:
        return str(ipaddress.IPv4Address(socket.inet_aton(name)))
    except OSError:
        if name.rpartition(".")[2].isdecimal():
            raise ValueError("not an address") from None
        return name


def split_host(text: str, *, default_port: int | None) -> tuple[str, int | None]:
    """The host and the port of `host`, `host:port`, `[address]` or `[address]:port`. Raises ValueError."""
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        if ":" not in host or (rest and not rest.startswith(":")):
            raise ValueError("not a host")
        port = rest[1:] if rest else None
    elif text.count(":") > 1:
        host, port = text, None
    else:
        host, colon, rest = text.partition(":")
        port = rest if colon else None
    if port is None:
        return host, default_port
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise ValueError("not a port")
    return host, int(port)


def join_host(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_of(host: str) -> Address | None:
    """The address that a canonical host is, or None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_public(address: Address) -> bool:
    """Is this an address of the public internet, and not one that stands for another that is not?"""
    if isinstance(address, ipaddress.IPv6Address):
        # RFC 4291 mapped and compatible, RFC 3056 6to4, RFC 6052 NAT64: an IPv4 address in other clothes.
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and (address in _NAT64 or int(address) >> 32 == 0):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
        if inner is not None and not is_public(inner):
            return False
    return address.is_global and not address.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _is_of_this_machine(address: Address) -> bool:
    """Is it one of this machine's own? Only those can be bound."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True
