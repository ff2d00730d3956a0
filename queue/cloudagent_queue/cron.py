"""When a cron line is due: five fields and a time zone.

cronsim does the counting. It lets lines of six fields through and leaves a fixed time in a doubled hour to its caller;
what is refused, and what a change of the clocks does, is decided here.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
import zoneinfo
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from cronsim import CronSim, CronSimError
from cronsim.cronsim import Field

from cloudagent_storage.errors import InvalidCron, NeverFires, TooFrequent, UnknownTimezone

FIELDS = ("minute", "hour", "day-of-month", "month", "day-of-week")
LONGEST = 200
"""Characters in a line."""
CLOSEST_MINUTES = 5
DAY_MINUTES = 24 * 60

_FIELD = re.compile(r"[0-9A-Za-z*,/#-]+")
_BLANKS = re.compile(r"[ \t]+")
_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


class Cron:
    """A cron line in a time zone.

    An hour that the clocks leave out is made up for once, in the first minute after it; a fixed hour that comes twice
    counts once. Lines with `*` or `*/n` for the hour go by the time that passes. Raises `InvalidCron`, `NeverFires`,
    `TooFrequent` and `UnknownTimezone`.
    """

    def __init__(self, line: str, timezone: str = "UTC") -> None:
        fields = _fields(line)
        self.line = " ".join(fields)
        self.timezone = timezone
        self._zone = _zone(timezone)
        self._any_hour = fields[1].startswith("*")
        try:
            counted = CronSim(self.line, _LONG_AGO)
        except CronSimError:
            raise NeverFires() from None
        minutes = sorted(hour * 60 + minute for hour in counted.hours for minute in counted.minutes)
        gaps = [later - earlier for earlier, later in itertools.pairwise(minutes)]
        if min([*gaps, minutes[0] + DAY_MINUTES - minutes[-1]]) < CLOSEST_MINUTES:
            raise TooFrequent()
        if next(self.after(_LONG_AGO), None) is None:
            raise NeverFires()

    def after(self, moment: datetime) -> Iterator[datetime]:
        """The due times after a moment, in UTC, each later than the one before. It ends where 50 years have none."""
        local = moment.astimezone(self._zone)
        # A fixed hour is counted on the clock's face, without the zone.
        counted = CronSim(self.line, local if self._any_hour else local.replace(tzinfo=None))
        last = moment.astimezone(UTC)
        for found in counted:
            due = self._moment(found)
            if due > last:
                last = due
                yield due

    def _moment(self, found: datetime) -> datetime:
        """What the clock's face shows as a moment: the first of two, or the first one after a gap."""
        if found.tzinfo is not None:
            return found.astimezone(UTC)
        while True:
            due = found.replace(tzinfo=self._zone).astimezone(UTC)
            if due.astimezone(self._zone).replace(tzinfo=None) == found:
                return due
            found += timedelta(minutes=1)


def _fields(line: str) -> list[str]:
    """The five fields of a line, in upper case. Raises `InvalidCron`."""
    if len(line) > LONGEST:
        raise InvalidCron(f"The cron line is longer than {LONGEST} characters.")
    fields = [field for field in _BLANKS.split(line) if field]
    if fields and fields[0].startswith("@"):
        raise InvalidCron("Names such as @hourly or @daily are not known.")
    if len(fields) != len(FIELDS):
        raise InvalidCron(f"A cron line has five fields, and this one has {len(fields)}.")
    for number, (name, field) in enumerate(zip(FIELDS, fields, strict=True), start=1):
        try:
            if not _FIELD.fullmatch(field):
                raise CronSimError
            Field(number).parse(field.upper())
        except CronSimError:
            raise InvalidCron(f"The {name} field of the cron line cannot be used.") from None
    return [field.upper() for field in fields]


def _zone(name: str) -> zoneinfo.ZoneInfo:
    if name not in _known_zones():
        near = difflib.get_close_matches(name[:LONGEST], _known_zones(), n=1)
        raise UnknownTimezone(remedy=f"Did you mean {near[0]}?" if near else None)
    return zoneinfo.ZoneInfo(name)


@functools.cache
def _known_zones() -> frozenset[str]:
    # `localtime` is a different one on each machine.
    return frozenset(zoneinfo.available_timezones() - {"localtime", "Factory", "posixrules"})
