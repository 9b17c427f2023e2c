"""`balance-app`: the service, its database, and everything that a running one can do.

`app` has the commands that run something here, `key_commands` and `ledger_commands` those that use
the database itself, `job_commands` and `balance_commands` those for a running service. The latter
are executed by a `session` each, which uses the service by its public client
(`balance_app.client`) with the key that `credentials` finds, and report by `output` and
`balance_output`: tables on a terminal, plain lines or the service's JSON elsewhere. The exit code
(`errors`) says how it ended.
"""
