"""`balance-app up`: the whole service on one machine.

`launcher` starts a number of instances and restarts those that end; no instance knows of it, and it
decides nothing for them. `postgres` runs an embedded PostgreSQL when no database is configured; its
data directory is made under another name and renamed, so an interrupted start leaves nothing that
looks complete.
"""
