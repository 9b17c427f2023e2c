"""The URLs of alerts and pings: who has one can write there, so all but the host is secret."""

import re
from collections.abc import Mapping
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

MAX_LENGTH: Final = 2000
JOB: Final = "{job}"
_INVALID: Final = re.compile(r"[^!-~]|[\\\"<>^`|]")
_SEPARATED_OTHERWISE: Final = re.compile(r"[,;]([^/=]+=)?https?://")
# Shorter texts, and names in a path such as "services", are in many texts.
_SHORTEST_SECRET: Final = 8
_SHORTEST_SEGMENT: Final = 16


class JobUrls(NamedTuple):
    """Where the runs of jobs are reported."""

    # with {job} in it, for all jobs that have none of their own
    for_all: str | None
    by_job: Mapping[str, str]

    def of(self, job: str) -> str | None:
        """Return a job's URL; None: it has none."""
        if job in self.by_job or self.for_all is None:
            return self.by_job.get(job)
        return self.for_all.replace(JOB, job)

    @property
    def all(self) -> list[str]:
        """Every URL."""
        return [*self.by_job.values(), *([] if self.for_all is None else [self.for_all])]


def check(url: str) -> None:
    """Refuse what is no http(s) URL.

    Raises:
        ValueError: the message says why, and shows nothing of the URL.
    """
    if len(url) > MAX_LENGTH:
        raise ValueError(f"has more than {MAX_LENGTH} characters")
    if _INVALID.search(url):
        raise ValueError("has a character that a URL can't have: write it as % and its code")
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - it is read to be checked
    except ValueError:
        raise ValueError("is not a URL") from None
    if not _has_valid_host(url):
        raise ValueError("has a host that can't be one")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be a URL like https://hooks.example.com/...")
    if "#" in url:
        raise ValueError("has a #, behind which nothing is sent: write it as %23")


def _has_valid_host(url: str) -> bool:
    # Those who need no URL do without the time that its import takes.
    from httpx import URL, InvalidURL  # noqa: PLC0415

    try:
        # As httpx reads it, and as the system's resolver gets it.
        URL(url).host.encode("idna")
    except (InvalidURL, ValueError):
        return False
    return True


def job_urls(text: str) -> JobUrls:
    """Read `JOB=URL` pairs, separated by spaces, and at most one URL with `{job}` in it.

    Raises:
        ValueError: the message says why, and shows nothing of a URL.
    """
    for_all: str | None = None
    by_job: dict[str, str] = {}
    for each in text.split():
        name, equals, url = each.partition("=")
        if _SEPARATED_OTHERWISE.search(each):
            raise ValueError("must have a space, and no comma, between two URLs")
        if equals and "/" not in name:
            if name in by_job:
                raise ValueError("must have one URL for each job, and has two for one of them")
            check(url)
            by_job[name] = url
        elif JOB in each and for_all is None:
            check(each.replace(JOB, "job"))
            for_all = each
        else:
            raise ValueError("must be JOB=URL pairs, and at most one URL with {job} in it")
    return JobUrls(for_all, by_job)


def secrets(url: str) -> set[str]:
    """Return what no text may show: the URL, and those parts of it that are long enough."""
    parts = urlsplit(url)
    written = {parts.path.strip("/"), parts.query, parts.netloc.rpartition("@")[0]}
    # What is around the name of a job is the same for each.
    around = {part.strip("/") for each in written for part in each.split(JOB)}
    found = {each for each in around if len(each) >= _SHORTEST_SECRET}
    found |= {each for each in parts.path.split("/") if len(each) >= _SHORTEST_SEGMENT}
    return {form for each in {url, *found} if JOB not in each for form in (each, unquote(each))}
