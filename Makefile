# The commands of this project; `make help` is made from the ## comments.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run load test test-pooler test-matrix check coverage lint format bench screenshots reset psql migration release sbom lock lock-images clean \
	docker-up docker-down docker-reset docker-logs drill-failover drill-restore drill-rolling

# The first that runs and is new enough; another one: make PYTHON=/path/to/python ...
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
INSTANCES ?= 5
# Files of tests that run side by side, each with a PostgreSQL of its own: most of their time is waiting.
WORKERS ?= 4
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements-dev.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/it ..."; exit 1; }
	@echo "Installing what is locked into $(VENV) (once; a minute or so) ..."
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes --only-binary :all: -r requirements-dev.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation --editable .
	@# Python reads this file in the locale's encoding: a relative path is always ASCII.
	@for pth in $(VENV)/lib/python3*/site-packages/*balance_app*.pth; do echo ../../../../src > "$$pth"; done
	@touch $@

run: $(READY) ## start PostgreSQL and five instances: http://127.0.0.1:3000 (Ctrl-C stops)
	@exec $(BIN)/balance-app up --instances $(INSTANCES) $(if $(PORT),--port $(PORT))

load: $(READY) ## fire 10 000 withdrawals at the running instances, print the verdict, draw the answers
	@ulimit -n "$$(ulimit -Hn)" && exec $(BIN)/python -m loadtest $(if $(PORT),http://127.0.0.1:$(PORT)) $(LOAD)

test: $(READY) ## run all tests against a real PostgreSQL
	@ulimit -n "$$(ulimit -Hn)" && exec $(BIN)/python $(MEASURED) -m pytest \
		$(if $(BALANCE_APP_FULL),-o faulthandler_timeout=0) \
		$(or $(TESTS),--numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder)

test-matrix: $(READY) ## run all tests on PostgreSQL 14 to 18: make test-matrix VERSIONS="14 15" TESTS=tests/db
	@ulimit -n "$$(ulimit -Hn)" && exec $(BIN)/python -m tests.matrix $(VERSIONS) \
		--pytest="$(or $(TESTS),--numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder)"

# What reads or changes balances, and claims jobs; the tests of servers that they start themselves are not among them.
test-pooler: $(READY) ## run the tests of balances, and of jobs' claims and takeovers, through PgBouncer
	@ulimit -n "$$(ulimit -Hn)" && BALANCE_APP_TEST_POOLER=transaction exec $(BIN)/python -m pytest \
		--numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder \
		$(or $(TESTS),tests/balances tests/accounts tests/system/test_burst.py tests/system/test_pooler.py \
		tests/jobs/test_takeover.py tests/jobs/test_repository.py tests/jobs/test_declarations.py \
		tests/jobs/test_outcomes.py tests/jobs/test_release.py tests/jobs/test_sharing.py)

check: lint coverage ## linters, tests, and which branches of the source they run

coverage: $(READY) ## run all tests, and measure which branches of the source they run
	@rm -rf .coverage && mkdir .coverage
	@$(MAKE) --no-print-directory test MEASURED="-m coverage run"
	@$(BIN)/python -m coverage combine --quiet && $(BIN)/python -m coverage report

lint: $(READY) ## ruff, mypy, the direction of imports, bandit, this project's own rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet -ll --recursive src loadtest bench drills alembic examples
	$(BIN)/ast-grep test --skip-snapshot-tests
	$(BIN)/ast-grep scan --error=unused-suppression

format: $(READY) ## format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## measure, write docs/performance.md (an hour): make bench PARTS="burst hot" ROUNDS=3
	@# The peers in Node are skipped where it is missing.
	@if command -v npm >/dev/null && ! test -d bench/peers/node_modules; then \
		npm ci --prefix bench/peers --ignore-scripts --no-audit --no-fund; fi
	@ulimit -n "$$(ulimit -Hn)" && exec $(BIN)/python -m bench $(PARTS)

drill-failover: $(READY) ## fail over PostgreSQL 20 times under load (20 minutes; Patroni, etcd): drills/README.md
	@exec $(BIN)/python -m drills.failover $(DRILL)

drill-restore: $(READY) ## back up under load, restore to a moment (3 minutes): docs/backup.md, drills/README.md
	@exec $(BIN)/python -m drills.restore $(DRILL)

drill-rolling: $(READY) ## replace five instances behind nginx and HAProxy under load (five minutes): drills/README.md
	@ulimit -n "$$(ulimit -Hn)" && exec $(BIN)/python -m drills.rolling $(DRILL)

screenshots: $(READY) ## make the pictures in docs/ from a real run (35 minutes; needs chromium)
	@PYTHONPATH=. $(BIN)/python -m tests.web.screenshots

reset: $(READY) ## delete the data of `make run`
	@$(BIN)/balance-app reset

psql: $(READY) ## a prompt in the database of `make run`
	@$(BIN)/balance-app psql

migration: $(READY) ## make an empty migration with the next number: make migration NAME="Add holds"
	@test -n "$(NAME)" || { echo 'Say what it does: make migration NAME="Add holds"'; exit 2; }
	@last=$$(ls alembic/versions/*.py | tail -1 | xargs basename | cut -c1-4) && \
		$(BIN)/alembic revision --rev-id "$$(printf %04d $$((10#$$last + 1)))" -m "$(NAME)"

release: $(READY) ## check everything, tag the version of pyproject.toml, build wheel and sbom into dist/
	@version=$$($(BIN)/balance-app --version | cut -d ' ' -f 2) && \
		{ test -z "$$(git status --porcelain)" || { echo "There are changes that are not committed."; exit 1; }; } && \
		{ grep -qE "^## \[$$version\] - [0-9]{4}-[0-9]{2}-[0-9]{2}$$" CHANGELOG.md || \
			{ echo "CHANGELOG.md has no section \"## [$$version] - YYYY-MM-DD\"."; exit 1; }; } && \
		{ ! git rev-parse -q --verify "refs/tags/v$$version" >/dev/null || { echo "v$$version exists already."; exit 1; }; } && \
		$(MAKE) check && \
		$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . && \
		$(MAKE) sbom && \
		git tag --annotate "v$$version" --message "balance_app $$version" && \
		echo "Tagged v$$version; the wheel and sbom.json are in dist/. The image: docker build --build-arg VERSION=$$version \
			--build-arg REVISION=$$(git rev-parse HEAD) --build-arg SOURCE=URL --tag balance-app:$$version ."

sbom: $(READY) ## list what the image installs, with versions and hashes: dist/sbom.json (CycloneDX)
	@mkdir -p dist
	@# The lock has no graph of dependencies, of which the tool warns.
	@$(BIN)/python -W ignore -m cyclonedx_py requirements --output-reproducible --pyproject pyproject.toml \
		--output-file dist/sbom.json requirements.lock
	@echo "dist/sbom.json has $$(grep -c '"purl"' dist/sbom.json) packages."

lock: lock-images ## renew the lock files (needs uv), and the digests of the base images (needs docker)
	uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --upgrade \
		--no-emit-index-url --no-header pyproject.toml -o requirements.lock
	uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --upgrade \
		--no-emit-index-url --no-header pyproject.toml --extra local --extra otel --group dev \
		-c requirements.lock -o requirements-dev.lock

# A tag may mean another image tomorrow; its digest never does. It names the index of all platforms.
lock-images:
	@for file in Dockerfile docker-compose.yml; do \
		for image in $$(grep -oE '[a-z]+:[0-9a-z.-]+@sha256:[0-9a-f]{64}' $$file | cut -d @ -f 1 | sort -u); do \
			digest=$$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' $$image) || \
				{ echo "The base images keep their digests: that of $$image can't be learned here."; continue; }; \
			sed -i.old -E "s/$$image@sha256:[0-9a-f]{64}/$$image@$$digest/" $$file && rm $$file.old; \
		done; \
	done

clean: ## delete the environment and the caches, but no data
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .import_linter_cache .postgres

docker-up: ## the same in containers: http://127.0.0.1:3001 to 3005
	docker compose up --detach --build --wait
	@echo "  page       http://127.0.0.1:3001, and the same at 3002 to 3005: one port for each instance"
	@echo "  try        make load (over all five), make docker-logs, make docker-down"

docker-down: ## stop the containers, keep the data
	docker compose down

docker-reset: ## stop the containers, delete the data
	docker compose down --volumes

docker-logs: ## follow the logs; of one instance: make docker-logs INSTANCE=app3
	docker compose logs --follow --tail 100 $(INSTANCE)
