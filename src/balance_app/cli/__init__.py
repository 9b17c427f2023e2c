"""`balance-app`: the service, its database, and everything that can be asked of a running one.

`app` has the commands that run something here, `remote` those that ask a running service,
`session` does what they say over HTTP (`client`) and `output` shows what came back: tables on a
terminal, plain lines or the service's JSON elsewhere. The exit code says how it ended.
"""
