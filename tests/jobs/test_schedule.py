"""The ticks of schedules, compared with an independent scan of every minute."""

from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim
from hypothesis import given, settings
from hypothesis import strategies as st

from balance_app.jobs.schedule import Cron, Every, Schedule, ScheduleError, TickRange, parse

MICROSECOND = timedelta.resolution
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
ANCHOR = datetime(2025, 1, 1, tzinfo=UTC)

# All changes are in the past, so that no new legislation can alter them.
CHANGES = [
    ("Europe/Berlin", datetime(2025, 3, 30, 1, tzinfo=UTC)),
    ("Europe/Berlin", datetime(2025, 10, 26, 1, tzinfo=UTC)),
    ("America/New_York", datetime(2025, 3, 9, 7, tzinfo=UTC)),
    ("America/New_York", datetime(2025, 11, 2, 6, tzinfo=UTC)),
    ("Australia/Lord_Howe", datetime(2025, 4, 5, 15, tzinfo=UTC)),  # by half an hour
    ("Australia/Lord_Howe", datetime(2025, 10, 4, 15, 30, tzinfo=UTC)),
    ("Pacific/Apia", datetime(2011, 12, 30, 10, tzinfo=UTC)),  # there was no 30 December
    ("Pacific/Apia", datetime(2012, 3, 31, 14, tzinfo=UTC)),
    ("Pacific/Apia", datetime(2012, 9, 29, 14, tzinfo=UTC)),
    ("America/Santiago", datetime(2025, 4, 6, 3, tzinfo=UTC)),  # at midnight
    ("America/Santiago", datetime(2025, 9, 7, 4, tzinfo=UTC)),
    ("America/St_Johns", datetime(2010, 3, 14, 3, 31, tzinfo=UTC)),  # a minute after midnight
    ("America/St_Johns", datetime(2010, 11, 7, 2, 31, tzinfo=UTC)),
    ("Antarctica/Troll", datetime(2025, 3, 30, 1, tzinfo=UTC)),  # by two hours
    ("Antarctica/Troll", datetime(2025, 10, 26, 1, tzinfo=UTC)),
    ("Antarctica/Vostok", datetime(1994, 1, 31, 17, tzinfo=UTC)),  # by seven
    ("Antarctica/Vostok", datetime(1994, 11, 1, 0, tzinfo=UTC)),
]
NEW_YEARS = [
    (zone, datetime(2024, 12, 31, 12, tzinfo=UTC))
    for zone in ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia")
]
FIXED = [
    "30 2 * * *",
    "0,30 2,3 * * *",
    "30 1 * * *",
    "0 0 * * *",
    "0 3 * * 1-5",
    "59 23 31 12 *",
    "15 0 30,31 12 *",
    "20-40 1-2 * * 0,6",
    "0-59 0-23 * * *",
    "45 23 1 * 6",
]
FREE = [
    "* * * * *",
    "*/15 * * * *",
    "0 * * * *",
    "30 * * * *",
    "*/15 0 * * *",
    "*/20 1 * * *",
    "*/15 2 * * *",
    "*/15 3 * * *",
    "45 */2 * * *",
    "*/30 23 * * 0,6",
    "* 1 */2 * 0-5",
]
EXPRESSIONS = FIXED + FREE
SPARSE = [each for each in EXPRESSIONS if each not in {"* * * * *", "0-59 0-23 * * *"}]


# A second implementation of the rules: whether each minute of the local clock is a tick.


def values(text: str, lowest: int, highest: int) -> set[int]:
    found: set[int] = set()
    for term in text.split(","):
        span, _, step = term.partition("/")
        first, _, last = (f"{lowest}-{highest}" if span == "*" else span).partition("-")
        found.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


