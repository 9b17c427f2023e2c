# `make lock` renews the digest. From elsewhere, such as a registry of your own: --build-arg PYTHON_IMAGE=...
ARG PYTHON_IMAGE=python:3.13-slim@sha256:7c61056e61ac89e852de05f3dc6fa51a6dd2181797bceed46aa725dd7cb2cd3b

FROM $PYTHON_IMAGE AS builder

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_REQUIRE_HASHES=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /build

# The dependencies come before the source: a changed line of code does not install them again.
COPY requirements.lock ./
RUN python -m venv --without-pip /opt/venv \
 && pip --python /opt/venv/bin/python install --no-deps -r requirements.lock

# The packages that build the wheel come from the developers' lock, with their hashes, and stay in
# this stage. If one is missing in the list, this step fails: pip refuses a package without a hash.
COPY requirements-dev.lock ./
RUN awk '/^[a-z]/ { wanted = /^(hatchling|packaging|pathspec|pluggy|tomlkit|trove-classifiers)==/ } \
         wanted' requirements-dev.lock > build.lock \
 && python -m venv --without-pip /opt/build \
 && pip --python /opt/build/bin/python install -r build.lock

COPY pyproject.toml README.md LICENSE ./
COPY alembic alembic
COPY src src
RUN /opt/build/bin/hatchling build -t wheel \
 && PIP_REQUIRE_HASHES=0 pip --python /opt/venv/bin/python install --no-deps --no-index dist/*.whl


FROM $PYTHON_IMAGE

# The init is Debian's, as the base image is; the archive's signatures are checked by apt.
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log \
 && useradd --uid 10001 --no-create-home --home-dir /app --shell /usr/sbin/nologin app

COPY --from=builder /opt/venv /opt/venv

# HOME is set for any user, also one that /etc/passwd does not name (`--user 12345`); nothing is written to it.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOST=0.0.0.0 \
    PORT=3000

WORKDIR /app
USER 10001
EXPOSE 3000

# The probe requests /readyz over HTTP: database reachable, schema right. It imports almost nothing, as
# it runs often, and its timeout is long: a burst must not make a container unhealthy.
COPY src/balance_app/http/probe.py /opt/probe.py
HEALTHCHECK --interval=10s --timeout=30s --start-period=60s --retries=3 \
    CMD ["python", "-I", "-S", "/opt/probe.py"]

# An instance ends itself by a signal, which the kernel drops for process 1. With -s the init also works where
# the runner brings one of its own, or shares the processes of a pod.
ENTRYPOINT ["tini", "-s", "--"]
CMD ["balance-app", "serve"]

# Last: another version or revision builds no layer again.
ARG VERSION=unreleased
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="balance_app" \
      org.opencontainers.image.description="Exact user balances in real time on PostgreSQL" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.source="$SOURCE" \
      org.opencontainers.image.licenses="MIT"
