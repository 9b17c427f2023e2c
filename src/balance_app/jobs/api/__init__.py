"""The HTTP API of jobs: their status and history, and the controls.

`status` is one snapshot of every job and instance by the database's clock, `events` sends it once a
second to every viewer, `history` returns the runs page by page, `stats` returns the statistics for
the metrics, and `controls` runs, pauses, resumes, cancels and forgets jobs. Each control is one
conditional statement on the job's row; a refusal is a problem that names the state.

The engine imports nothing of this package. An instance that runs no jobs has the routes too.
"""
