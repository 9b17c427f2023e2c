"""Periodic jobs, shared by any number of equal instances without a master.

A job is a function with a name and a schedule. Its row in PostgreSQL holds its whole state: when it
may start, and who runs it until when. There is no queue beside it and nobody who hands out work:
each instance reads the rows, knows what it runs itself, and claims a job when its policy lets it.

            ready, and the backoff over            returned, failed, timed out, cancelled, released
    waiting --------------------------> running -----------------------------------------> waiting
       ^                                   |
       '-------- lease expired: lost ------'   (the next owner has a higher fence)

Why two runs of a job never overlap: an instance runs a job only while it trusts its lease, and it
trusts it for a lease's time from the moment of *asking* for it, while PostgreSQL lets others take
the job only a lease's time after it *granted* it, by its own clock, which is later. An instance
that can't renew stops its runs before that; if it can't even do that, the kernel ends it. What a
run writes is checked against its fence in the transaction that writes it.

Why they are shared evenly: an instance that runs k jobs waits for a ready job longer than one that
runs k - 1, so the least loaded takes it, and each instance needs to know its own load only.
"""

from balance_app.jobs.job import Job, Registry, job
from balance_app.jobs.run import Run

__all__ = ["Job", "Registry", "Run", "job"]
