"""When a cron line is due, and which lines are refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudagent_queue.cron import Cron
from cloudagent_storage.errors import CloudAgentError, InvalidCron, NeverFires, TooFrequent, UnknownTimezone

BERLIN = ZoneInfo("Europe/Berlin")


def times(line: str, zone: str, after: datetime, count: int) -> list[str]:
    """The next due times, as a clock in that zone shows them."""
    found = islice(Cron(line, zone).after(after), count)
    return [moment.astimezone(ZoneInfo(zone)).strftime("%m-%d %H:%M %z") for moment in found]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("", "five fields"),
        ("   ", "five fields"),
        ("* * * *", "five fields"),
        ("0 0 0 * * *", "five fields"),
        ("@hourly", "@hourly"),
        ("*/0 * * * *", "minute field"),
        ("60 * * * *", "minute field"),
        ("0 24 * * *", "hour field"),
        ("0 0 32 * *", "day-of-month field"),
        ("0 0 0 * *", "day-of-month field"),
        ("0 0 * 13 *", "month field"),
        ("0 0 * * 8", "day-of-week field"),
        ("0 0 * * \u00b2L", "day-of-week field"),
        ("5-1 * * * *", "minute field"),
        ("0 0 * * mon\n", "day-of-week field"),
        ("; rm * * *", "minute field"),
        ("1," * 2500 + "1 * * * *", "200 characters"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_and_its_field_is_named(line: str, named: str) -> None:
    with pytest.raises(InvalidCron) as caught:
        Cron(line)
    assert named in f"{caught.value.message} {caught.value.remedy}"
    assert (caught.value.code, caught.value.field) == ("invalid_cron", "cron")


@pytest.mark.parametrize("line", ["0 0 30 2 *", "0 0 31 2,4,6,9,11 *"])
def test_a_line_that_no_day_fits_is_refused(line: str) -> None:
    with pytest.raises(NeverFires):
        Cron(line)


def test_a_day_that_comes_every_few_years_is_one() -> None:
    assert times("0 0 29 2 *", "UTC", datetime(2026, 1, 1, tzinfo=UTC), 1) == ["02-29 00:00 +0000"]


@pytest.mark.parametrize(
    "line", ["* * * * *", "*/4 * * * *", "*/7 * * * *", "0,3 5 * * *", "58,2 * * * *", "0,59 0,23 * * *"]
)
def test_due_times_closer_than_five_minutes_are_refused(line: str) -> None:
    with pytest.raises(TooFrequent):
        Cron(line)


def test_five_minutes_are_enough() -> None:
    assert times("*/5 * * * *", "UTC", datetime(2026, 1, 1, tzinfo=UTC), 2) == [
        "01-01 00:05 +0000",
        "01-01 00:10 +0000",
    ]


@pytest.mark.parametrize("zone", ["Mars/X", "", "localtime", "../../etc/passwd", "Europe", "europe/berlin", "x" * 5000])
def test_a_time_zone_that_is_none_is_refused(zone: str) -> None:
    with pytest.raises(UnknownTimezone) as caught:
        Cron("0 0 * * *", zone)
    if zone == "europe/berlin":
        assert "Europe/Berlin" in caught.value.remedy


def test_a_fixed_time_in_an_hour_that_the_clocks_leave_out_is_made_up_for_once() -> None:
    evening = datetime(2026, 3, 28, 20, tzinfo=BERLIN)
    # At 02:00 it becomes 03:00.
    assert times("30 2 * * *", "Europe/Berlin", evening, 2) == ["03-29 03:00 +0200", "03-30 02:30 +0200"]
    assert times("*/10 2 * * *", "Europe/Berlin", evening, 2) == ["03-29 03:00 +0200", "03-30 02:00 +0200"]
    assert times("30 2,3 * * *", "Europe/Berlin", evening, 2) == ["03-29 03:00 +0200", "03-29 03:30 +0200"]


def test_a_fixed_time_in_an_hour_that_comes_twice_is_due_once() -> None:
    evening = datetime(2026, 10, 24, 20, tzinfo=BERLIN)
    # At 03:00 it becomes 02:00 once more.
    assert times("30 2 * * *", "Europe/Berlin", evening, 2) == ["10-25 02:30 +0200", "10-26 02:30 +0100"]
    assert times("*/30 2 * * *", "Europe/Berlin", evening, 3) == [
        "10-25 02:00 +0200",
        "10-25 02:30 +0200",
        "10-26 02:00 +0100",
    ]
    second = datetime(2026, 10, 25, 2, 10, tzinfo=BERLIN, fold=1)
    assert times("30 2 * * *", "Europe/Berlin", second, 1) == ["10-26 02:30 +0100"]


def test_every_hour_goes_by_the_time_that_passes() -> None:
    for start in (datetime(2026, 3, 28, 20, tzinfo=BERLIN), datetime(2026, 10, 24, 20, tzinfo=BERLIN)):
        found = list(islice(Cron("0 * * * *", "Europe/Berlin").after(start), 12))
        assert {later - earlier for earlier, later in pairwise(found)} == {timedelta(hours=1)}


MINUTES = st.sampled_from(["0", "30", "*/5", "*/15", "7,41", "10-50/20"])
HOURS = st.sampled_from(["*", "*/2", "2", "0", "1-4", "23", "2,3"])
DAYS = st.sampled_from(["*", "1", "L", "15,29", "*/3"])
MONTHS = st.sampled_from(["*", "3", "10", "3-4,10-11"])
WEEKDAYS = st.sampled_from(["*", "7", "1-5", "SUN#2"])
ZONES = st.sampled_from(
    ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "Africa/Cairo"]
)
MOMENTS = st.datetimes(datetime(2024, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))


@settings(deadline=None)
@given(st.tuples(MINUTES, HOURS, DAYS, MONTHS, WEEKDAYS), ZONES, MOMENTS)
def test_due_times_increase_and_each_fits_its_line(fields: tuple[str, ...], zone: str, after: datetime) -> None:
    found = list(islice(Cron(" ".join(fields), zone).after(after), 8))
    last = after
    for moment in found:
        assert moment > last and moment.utcoffset() == timedelta(0) and moment.second == moment.microsecond == 0
        last = moment
        here = moment.astimezone(ZoneInfo(zone))
        shown = [here.replace(tzinfo=None), *skipped_before(moment, ZoneInfo(zone))]
        assert any(fits(fields, face) for face in shown), (fields, zone, here)


@settings(deadline=None)
@given(st.tuples(MINUTES, HOURS), ZONES, MOMENTS)
def test_no_due_time_is_left_out(fields: tuple[str, ...], zone: str, after: datetime) -> None:
    line = (*fields, "*", "*", "*")
    first = next(Cron(" ".join(line), zone).after(after))
    moment = after.replace(second=0, microsecond=0) + timedelta(minutes=1)
    while moment < first:
        here = moment.astimezone(ZoneInfo(zone))
        second_time = here.fold == 1 and not fields[1].startswith("*")
        assert second_time or not fits(line, here.replace(tzinfo=None)), (line, zone, here)
        moment += timedelta(minutes=1)


@settings(deadline=None)
@given(st.text(max_size=40), st.text(max_size=20))
def test_whatever_is_passed_is_used_or_refused_with_an_error_of_ours(line: str, zone: str) -> None:
    for arguments in ((line, "UTC"), ("0 0 * * *", zone)):
        try:
            next(Cron(*arguments).after(datetime(2026, 1, 1, tzinfo=UTC)))
        except CloudAgentError as error:
            assert error.code in ("invalid_cron", "never_fires", "too_frequent", "unknown_timezone")


def skipped_before(moment: datetime, zone: ZoneInfo) -> list[datetime]:
    """What a clock never showed because it was put forward to this very minute."""
    here = moment.astimezone(zone).replace(tzinfo=None)
    before = (moment - timedelta(minutes=1)).astimezone(zone).replace(tzinfo=None) + timedelta(minutes=1)
    return [before + timedelta(minutes=n) for n in range(int((here - before).total_seconds() // 60))]


def fits(fields: tuple[str, ...], face: datetime) -> bool:
    """Does a clock's face fit? Written for the fields above, and by another way than cronsim's."""
    minute, hour, day, month, weekday = fields
    tomorrow = face + timedelta(days=1)
    last_day = tomorrow.month != face.month
    number = (face.weekday() + 1) % 7

    def one_of(field: str, value: int, low: int, high: int) -> bool:
        for term in field.split(","):
            span, _, step = term.partition("/")
            first, _, last = span.partition("-")
            start, end = (low, high) if span == "*" else (int(first), int(last or first))
            if value in range(start, end + 1, int(step or 1)):
                return True
        return False

    in_day = last_day if day == "L" else one_of(day, face.day, 1, 31)
    if weekday == "SUN#2":
        in_week = number == 0 and 8 <= face.day <= 14
    else:
        in_week = one_of(weekday, number, 0, 7) or one_of(weekday, number or 7, 0, 7)
    either = not (day.startswith("*") or weekday.startswith("*"))
    return (
        one_of(minute, face.minute, 0, 59)
        and one_of(hour, face.hour, 0, 23)
        and one_of(month, face.month, 1, 12)
        and (in_day or in_week if either else in_day and in_week)
    )
