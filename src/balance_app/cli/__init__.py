"""`balance-app`: the service, its database, and everything that a running one can do.

`app` has the commands that run something here, `remote` those for a running service,
`session` executes these over HTTP (`client`) and `output` formats the answers: tables on a
terminal, plain lines or the service's JSON elsewhere. The exit code says how it ended.
"""
