"""What sandboxes cost, by a table of prices that the operator can edit; a price that nobody knows is not 0."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cloudagent_queue.sandboxes import Resources
from cloudagent_storage.errors import InvalidInput
from cloudagent_storage.records import Usage

SIZE_LIMIT = 64 * 1024
VARIABLE = "SANDBOX_PRICES"
MB_PER_GIB = 1024

# Above a cent per second somebody has written a price by the hour.
PerSecond = Annotated[float, Field(ge=0, le=0.01, allow_inf_nan=False)]


class Price(BaseModel):
    """What one provider asks for, in US dollars."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    vcpu_second: PerSecond
    """For a vCPU that a sandbox has for a second."""
    gib_second: PerSecond
    """For a GiB of memory that it has for a second."""

    def of(self, resources: Resources) -> float:
        """What a sandbox of this size costs in a second."""
        return self.vcpu_second * resources.cpus + self.gib_second * resources.memory_mb / MB_PER_GIB

    @property
    def free(self) -> bool:
        return self.vcpu_second == 0 and self.gib_second == 0


class Prices:
    """The prices of all providers whose prices are known."""

    def __init__(self, prices: Mapping[str, Price]) -> None:
        self._prices = prices

    @classmethod
    def read(cls, own: Path | None = None) -> Prices:
        """The list prices that come along, those in the operator's `own` file in their place.

        Raises `InvalidInput` that names `SANDBOX_PRICES` and the key, for a file that cannot be read or used.
        """
        return cls({**_list_prices(), **({} if own is None else _read(own))})

    def cost_usd(self, provider: str, resources: Resources | None, seconds: float) -> float | None:
        """What a sandbox of that provider and size costs in so many seconds; None where that is not known."""
        price = self._prices.get(provider)
        if price is None:
            return None
        if price.free:
            return 0.0
        return None if resources is None else price.of(resources) * seconds

    def charged(self, usage: Usage, provider: str, resources: Resources | None, seconds: float) -> Usage:
        """A task's usage with another stretch of a sandbox's life in it.

        Its cost is known where that of every stretch is.
        """
        cost, before = self.cost_usd(provider, resources, seconds), usage.sandbox_cost_usd
        if before is None and usage.sandbox_seconds == 0:
            before = 0.0
        return usage.model_copy(
            update={
                "sandbox_seconds": round(usage.sandbox_seconds + seconds, 3),
                "sandbox_cost_usd": None if cost is None or before is None else round(before + cost, 9),
            }
        )

    def told(self, provider: str) -> str:
        """A provider's price in words."""
        price = self._prices.get(provider)
        if price is None:
            return f"{provider}: not known; {VARIABLE} can name a file that tells it"
        if price.free:
            return f"{provider}: free"
        hour = {name: f"${rate * 3600:.4g}" for name, rate in price.model_dump().items()}
        return f"{provider}: {hour['vcpu_second']} per vCPU and {hour['gib_second']} per GiB an hour"


@cache
def _list_prices() -> dict[str, Price]:
    return _parsed(Path(__file__).with_name("prices.toml").read_bytes())


def _read(path: Path) -> dict[str, Price]:
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise _bad("cannot be read", remedy=f"Check the path in {VARIABLE}, and who may read the file.") from error
    if len(data) > SIZE_LIMIT:
        raise _bad(f"is larger than {SIZE_LIMIT // 1024} KB")
    return _parsed(data)


def _parsed(data: bytes) -> dict[str, Price]:
    try:
        found = tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _bad("is no UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        # Only the place: it may be another file than the operator believes, with anything in it.
        raise _bad(f"is no TOML, {str(error).rpartition('(')[2].rstrip(')')}") from None
    except (ValueError, RecursionError):
        raise _bad("is no TOML that can be read") from None
    try:
        return TypeAdapter(dict[str, Price]).validate_python(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = "".join(c if c.isprintable() else "?" for c in ".".join(str(part)[:40] for part in first["loc"]))
        kind = first["type"]
        if kind == "extra_forbidden":
            near = difflib.get_close_matches(str(first["loc"][-1])[:40], Price.model_fields, n=1, cutoff=0.4)
            known = " and ".join(Price.model_fields)
            raise _bad(
                f"has a key that is not known, {key}",
                remedy=f"Did you mean {near[0]}?" if near else f"A table has {known}.",
            ) from None
        if kind == "missing":
            raise _bad(f"lacks {key}") from None
        if kind in ("greater_than_equal", "less_than_equal", "finite_number"):
            raise _bad(f"has a price that cannot be, {key}: at least 0 and at most 0.01 dollars a second") from None
        wanted = "a number" if len(first["loc"]) > 1 else "a table"
        raise _bad(f"has a wrong value for {key}, which must be {wanted}") from None


def _bad(what: str, *, remedy: str | None = None) -> InvalidInput:
    remedy = remedy or "Correct it; the file prices.toml that comes along shows the form."
    return InvalidInput(f"The file that {VARIABLE} names {what}.", remedy=remedy, field=VARIABLE)
