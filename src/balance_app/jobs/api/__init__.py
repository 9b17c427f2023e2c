"""What people and programs see of the jobs, and do to them.

`status` is one snapshot of every job and instance by the database's clock, `events` sends it once a
second to all who watch, `history` reads the runs page by page, `stats` gives the metrics, and
`controls` runs, pauses, resumes, cancels and forgets. Each control is one statement that decides by
the job's row as it then is; what the state does not allow is a problem that says why.

The engine knows nothing of this package: an instance without jobs has the routes all the same.
"""
