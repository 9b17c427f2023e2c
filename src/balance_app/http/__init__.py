"""What each request passes, whichever feature it is for.

From the socket inwards: `protocol` reads HTTP/1.1 with limits and deadlines, `middleware` gives a
request its id and turns what failed into a problem, `body` reads strict JSON, `openapi` documents
what comes back, `health` answers those who decide whether requests should come here at all.
`services` is where routes find the parts that `main` has put together.

An error is always a problem document (RFC 9457): bad input gives a 4xx and changes nothing, 503
with `Retry-After` says that the database is unavailable or that too much waits, and a 500 is a
mistake of the service, under the request's id in its log.
"""
