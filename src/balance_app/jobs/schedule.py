"""When a job's ticks are: at an interval from an anchor, or at the times of a cron expression.

Pure functions of time: they take and return aware datetimes in UTC. No call takes time in
proportion to the number of ticks.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Final, NamedTuple, Self, TypeAlias
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from typing_extensions import override

LONGEST: Final = timedelta(days=366)
RESOLUTION: Final = timedelta.resolution
_SECOND: Final = timedelta(seconds=1)
_DAY: Final = timedelta(days=1)
_WEEK: Final = timedelta(weeks=1)
_EXAMPLE: Final = datetime(2026, 1, 1, tzinfo=UTC)
# Any date falls on any weekday within 28 years, or 40 around 2100, which is no leap year.
_HORIZON: Final = timedelta(days=41 * 366)
_UNITS: Final = {"day": _DAY, "hour": timedelta(hours=1), "minute": timedelta(minutes=1)}
_EVERY: Final = re.compile(r"every ([0-9]{1,8}(?:\.[0-9]{1,6})?) s")
_CRON: Final = re.compile(r"cron (.+) (\S+)")

_ALIASES: Final = {
    "@HOURLY": "0 * * * *",
    "@DAILY": "0 0 * * *",
    "@MIDNIGHT": "0 0 * * *",
    "@WEEKLY": "0 0 * * 0",
    "@MONTHLY": "0 0 1 * *",
    "@YEARLY": "0 0 1 1 *",
    "@ANNUALLY": "0 0 1 1 *",
}
_DAYS: Final = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")


class _Field(NamedTuple):
    """A field of a cron expression: the range of its values, and their names."""

    name: str
    lowest: int
    highest: int
    names: tuple[str, ...] = ()
    # the argument of timedelta
    unit: str | None = None

    def value(self, text: str) -> int | None:
        """Return the value of a number or name; None: it is not one of this field's."""
        if text in self.names:
            return self.lowest + self.names.index(text)
        value = int(text) if re.fullmatch(r"[0-9]{1,4}", text, re.ASCII) else None
        return value if value is not None and self.lowest <= value <= self.highest else None

    def label(self, value: int, like: str) -> str:
        return self.names[value - self.lowest] if like in self.names else str(value)


_FIELDS: Final = (
    _Field("minute", 0, 59, unit="minutes"),
    _Field("hour", 0, 23, unit="hours"),
    _Field("day of month", 1, 31, unit="days"),
    _Field(
        "month",
        1,
        12,
        (
            *("JAN", "FEB", "MAR", "APR", "MAY", "JUN"),
            *("JUL", "AUG", "SEP", "OCT", "NOV", "DEC"),
        ),
    ),
    _Field("day of week", 0, 7, _DAYS),
)


class ScheduleError(ValueError):
    """An impossible schedule; the message is a sentence that names the wrong value."""


class TickRange(NamedTuple):
    """A range of ticks: its first, its last, and how many there are."""

    first: datetime
    last: datetime
    ticks: int


