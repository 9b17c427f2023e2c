"""The HTTP layer that the requests of all features pass.

From the socket inwards: `protocol` reads HTTP/1.1 with limits and deadlines, `middleware` gives a
request its id and turns exceptions into problems, `body` reads strict JSON, `openapi` documents the
answers, `health` serves load balancers and Prometheus. Through `services` routes find the parts
that `main` has put together.

An error is always a problem document (RFC 9457): bad input gives a 4xx and changes nothing, 503
with `Retry-After` means that the database is unavailable or the service overloaded, and a 500 is an
error of the service, logged under the request's id.
"""