class Rules:
    def __init__(self, expression: str) -> None:
        minute, hour, day, month, weekday = expression.split()
        self.minutes, self.hours = values(minute, 0, 59), values(hour, 0, 23)
        self.days, self.months = values(day, 1, 31), values(month, 1, 12)
        self.weekdays = {number % 7 for number in values(weekday, 0, 7)}
        self.either_day = day[0] != "*" and weekday[0] != "*"
        self.fixed = minute[0] != "*" and hour[0] != "*"

    def match(self, reading: datetime) -> bool:
        if reading.minute not in self.minutes or reading.hour not in self.hours:
            return False
        days = (reading.day in self.days, reading.isoweekday() % 7 in self.weekdays)
        return reading.month in self.months and (any(days) if self.either_day else all(days))


@cache
def clock(zone: str, change: datetime) -> list[tuple[datetime, datetime]]:
    """Return each minute from a day before to two days after, with the local time."""
    moments = [change + n * MINUTE for n in range(-24 * 60, 48 * 60)]
    return [(each, each.astimezone(ZoneInfo(zone)).replace(tzinfo=None)) for each in moments]


@cache
def scan(expression: str, zone: str, change: datetime) -> list[datetime]:
    """Return the ticks in these three days."""
    rules = Rules(expression)
    ticks = []
    latest = None  # the latest time that the clock has shown so far
    for moment, reading in clock(zone, change):
        readings = [reading]
        if rules.fixed and latest is not None:
            readings = [latest + n * MINUTE for n in range(1, (reading - latest) // MINUTE + 1)]
        if any(rules.match(each) for each in readings):
            ticks.append(moment)
        latest = max(latest or reading, reading)
    return ticks


def ticks_of(schedule: Cron, after: datetime, until: datetime) -> list[datetime]:
    ticks = []
    latest = after
    while (tick := schedule.next_after(latest, ANCHOR)) <= until:
        assert tick > latest
        assert tick.time() == time(tick.hour, tick.minute)
        ticks.append(tick)
        latest = tick
    return ticks


def counted(ticks: list[datetime]) -> TickRange | None:
    return TickRange(ticks[0], ticks[-1], len(ticks)) if ticks else None


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize(("zone", "moment"), CHANGES + NEW_YEARS)
def test_cron_ticks_as_a_clock_would(zone: str, moment: datetime, expression: str) -> None:
    """Around each clock change the ticks equal those of a scan, one by one or counted."""
    after, until = moment - DAY / 4, moment + 5 * DAY / 4
    expected = [tick for tick in scan(expression, zone, moment) if after < tick <= until]
    schedule = Cron(expression, zone)
    assert ticks_of(schedule, after, until) == expected
    assert schedule.count_between(after, until, ANCHOR) == counted(expected)


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize(("zone", "change"), CHANGES)
def test_cron_can_be_asked_at_any_moment(zone: str, change: datetime, expression: str) -> None:
    """On a tick, beside it, in a repeated hour: the next tick is that of the scan."""
    ticks = scan(expression, zone, change)
    schedule = Cron(expression, zone)
    for minutes in range(-120, 121, 15):
        for moment in (change + minutes * MINUTE, change + minutes * MINUTE - MICROSECOND):
            following = schedule.next_after(moment, ANCHOR)
            assert following > moment
            expected = next((tick for tick in ticks if tick > moment), None)
            if expected is None:  # beyond the scan
                assert following >= change + 2 * DAY
            else:
                assert following == expected


@pytest.mark.parametrize(("zone", "change"), CHANGES)
def test_the_changes_are_changes(zone: str, change: datetime) -> None:
    """The control of the table: each zone's clock does change at its moment."""
    before, after = (each.astimezone(ZoneInfo(zone)) for each in (change - SECOND, change))
    assert before.utcoffset() != after.utcoffset()


@pytest.mark.parametrize(
    ("expression", "zone", "day", "expected"),
    [
        ("30 2 * * *", "Europe/Berlin", date(2025, 3, 30), ["03:00+02:00"]),
        ("0,30 2,3 * * *", "Europe/Berlin", date(2025, 3, 30), ["03:00+02:00", "03:30+02:00"]),
        ("*/30 2 * * *", "Europe/Berlin", date(2025, 3, 30), []),
        ("30 2 * * *", "Europe/Berlin", date(2025, 10, 26), ["02:30+02:00"]),
        ("30 2-3 * * *", "Europe/Berlin", date(2025, 10, 26), ["02:30+02:00", "03:30+01:00"]),
        ("*/45 2 * * *", "America/New_York", date(2025, 3, 9), []),
        (
            "*/45 1 * * *",
            "America/New_York",
            date(2025, 11, 2),
            ["01:00-04:00", "01:45-04:00", "01:00-05:00", "01:45-05:00"],
        ),
        ("15 2 * * *", "Australia/Lord_Howe", date(2025, 10, 5), ["02:30+11:00"]),
        ("*/15 2 * * *", "Australia/Lord_Howe", date(2025, 10, 5), ["02:30+11:00", "02:45+11:00"]),
        ("45 1 * * *", "Australia/Lord_Howe", date(2025, 4, 6), ["01:45+11:00"]),
        (
            "*/45 1 * * *",
            "Australia/Lord_Howe",
            date(2025, 4, 6),
            ["01:00+11:00", "01:45+11:00", "01:45+10:30"],
        ),
        ("0 3 * * *", "Pacific/Apia", date(2011, 12, 30), []),
        ("0 3 * * *", "Pacific/Apia", date(2011, 12, 31), ["00:00+14:00", "03:00+14:00"]),
        ("0 0 * * *", "Pacific/Apia", date(2011, 12, 31), ["00:00+14:00"]),
        ("0 0 * * *", "America/Santiago", date(2025, 9, 7), ["01:00-03:00"]),
        ("*/15 0 * * *", "America/Santiago", date(2025, 9, 7), []),
    ],
)
def test_examples_of_a_change(expression: str, zone: str, day: date, expected: list[str]) -> None:
    """The ticks of a day with a clock change, in local time."""
    midnight = datetime.combine(day, time(), UTC)
    ticks = ticks_of(Cron(expression, zone), midnight - DAY, midnight + 2 * DAY)
    local = [tick.astimezone(ZoneInfo(zone)) for tick in ticks]
    assert [each.isoformat("T", "minutes")[11:] for each in local if each.date() == day] == expected


@pytest.mark.parametrize("expression", SPARSE)
@pytest.mark.parametrize("zone", ["Asia/Kolkata", "Europe/Berlin", "America/New_York"])
def test_cronsim_agrees_where_clocks_move_by_whole_hours(zone: str, expression: str) -> None:
    """From a moment outside of repeated hours, cronsim yields the same ticks."""
    for tick in (datetime(2025, 3, 8, tzinfo=UTC), datetime(2025, 10, 25, tzinfo=UTC)):
        theirs = CronSim(expression, tick.astimezone(ZoneInfo(zone)))
        ours = ticks_of(Cron(expression, zone), tick, tick + 23 * DAY)
        assert ours == [next(theirs).astimezone(UTC) for _ in ours]


@given(
    expression=st.sampled_from(SPARSE),
    change=st.sampled_from(CHANGES),
    offset=st.timedeltas(-5 * DAY, DAY),
    span=st.timedeltas(timedelta(0), 8 * DAY),
)
@settings(deadline=None)
def test_cron_counts_what_next_after_gives(
    expression: str, change: tuple[str, datetime], offset: timedelta, span: timedelta
) -> None:
    """A count equals the number of calls of `next_after`, with the first and last tick."""
    zone, moment = change
    after = moment + offset
    schedule = Cron(expression, zone)
    expected = counted(ticks_of(schedule, after, after + span))
    assert schedule.count_between(after, after + span, ANCHOR) == expected


@given(
    expression=st.sampled_from(EXPRESSIONS),
    zone=st.sampled_from([zone for zone, _ in CHANGES]),
    hours=st.lists(st.integers(0, 35 * 366 * 24), min_size=3, max_size=3).map(sorted),
)
@settings(deadline=None)
def test_counts_add_up(expression: str, zone: str, hours: list[int]) -> None:
    """A span divided anywhere has the same ticks as the whole."""
    moments = [datetime(1990, 1, 1, tzinfo=UTC) + timedelta(hours=number) for number in hours]
    schedule = Cron(expression, zone)
    parts = [schedule.count_between(*pair, ANCHOR) for pair in pairwise(moments)]
    whole = schedule.count_between(moments[0], moments[-1], ANCHOR)
    found = [part for part in parts if part]
    if whole is None:
        assert not found
    else:
        assert whole.ticks == sum(part.ticks for part in found)
        assert (whole.first, whole.last) == (found[0].first, found[-1].last)


DECADE = [date(2015, 1, 1) + n * DAY for n in range(3653)]


@pytest.mark.parametrize(
    ("expression", "zone", "ticks"),
    [
        ("* * * * *", "UTC", 3653 * 24 * 60),
        ("* * * * *", "Europe/Berlin", 3653 * 24 * 60),
        ("0 * * * *", "America/New_York", 3653 * 24),
        ("30 * * * *", "Australia/Lord_Howe", 3653 * 24 + 10),  # 01:30 twice each autumn
        ("0 * * * *", "Australia/Lord_Howe", 3653 * 24 - 10),  # no 02:00 each spring
        ("*/15 2 * * *", "Europe/Berlin", 3653 * 4),  # ten times none, ten times 8
        ("30 2 * * *", "Europe/Berlin", 3653),
        ("0,30 2 * * *", "Europe/Berlin", 3653 * 2 - 10),  # one instead of two each spring
        ("0 3 * * 1-5", "Australia/Lord_Howe", sum(day.weekday() < 5 for day in DECADE)),
        ("59 23 31 12 *", "Pacific/Apia", 10),
    ],
)
def test_ten_years_at_once(expression: str, zone: str, ticks: int) -> None:
    """From New Year to New Year the number of ticks is that of plain arithmetic."""
    start, end = (datetime(year, 1, 1, tzinfo=ZoneInfo(zone)) for year in (2015, 2025))
    after, until = start.astimezone(UTC) - MICROSECOND, end.astimezone(UTC) - MICROSECOND
    schedule = Cron(expression, zone)
    skipped = schedule.count_between(after, until, ANCHOR)
    assert skipped is not None
    assert skipped.ticks == ticks
    assert skipped.first == schedule.next_after(after, ANCHOR)
    assert skipped.last <= until < schedule.next_after(skipped.last, ANCHOR)


def test_a_tick_may_be_decades_away() -> None:
    """Fifth Mondays of February (the 29th), around the year 2100, which has no leap day."""
    ticks = [datetime(year, 2, 29, tzinfo=UTC) for year in (2044, 2072, 2112)]
    assert ticks_of(Cron("0 0 * 2 MON#5"), ANCHOR, datetime(2113, 1, 1, tzinfo=UTC)) == ticks


@pytest.mark.parametrize("schedule", [Cron("0 12 * * *"), Every(DAY / 2)])
def test_a_span_excludes_its_beginning_and_includes_its_end(schedule: Schedule) -> None:
    """A span without ticks, or one that ends before it begins, has None."""
    noon = ANCHOR + DAY / 2
    assert schedule.count_between(noon, noon, ANCHOR) is None
    assert schedule.count_between(noon, noon - DAY, ANCHOR) is None
    assert schedule.count_between(noon, noon + DAY / 2 - MICROSECOND, ANCHOR) is None
    assert schedule.count_between(noon - MICROSECOND, noon, ANCHOR) == TickRange(noon, noon, 1)


START, END = datetime(1900, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
INTERVALS = st.timedeltas(SECOND, 366 * DAY)
MOMENTS = st.timedeltas(timedelta(0), END - START).map(lambda since: START + since)


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (ANCHOR - 365 * DAY, ANCHOR),
        (ANCHOR - MICROSECOND, ANCHOR),
        (ANCHOR, ANCHOR + 90 * SECOND),
        (ANCHOR + 90 * SECOND - MICROSECOND, ANCHOR + 90 * SECOND),
        (ANCHOR + 90 * SECOND, ANCHOR + 180 * SECOND),
        (ANCHOR + 90 * SECOND * 10**8, ANCHOR + 90 * SECOND * (10**8 + 1)),
    ],
)
def test_the_next_tick_of_an_interval(moment: datetime, expected: datetime) -> None:
    """The anchor is the first tick, and a tick is not after itself."""
    assert Every(90 * SECOND).next_after(moment, ANCHOR) == expected


@given(interval=INTERVALS, anchor=MOMENTS, moment=MOMENTS)
def test_an_interval_has_its_least_tick_after_a_moment(
    interval: timedelta, anchor: datetime, moment: datetime
) -> None:
    """It is a tick, it is after the moment, and the tick before it, if any, is not."""
    tick = Every(interval).next_after(moment, anchor)
    assert tick >= anchor
    assert (tick - anchor) % interval == timedelta(0)
    assert tick > moment
    assert tick == anchor or tick - interval <= moment


@given(
    interval=INTERVALS,
    anchor=MOMENTS,
    numbers=st.tuples(st.integers(-5, 30), st.integers(-5, 30)),
    nudge=st.sampled_from([-SECOND / 2, -MICROSECOND, timedelta(0), MICROSECOND, SECOND / 2]),
)
def test_an_interval_counts_its_ticks(
    interval: timedelta, anchor: datetime, numbers: tuple[int, int], nudge: timedelta
) -> None:
    """A count is that of the ticks in the span, also when it begins before the anchor."""
    after, until = anchor + numbers[0] * interval + nudge, anchor + numbers[1] * interval
    ticks = [anchor + n * interval for n in range(32)]
    expected = counted([tick for tick in ticks if after < tick <= until])
    assert Every(interval).count_between(after, until, anchor) == expected


def test_an_interval_does_not_drift() -> None:
    """A thousand years in steps of 1.000001 s are counted to the last microsecond."""
    schedule = Every(SECOND + MICROSECOND)
    last = ANCHOR + 31_000_000_000 * schedule.interval
    expected = TickRange(ANCHOR + schedule.interval, last, 31_000_000_000)
    assert schedule.count_between(ANCHOR, last, ANCHOR) == expected
    assert schedule.next_after(last - MICROSECOND, ANCHOR) == last


@pytest.mark.parametrize(
    ("schedule", "text", "words"),
    [
        (Every(SECOND), "every 1 s", "every second"),
        (Every(90 * SECOND), "every 90 s", "every 90 seconds"),
        (Every(MINUTE), "every 60 s", "every minute"),
        (Every(5 * MINUTE), "every 300 s", "every 5 minutes"),
        (Every(timedelta(hours=36)), "every 129600 s", "every 36 hours"),
        (Every(DAY), "every 86400 s", "every day"),
        (Every(366 * DAY), "every 31622400 s", "every 366 days"),
        (Every(timedelta(seconds=1.5)), "every 1.5 s", "every 1.5 seconds"),
        (Every(SECOND + MICROSECOND), "every 1.000001 s", "every 1.000001 seconds"),
        (
            Cron("0 3 * * *", "Europe/Berlin"),
            "cron 0 3 * * * Europe/Berlin",
            "at 03:00 every day, Europe/Berlin",
        ),
        (Cron(" */5 *  * * * "), "cron */5 * * * * UTC", "every fifth minute of every hour, UTC"),
        (
            Cron("0 3 * * mon-fri"),
            "cron 0 3 * * MON-FRI UTC",
            "at 03:00 on Monday through Friday, UTC",
        ),
        (
            Cron("30 4 11,22,31 * *"),
            "cron 30 4 11,22,31 * * UTC",
            "at 04:30 on the 11th, the 22nd, and the 31st day of month, UTC",
        ),
        (
            Cron("0 0 13 * FRI"),
            "cron 0 0 13 * FRI UTC",
            "at 00:00 on the 13th day of month or on Friday, UTC",
        ),
        (
            Cron("0 0 13 1-3 5#2"),
            "cron 0 0 13 1-3 5#2 UTC",
            (
                "at 00:00 in every month from January through March "
                "on the 13th day of month or on the second Friday of the month, UTC"
            ),
        ),
        (
            Cron("0 0 */2 * FRI"),
            "cron 0 0 */2 * FRI UTC",
            "at 00:00 on every second day of month if it's on Friday, UTC",
        ),
        (Cron("0 0 13 * 0-6"), "cron 0 0 13 * 0-6 UTC", "at 00:00 every day, UTC"),
        (Cron("0 0 1-31 * 5"), "cron 0 0 1-31 * 5 UTC", "at 00:00 every day, UTC"),
        (Cron("@hourly"), "cron 0 * * * * UTC", "at the start of every hour, UTC"),
        (Cron("@daily"), "cron 0 0 * * * UTC", "at 00:00 every day, UTC"),
        (Cron(" @Midnight"), "cron 0 0 * * * UTC", "at 00:00 every day, UTC"),
        (Cron("@weekly"), "cron 0 0 * * 0 UTC", "at 00:00 on Sunday, UTC"),
        (Cron("@monthly"), "cron 0 0 1 * * UTC", "at 00:00 on the first day of every month, UTC"),
        (Cron("@yearly"), "cron 0 0 1 1 * UTC", "at 00:00 on January 1, UTC"),
        (Cron("@annually"), "cron 0 0 1 1 * UTC", "at 00:00 on January 1, UTC"),
    ],
)
def test_a_schedule_has_a_text_and_a_description(schedule: Schedule, text: str, words: str) -> None:
    """The text can be parsed back into the schedule; the description is for people."""
    assert str(schedule) == text
    assert parse(text) == schedule
    assert schedule.describe() == words


@given(interval=INTERVALS)
def test_the_text_of_an_interval_is_exact(interval: timedelta) -> None:
    """No microsecond is lost in the text."""
    assert parse(str(Every(interval))) == Every(interval)


def test_one_schedule_has_one_spelling() -> None:
    """Case and spaces make no difference; the zone does."""
    assert Cron("0 3 * * mon") == Cron("0  3 * * MON")
    assert hash(Cron("0 3 * * mon")) == hash(Cron("0  3 * * MON"))
    assert Cron("0 3 * * *") != Cron("0 3 * * *", "Europe/Berlin")


@pytest.mark.parametrize(
    "interval",
    [timedelta(0), -SECOND, SECOND - MICROSECOND, 366 * DAY + MICROSECOND, timedelta.max],
)
def test_an_interval_has_bounds(interval: timedelta) -> None:
    """A second at least, 366 days at most; the sentence names the interval."""
    with pytest.raises(ScheduleError, match=r"^The interval \(-?[0-9.]+ s\) must be between "):
        Every(interval)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "has 0 fields"),
        ("daily", "has 1 field;"),
        ("@reboot", "belongs to no machine"),
        ("@fortnightly", "the aliases are @hourly, @daily,"),
        ("@daily *", "has 2 fields"),
        ("0 3 * *", "has 4 fields"),
        ("0 0 3 * * *", "has 6 fields"),  # seconds
        ("60 3 * * *", "bad minute"),
        ("0 24 * * *", "bad hour"),
        ("0 3 0 * *", "bad day-of-month"),
        ("0 3 * 13 *", "bad month"),
        ("0 3 * * FRI-MON", "backwards: write FRI-SAT,SUN-MON"),
        ("0 3 * * 5-0", "backwards: write 5-6,0"),
        ("0 3 * * SAT-SUN", "backwards: write SAT,SUN"),
        ("0 3 * NOV-FEB *", "backwards: write NOV-DEC,JAN-FEB"),
        ("0 22-2 * * *", "backwards: write 22-23,0-2"),
        ("10,50-9/3 * * * *", "backwards: write 50-59,0-9"),
        ("*/0 3 * * *", "at least 1"),
        ("0/0 3 * * *", "at least 1"),
        ("0 3 * * 0,MON/00", "at least 1"),
        ("*/90 * * * *", r"Write 0 for that, or every=timedelta\(minutes=90\) for an interval"),
        ("*/60 * * * *", r"Write 0 for that, or every=timedelta\(minutes=60\)"),
        ("1/120 * * * *", r"Write 1 for that, or every=timedelta\(minutes=120\)"),
        ("7,30-40/11 * * * *", r"\(30 to 40\): only 30 would match. Write 30 for that\."),
        ("5-5/1 * * * *", "only 5 would match"),  # cronsim reads it as every minute from 5 on
        ("0 */24 * * *", r"Write 0 for that, or every=timedelta\(hours=24\)"),
        ("0 0 */32 * *", r"Write 1 for that, or every=timedelta\(days=32\)"),
        ("0 0 * */12 *", r"Write 1 for that\."),
        ("0 0 * FEB/11 *", r"Write FEB for that\."),
        ("0 0 * * */7", r"\(0 to 6\): only 0 would match"),
        ("0 0 * * MON/9", "Write MON for that"),
        ("*/" + "9" * 5000 + " * * * *", "Write 0 for that"),
        ("0 0 L/3 * *", "L takes no step"),
        ("0 0 ? * 1", r"write \*\."),
        ("*/-1 * * * *", "bad minute"),
        ("*/1/1 * * * *", "bad minute"),
        ("-5 3 * * *", "bad minute"),
        ("\u0665 3 * * *", "bad minute"),  # a five, in Arabic
        ("9" * 5000 + " 3 * * *", "can't be used"),
        ("0 3 30 2 *", "bad day-of-month"),
        ("0 3 31 4,6,9,11 */2", "bad day-of-month"),
        ("0 3 */20 * 1L", "never matches"),
    ],
)
def test_an_expression_that_cannot_be_is_refused(expression: str, reason: str) -> None:
    """The sentence quotes the expression."""
    with pytest.raises(ScheduleError, match=reason) as error:
        Cron(expression)
    assert repr(expression) in str(error.value)