@dataclass(frozen=True, slots=True)
class Every:
    """Ticks at `anchor` and every interval after it, exact to the microsecond.

    Raises:
        ScheduleError: the interval is below a second or above 366 days.
    """

    interval: timedelta

    def __post_init__(self) -> None:
        if not _SECOND <= self.interval <= LONGEST:
            raise _out_of_range(_seconds(self.interval))

    @classmethod
    def of_seconds(cls, seconds: int) -> Self:
        """Return the schedule of an interval; it may be any number."""
        try:
            return cls(timedelta(seconds=seconds))
        except OverflowError:
            raise _out_of_range(str(seconds)) from None

    def next_after(self, moment: datetime, anchor: datetime) -> datetime:
        """Return the first tick after `moment`; a tick at `moment` itself is not after it."""
        return anchor + self._number_after(moment, anchor) * self.interval

    def count_between(self, after: datetime, until: datetime, anchor: datetime) -> TickRange | None:
        """Return the ticks after `after` and not after `until`; None if there are none."""
        first = self._number_after(after, anchor)
        ticks = self._number_after(until, anchor) - first
        if ticks <= 0:
            return None
        return TickRange(
            anchor + first * self.interval, anchor + (first + ticks - 1) * self.interval, ticks
        )

    def _number_after(self, moment: datetime, anchor: datetime) -> int:
        return max(0, (moment - anchor) // self.interval + 1)

    def describe(self) -> str:
        """Return the schedule for people: "every 5 minutes"."""
        for unit, length in _UNITS.items():
            if not self.interval % length:
                return _every(str(self.interval // length), unit)
        return _every(_seconds(self.interval), "second")

    @override
    def __str__(self) -> str:
        return f"every {_seconds(self.interval)} s"


@dataclass(frozen=True, slots=True)
class Cron:
    """Ticks at the local times that a cron expression of five fields names.

    When clocks change it ticks as Debian's cron does. If neither the minute nor the hour field
    begins with `*`, all local times that a jump forward skips have one tick together, at the jump,
    and repeated local times tick only the first time; the jump may have any length (Debian: below
    three hours). Other expressions follow the local clock: a skipped time has no tick, and a
    repeated time has two.

    cronsim parses the expression but does not compute the ticks: around a change of half an hour
    or at midnight it misses some, and in a repeated hour its next tick may be in the past.

    The expression may be one of `@hourly`, `@daily`, `@midnight`, `@weekly`, `@monthly`, `@yearly`
    and `@annually`, which are stored as five fields.

    Raises:
        ScheduleError: the expression or the zone does not exist, no time ever matches, or a step or
            range does not match what it suggests.
    """

    expression: str
    tz: str = "UTC"
    _fields: CronSim = field(init=False, repr=False, compare=False)
    _times: tuple[time, ...] = field(init=False, repr=False, compare=False)
    _fixed: bool = field(init=False, repr=False, compare=False)
    _zone: ZoneInfo = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        fields = self.expression.upper().split()
        if len(fields) == 1 and fields[0].startswith("@"):
            fields = self._expand(fields[0]).split()
        if len(fields) != 5:  # noqa: PLR2004 - as in the message
            raise ScheduleError(
                f"The cron expression {self.expression!r} has {len(fields)} "
                f"field{'s' * (len(fields) != 1)}; it must have 5 "
                "(minute, hour, day of month, month, day of week)."
            )
        expression = " ".join(fields)
        for number, text in enumerate(fields):
            if (fault := _fault(text, _FIELDS[number])) is not None:
                raise self._unusable(fault)
        try:
            parsed = CronSim(expression, _EXAMPLE)
        except (CronSimError, ValueError) as error:
            raise self._unusable(f"{str(error).lower()}.") from None
        try:
            zone = ZoneInfo(self.tz)
        except (KeyError, ValueError, OSError):  # unknown, not a relative path, a directory
            raise ScheduleError(f"There is no time zone {self.tz!r}.") from None
        times = (time(hour, minute) for hour in parsed.hours for minute in parsed.minutes)
        for name, value in {
            "expression": expression,
            "_fields": parsed,
            "_times": tuple(sorted(times)),
            "_fixed": not any(each.startswith("*") for each in fields[:2]),
            "_zone": zone,
        }.items():
            object.__setattr__(self, name, value)
        self.next_after(_EXAMPLE, _EXAMPLE)

    def _expand(self, alias: str) -> str:
        if alias == "@REBOOT":
            raise self._unusable(
                "a job belongs to no machine or instance, so it can't run at a start: give an "
                "interval or a time."
            )
        if alias not in _ALIASES:
            raise self._unusable(f"the aliases are {', '.join(_ALIASES).lower()}.")
        return _ALIASES[alias]

    def _unusable(self, why: str) -> ScheduleError:
        return ScheduleError(f"The cron expression {self.expression!r} can't be used: {why}")

    def next_after(
        self,
        moment: datetime,
        anchor: datetime,  # noqa: ARG002 - an interval needs it
    ) -> datetime:
        """Return the first tick after `moment`; a tick at `moment` itself is not after it.

        Raises:
            ScheduleError: there is none within 41 years.
        """
        for stretch in self._stretches(moment, moment + _HORIZON):
            for reading in self._readings(stretch.start, stretch.end):
                return stretch.moment(reading)
        raise ScheduleError(
            f"The cron expression {self.expression!r} never matches a time in {self.tz}."
        )

    def count_between(
        self,
        after: datetime,
        until: datetime,
        anchor: datetime,  # noqa: ARG002 - an interval needs it
    ) -> TickRange | None:
        """Return the ticks after `after` and not after `until`; None if there are none.

        It takes a few microseconds for each day in between.
        """
        ticks = 0
        ticking: list[_Stretch] = []
        for stretch in self._stretches(after, until):
            # The skipped readings and the reading at which the jump ends are one tick together.
            landed = max(stretch.start, stretch.jump + RESOLUTION)
            number = min(1, self._count(stretch.start, landed)) + self._count(landed, stretch.end)
            if number:
                ticks += number
                ticking.append(stretch)
        if not ticking:
            return None
        first, last = ticking[0], ticking[-1]
        return TickRange(
            first.moment(next(self._readings(first.start, first.end))),
            last.moment(next(self._readings(last.start, last.end, backwards=True))),
            ticks,
        )

    def describe(self) -> str:
        """Return the schedule for people: "at 03:00 every day, Europe/Berlin"."""
        text = self._fields.explain()
        if not self._fields.day_and:  # as in crontab(5): either of the two days matches
            if self._every_day():
                minute, hour, _, month, _ = self.expression.split()
                text = CronSim(f"{minute} {hour} * {month} *", _EXAMPLE).explain()
            text = _EITHER_DAY.sub(r"\1\4 \2 or \3", text)
        for digit, ending in {1: "st", 2: "nd", 3: "rd"}.items():  # cronsim writes 21th
            text = re.sub(rf"\b([2-5]{digit})th\b", rf"\1{ending}", text)
        return f"{text[0].lower()}{text[1:]}, {self.tz}"

    def _every_day(self) -> bool:
        weekdays = {day % 7 for day in self._fields.weekdays if isinstance(day, int)}
        return self._fields.days >= set(range(1, 32)) or weekdays == set(range(7))

    @override
    def __str__(self) -> str:
        return f"cron {self.expression} {self.tz}"

    def _stretches(self, after: datetime, until: datetime) -> "Iterator[_Stretch]":
        """Yield the stretches of the local clock after `after` and not after `until`."""
        start, end = after + RESOLUTION, until + RESOLUTION
        # From a day earlier, so that it is known which readings are repeated.
        for begin, finish, before, offset in _steady(self._zone, start - _DAY, end):
            since = max(begin, start)
            if since < finish:
                first = begin + (before if self._fixed else offset)
                jump = since + offset
                if since > begin:
                    first = max(first, jump)
                yield _Stretch(first, min(finish, end) + offset, jump, offset)

    def _count(self, start: datetime, end: datetime) -> int:
        return sum(len(self._indexes(day, start, end)) for day in _days(start, end))

    def _readings(
        self, start: datetime, end: datetime, *, backwards: bool = False
    ) -> Iterator[datetime]:
        """Yield the matching readings from `start` to before `end`, or from the last to the first.

        They are readings of the local clock labelled as UTC, as in `_Stretch`.
        """
        step = -1 if backwards else 1
        for day in _days(start, end)[::step]:
            for index in self._indexes(day, start, end)[::step]:
                yield datetime.combine(day, self._times[index], UTC)

    def _indexes(self, day: date, start: datetime, end: datetime) -> range:
        if day.month not in self._fields.months or not self._fields.match_day(day):
            return range(0)
        first = bisect_left(self._times, start.time()) if day == start.date() else 0
        last = bisect_left(self._times, end.time()) if day == end.date() else len(self._times)
        return range(first, last)


# cronsim's text for a day of the month "and" a day of the week, and the months
_EITHER_DAY: Final = re.compile(r"^(.*?) (on .*) and (on .*?)( in .*)?$")


def _fault(text: str, field: _Field) -> str | None:
    """Return how a field of a cron expression misleads, and what to write; None: it does not.

    A step beyond its range leaves only the first value: minute */90 ticks each hour.
    """
    for term in text.split(","):
        span, slash, step = term.partition("/")
        first, dash, last = span.partition("-")
        if span == "*":
            low, high = field.lowest, min(field.highest, 6 if field.names is _DAYS else 59)
        else:
            start, end = field.value(first), field.value(last) if dash else field.highest
            if start is None or end is None:
                if slash and span in {"L", "LW"}:
                    return (
                        f"{span} takes no step: write {span} for {term} in the {field.name} field."
                    )
                if span == "?":
                    return f"? in the {field.name} field is not supported: write *."
                continue  # cronsim refuses it, or has a meaning for it
            low, high = start, end
        if low > high:
            ends = (
                _span(first, field.label(6 if field.names is _DAYS else field.highest, first)),
                _span(field.label(field.lowest, last), last),
            )
            return (
                f"the range {span} in the {field.name} field runs backwards: "
                f"write {','.join(ends)}."
            )
        if not slash or not re.fullmatch(r"[0-9]+", step, re.ASCII):
            continue
        if not step.strip("0"):
            return f"the step of {term} in the {field.name} field must be at least 1."
        if len(step) > 4 or int(step) > high - low:  # noqa: PLR2004 - longer than any range
            only = field.label(low, first)
            interval = (
                f", or every=timedelta({field.unit}={step}) for an interval"
                if field.unit and not dash
                else ""
            )
            return (
                f"the step of {term} in the {field.name} field is beyond its range "
                f"({low} to {high}): only {only} would match. Write {only} for that{interval}."
            )
    return None


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first}-{last}"


Schedule: TypeAlias = Every | Cron


def parse(text: str) -> Schedule:
    """Return the schedule whose `str` is `text`.

    Raises:
        ScheduleError: there is none.
    """
    if match := _EVERY.fullmatch(text):
        return Every(timedelta(microseconds=int(Decimal(match[1]).scaleb(6))))
    if match := _CRON.fullmatch(text):
        return Cron(match[1], match[2])
    raise ScheduleError(f"{text!r} is not a schedule.")


class _Stretch(NamedTuple):
    """The readings of a local clock while its offset from UTC stays the same.

    Readings are local datetimes labelled as UTC. Those from `start` to before `end` belong to the
    stretch. Those before `jump` are skipped by the clock, and tick at `jump`.
    """

    start: datetime
    end: datetime
    jump: datetime
    offset: timedelta

    def moment(self, reading: datetime) -> datetime:
        """Return when `reading` ticks, in UTC."""
        return max(reading, self.jump) - self.offset


def _steady(
    zone: ZoneInfo, start: datetime, end: datetime
) -> Iterator[tuple[datetime, datetime, timedelta, timedelta]]:
    """Yield begin, finish, the offset before and the offset during each stretch of one offset.

    A stretch is at most about a week long, so that the first ones cost little. The last may finish
    after `end`.
    """
    begin = start.replace(microsecond=0)
    before = _offset(zone, begin)
    while begin < end:
        offset = _offset(zone, begin)
        finish = begin
        while finish < min(end, begin + _WEEK):
            if _offset(zone, finish + _DAY) != offset:
                finish = _change(zone, finish)
                break
            finish += _DAY
        yield begin, finish, before, offset
        begin, before = finish, offset


def _change(zone: ZoneInfo, moment: datetime) -> datetime:
    """Return when the offset changes, within the day after `moment`.

    Since 1970 no zone has changed its offset twice within three days.
    """
    before = _offset(zone, moment)

    def changed(second: int) -> bool:
        return _offset(zone, moment + second * _SECOND) != before

    return moment + bisect_left(range(_DAY // _SECOND), x=True, key=changed) * _SECOND


def _offset(zone: ZoneInfo, moment: datetime) -> timedelta:
    return moment.astimezone(zone).utcoffset() or timedelta()


def _days(start: datetime, end: datetime) -> list[date]:
    first = start.date()
    return [first + timedelta(days=number) for number in range((end.date() - first).days + 1)]


def _out_of_range(seconds: str) -> ScheduleError:
    return ScheduleError(f"The interval ({seconds} s) must be between 1 s and {LONGEST.days} days.")


def _seconds(interval: timedelta) -> str:
    return f"{Decimal(interval // RESOLUTION).scaleb(-6).normalize():f}"


def _every(number: str, unit: str) -> str:
    return f"every {unit}" if number == "1" else f"every {number} {unit}s"
