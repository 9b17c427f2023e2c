"""Periodic jobs, shared by any number of equal instances without a master.

A job is a function with a name and a schedule. Its row in PostgreSQL holds its whole state: when it
may start, which instance runs it, and until when that instance's lease lasts. There is no queue
beside it and no dispatcher: each instance reads the rows, knows its own runs, and claims a job when
its claim policy allows it.

          ready, and the backoff has passed        returned, failed, timed out, cancelled, released
    waiting --------------------------> running -----------------------------------------> waiting
       ^                                   |
       '-------- lease expired: lost ------'   (the next owner has a higher fence)

Two runs of a job never overlap. An instance runs a job only while it trusts its lease, and that
trust ends a lease's length after it *sent* the claim or renewal. PostgreSQL lets other instances
take the job a lease's length after it *granted* the lease, which is later. An instance that can't
renew a lease stops its run before that; if it can't stop the run, the kernel kills the process.
What a run writes is checked against its fence in the transaction that writes it.

Jobs are shared evenly. An instance that runs k jobs waits longer before it claims a ready job than
one that runs k - 1. So the least loaded instance claims it, and each needs to know only its own
load.
"""

from balance_app.jobs.job import Job, Registry, job
from balance_app.jobs.run import Run
from balance_app.jobs.threads import ThreadRun

__all__ = ["Job", "Registry", "Run", "ThreadRun", "job"]