def test_a_time_that_the_zone_never_shows_is_refused() -> None:
    """An hour on the last Sunday of March that the clock change skips."""
    assert Cron("*/30 2 * 3 7L", "Africa/Lagos")
    with pytest.raises(ScheduleError, match=r"'\*/30 2 \* 3 7L' never .* Europe/Berlin\.$"):
        Cron("*/30 2 * 3 7L", "Europe/Berlin")


@pytest.mark.parametrize(
    "zone", ["", "Mars/Base", "Europe", "europe/berlin", "../UTC", "/etc/passwd", "a\0b", "\ud800"]
)
def test_an_unknown_zone_is_refused(zone: str) -> None:
    """The sentence quotes the zone."""
    with pytest.raises(ScheduleError) as error:
        Cron("0 3 * * *", zone)
    assert str(error.value) == f"There is no time zone {zone!r}."


@pytest.mark.parametrize(
    "text",
    [
        "",
        "every",
        "every 5",
        "every -5 s",
        "every 0.5 s",
        "every 1e3 s",
        "every 1.0000001 s",
        "every \u0665 s",
        "every 99999999999999999999 s",
        "cron",
        "cron 0 3 * * *",
        "cron 0 3 * * * Mars/Base",
        "daily",
    ],
)
def test_other_text_is_no_schedule(text: str) -> None:
    """It is refused, not guessed."""
    with pytest.raises(ScheduleError):
        parse(text)
