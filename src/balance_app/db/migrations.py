"""The schema: its owner, its revision, and the upgrade to this program's revision.

The revision is in a table of our own name, `balance_app_version`, beside the oldest revision whose
program still works on the schema (`compatible_from`). Earlier releases kept it in alembic's usual
`alembic_version`; migration 0010 drops that table.

An upgrade is one message to PostgreSQL: lock, check, every statement, commit. An instance that is
killed or frozen meanwhile has sent all of it or nothing, so that no other instance waits for it.
"""

import asyncio
import base64
import hashlib
import hmac
import secrets
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import asyncpg

from balance_app.db.outages import Kind, classify
from balance_app.db.replication import shortage_on
from balance_app.sessions import open_session
from balance_app.settings import Settings

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATION_LOCK: Final = 0x62616C616E6365  # "balance"; any number no other program here uses
VERSION_TABLE: Final = "balance_app_version"
RETRY_SECONDS: Final = 0.3
# Requests queue behind an upgrade that waits for a table: they are served between its tries.
LOCKED_SECONDS: Final = 2.0

# The privileges that an instance needs on each table, or on some of its columns; which, and what
# jobs need beside, is in the function `grant_to_instances` of migration 0015.
RIGHTS: Final = {
    "access_state": ("SELECT", "UPDATE"),
    "api_keys": ("SELECT", "UPDATE"),
    "sessions": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "actions": ("SELECT", "INSERT"),
    "users": ("SELECT", "INSERT", "UPDATE"),
    "entries": ("SELECT", "INSERT"),
    "holds": ("SELECT", "INSERT", "UPDATE"),
    "idempotency_keys": ("SELECT", "INSERT", "DELETE"),
    "opening_keys": ("SELECT", "INSERT"),
    "external_ids": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "user_settings": ("SELECT", "INSERT"),
    "jobs": ("SELECT", "INSERT", "UPDATE"),
    "job_runs": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "job_run_lines": ("SELECT", "INSERT", "DELETE"),
    "job_run_tracebacks": ("SELECT", "INSERT"),
    "job_declarations": ("SELECT", "INSERT", "UPDATE"),
    "instances": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "daily_balances": ("SELECT", "INSERT", "UPDATE"),
    "seals": ("SELECT", "INSERT"),
    "seal_parts": ("SELECT", "INSERT"),
    "daily_totals": ("SELECT", "INSERT", "UPDATE"),
    "counted_users": ("SELECT", "INSERT", "UPDATE"),
    "table_sizes": ("SELECT", "INSERT", "DELETE"),
    "alerts": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "pings": ("SELECT", "INSERT", "UPDATE"),
}

# Columns by which the tables of every release are recognized; columns are only ever added.
FIRST_TABLES: Final = {
    "users": {"id", "balance", "version", "created_at"},
    "entries": {"user_id", "version", "amount", "balance", "key", "at"},
    "idempotency_keys": {"key", "outcome", "user_id", "amount", "balance", "version", "at"},
}
# The revisions of the releases that kept them in `alembic_version`.
FIRST_REVISIONS: Final = {"0001", "0002", "0003"}


class UnusableDatabaseError(Exception):
    """The database answers, but waiting can't make it usable; the message says what to do."""


class Installation(NamedTuple):
    """Distinguishes these tables from others of the same names."""

    # generated with the tables; a backup has the same
    id: str
    # the OID of table `jobs`; a restored table has another
    oid: int


class Schema(NamedTuple):
    """A schema that this program can work on."""

    revision: str
    installation: Installation


class Version(NamedTuple):
    """The version that is recorded in a schema."""

    revision: str
    # the oldest revision whose program works on it; None: from a release that did not record it
    compatible_from: str | None
    installation: str = ""

    def fault(self) -> str | None:
        """Return why this program can't work on a schema of this version, or None."""
        head, known = alembic_head(), _known_revisions()
        if self.revision == head:
            return None
        if self.revision in known:
            return f"The schema is at {self.revision}, this program needs {head}."
        if self.compatible_from in known:  # of a later program that this one is compatible with
            return None
        return (
            f"The schema is at {self.revision}, for programs from {self.compatible_from} on; "
            f"this program is at {head}: start a newer one."
        )


# One row, which the migrations keep.
SCHEMA_VERSION: Final = "SELECT version_num, compatible_from FROM balance_app_version"

# Read without a lock on any table. $1 the schema
INSPECT: Final = """
SELECT current_user::text AS role, current_database()::text AS database,
       pg_is_in_recovery() AS standby,
       current_setting('server_encoding') AS encoding,
       pg_encoding_max_length(pg_char_to_encoding(current_setting('server_encoding'))) AS bytes,
       namespace.oid IS NOT NULL AS made,
       has_database_privilege(current_database(), 'CREATE') AS may_make,
       coalesce(has_schema_privilege(namespace.oid, 'USAGE'), false) AS may_use,
       coalesce(has_schema_privilege(namespace.oid, 'CREATE'), false) AS may_create,
       current_schemas(false)::text[] AS usual_schemas
FROM (SELECT) AS always LEFT JOIN pg_namespace AS namespace ON nspname = $1
"""

# $1 schemas, $2 names
RELATIONS: Final = """
SELECT nspname::text AS schema, relname::text AS name, pg_class.oid::bigint AS oid,
       relkind IN ('r', 'p') AS is_table, pg_get_userbyid(relowner)::text AS owner,
       pg_has_role(relowner, 'USAGE') AS is_ours,
       ARRAY(SELECT attname::text FROM pg_attribute
             WHERE attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped
             ORDER BY attnum) AS columns
FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE nspname = ANY ($1::text[]) AND relname = ANY ($2::text[])
ORDER BY relname
"""

# $1 schema, $2 and $3 pairs of a table and a privilege; a role without DELETE has it on no column
MISSING_RIGHTS: Final = """
SELECT name, string_agg(privilege, ', ' ORDER BY privilege) AS rights
FROM unnest($2::text[], $3::text[]) AS needed (name, privilege)
JOIN pg_class ON relname = name AND relnamespace = to_regnamespace(quote_ident($1))
WHERE NOT CASE privilege WHEN 'DELETE' THEN has_table_privilege(pg_class.oid, privilege)
          ELSE has_any_column_privilege(pg_class.oid, privilege) END
GROUP BY name ORDER BY name
"""

# The session that holds an advisory lock of 64 bits. $1 the key
HOLDER: Final = """
SELECT pid, application_name, to_char(coalesce(xact_start, backend_start) AT TIME ZONE 'UTC',
                                      'YYYY-MM-DD HH24:MI:SS') AS since
FROM pg_locks JOIN pg_stat_activity USING (pid)
WHERE locktype = 'advisory' AND granted AND objsubid = 1
  AND pg_locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND (classid::bigint << 32) | objid::bigint = $1
"""

# When another instance migrates, or the revision is not the one found: BL002, inspect again. The
# lock timeout is short, as requests queue behind an upgrade that waits for a locked table.
UPGRADE: Final = """
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '1s';
SELECT set_config('transaction_timeout', '0', true)
WHERE current_setting('server_version_num')::integer >= 170000;
SET LOCAL search_path = {schema};
SET LOCAL balance_app.run_role = '{run_role}';
DO $balance_app$
DECLARE
    found text;
BEGIN
    IF NOT pg_try_advisory_xact_lock({lock}) THEN
        RAISE EXCEPTION 'another instance migrates' USING ERRCODE = 'BL002';
    END IF;
    IF to_regclass('{schema}.{version_table}') IS NOT NULL THEN
        EXECUTE 'SELECT version_num FROM {version_table}' INTO found;
    ELSIF to_regclass('{schema}.alembic_version') IS NOT NULL THEN
        EXECUTE 'SELECT version_num FROM alembic_version' INTO found;
    END IF;
    IF found IS DISTINCT FROM nullif('{revision}', 'base') THEN
        RAISE EXCEPTION 'another instance has migrated' USING ERRCODE = 'BL002';
    END IF;
END
$balance_app$;
{statements}
COMMIT;
"""
CONCURRENT_UPGRADE: Final = "BL002"
# Causes that another try does not remove.
NOT_RETRIED: Final = {Kind.PRIVILEGE, Kind.SCHEMA_LOST}
DUPLICATES: Final = (
    asyncpg.DuplicateTableError,
    asyncpg.DuplicateFunctionError,
    asyncpg.DuplicateObjectError,
)

# For the schema of a release that kept its revision in `alembic_version`.
ADOPT: Final = """
CREATE TABLE balance_app_version (
    version_num varchar(32) NOT NULL, CONSTRAINT balance_app_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO balance_app_version (version_num) SELECT version_num FROM alembic_version;
"""


def _scripts() -> Path:
    """Return alembic's folder, in a checkout or in an installed package."""
    here = Path(__file__).parents[1]  # the package
    scripts = here / "_alembic"
    return scripts if scripts.is_dir() else here.parents[1] / "alembic"


def alembic_config() -> "Config":
    """Return alembic's configuration."""
    from alembic.config import Config  # noqa: PLC0415 - see `_known_revisions`

    config = Config()
    config.set_main_option("path_separator", "os")
    location = str(_scripts()).replace("%", "%%")  # % interpolates
    config.set_main_option("script_location", location)
    return config


def alembic_head() -> str | None:
    """Return the newest revision of this program."""
    return next(iter(_known_revisions()), None)


@cache
def _known_revisions() -> tuple[str, ...]:
    """Return the revisions of this program, the newest first: they are the names of the scripts.

    So an instance that finds the schema up to date has no need of alembic and SQLAlchemy, which
    take half a second and a fifth of its memory.
    """
    names = (script.stem.partition("_")[0] for script in (_scripts() / "versions").glob("*.py"))
    return tuple(sorted(names, reverse=True))


async def migrate(settings: Settings, report: Callable[[str], None] = lambda _: None) -> Schema:
    """Bring the schema to this program's head; any number of instances may try at once.

    Nothing is locked when the schema is up to date. `report` is called with a sentence when an
    upgrade begins, and when it waits for another session.

    Raises:
        UnusableDatabaseError: it is not ours, or a privilege is missing; nothing was changed.
        asyncpg.PostgresError, OSError, TimeoutError: it can't be reached.
    """
    while True:
        connection = await _connect(settings)
        try:
            async with asyncio.timeout(INSPECT_SECONDS):
                found = await _inspect(connection, settings)
            if isinstance(found, Schema):
                return found
            report(f"Migrating {found.place} from {found.upgrade_from} to {alembic_head()}.")
            if (shortage := await shortage_on(connection)) is not None:
                report(shortage)
            with _warnings_of(connection, report):
                wait = await _upgrade(connection, settings, found)
        finally:
            connection.terminate()
        if wait is not None:
            report(wait.reason)
            await asyncio.sleep(wait.seconds)


GRANT: Final = """
BEGIN;
SELECT pg_advisory_xact_lock({lock});
SELECT {schema}.grant_to_instances('{run_role}');
COMMIT
"""


async def grant(settings: Settings, report: Callable[[str], None]) -> None:
    """Grant what instances need to their role, and give it its password, if one is configured.

    Only the owner of the tables does; for another role there is nothing to do.

    Raises:
        UnusableDatabaseError: the password can't be set.
    """
    while True:
        try:
            return await _grant(settings, report)
        except asyncpg.PostgresError as error:
            if (wait := _wait_for_others(error)) is None:
                raise
        report(wait.reason)
        await asyncio.sleep(wait.seconds)


async def _grant(settings: Settings, report: Callable[[str], None]) -> None:
    connection = await _connect(settings)
    schema, role = settings.db_schema, settings.db_run_role
    names = {"schema": _quoted(schema), "run_role": role, "lock": _lock(schema)}
    try:
        if not await connection.fetchval(MAY_GRANT, schema):
            return
        with _warnings_of(connection, report):
            # ast-grep-ignore: sql-from-pieces - it can have no parameters; no name has a quote
            await connection.execute(GRANT.format(**names))
        if settings.db_run_password is not None:
            verifier = password_verifier(settings.db_run_password.get_secret_value())
            # ast-grep-ignore: sql-from-pieces - no parameter can stand there; neither has a quote
            await connection.execute(f"ALTER ROLE {_quoted(role)} PASSWORD '{verifier}'")
            report(f'The role "{role}" has the password DB_RUN_PASSWORD.')
    except (asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedObjectError) as error:
        raise UnusableDatabaseError(
            f'The role "{role}" can\'t be given its password: {error.args[0]}.'
        ) from None
    finally:
        connection.terminate()


# $1 the schema
MAY_GRANT: Final = """
SELECT has_function_privilege(pg_proc.oid, 'EXECUTE')
FROM pg_proc JOIN pg_namespace ON pg_namespace.oid = pronamespace
WHERE nspname = $1 AND proname = 'grant_to_instances'
"""


def password_verifier(password: str) -> str:
    """Return what PostgreSQL stores of a password (RFC 5803): it gets into no log of statements."""
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, SCRAM_ITERATIONS)
    client, server = (
        hmac.digest(salted, name, "sha256") for name in (b"Client Key", b"Server Key")
    )
    parts = (salt, hashlib.sha256(client).digest(), server)
    written = [base64.b64encode(part).decode() for part in parts]
    return "SCRAM-SHA-256${}:{}${}:{}".format(SCRAM_ITERATIONS, *written)


SCRAM_ITERATIONS: Final = 4096  # PostgreSQL's own


@contextmanager
def _warnings_of(
    connection: "asyncpg.Connection[Any]", report: Callable[[str], None]
) -> Iterator[None]:
    """Report the sentences of our own functions in the database."""

    def listen(_connection: object, message: asyncpg.PostgresLogMessage) -> None:
        if message.sqlstate == OWN_WARNING:
            report(message.message)

    connection.add_log_listener(listen)
    try:
        yield
    finally:
        connection.remove_log_listener(listen)


OWN_WARNING: Final = "BL003"


async def find(settings: Settings) -> Installation | None:
    """Return the installation, None if its revision is not one that this program can work on.

    Raises:
        as `migrate`.
    """
    connection = await _connect(settings)
    try:
        async with asyncio.timeout(INSPECT_SECONDS):
            found = await _inspect(connection, settings)
    finally:
        connection.terminate()
    return found.installation if isinstance(found, Schema) else None


async def require_schema(connection: "asyncpg.Connection[Any]") -> None:
    """Check that this program can read the schema; the role needs no right to write.

    Raises:
        UnusableDatabaseError: it can't, or there is none.
    """
    try:
        row = await connection.fetchrow(SCHEMA_VERSION)
    except asyncpg.UndefinedTableError:
        row = None
    if row is None:
        raise UnusableDatabaseError("The database has no schema of balance_app (DB_SCHEMA).")
    fault = Version(row["version_num"], row["compatible_from"]).fault()
    if fault is not None:
        raise UnusableDatabaseError(fault)


# A server that is frozen meanwhile gives no answer, and keeps nobody from another one.
INSPECT_SECONDS: Final = 10.0


async def _connect(settings: Settings) -> "asyncpg.Connection[asyncpg.Record]":
    arguments = settings.connect_arguments()
    # The default search path is inspected: it may lead to tables that a release before has made.
    del arguments["server_settings"]["search_path"]
    return await open_session(arguments)


class _Upgrade(NamedTuple):
    """An upgrade that is to be made."""

    # schema and database, for people
    place: str
    upgrade_from: str
    # SQL to run before the migrations
    before: str


class _Wait(NamedTuple):
    """Why an upgrade has to wait, and for how long before the next try."""

    reason: str
    seconds: float


async def _inspect(connection: "asyncpg.Connection[Any]", settings: Settings) -> Schema | _Upgrade:
    """Check the schema and return it, or the upgrade it needs; without locks and writes."""
    schema = settings.db_schema
    there = await connection.fetchrow(INSPECT, schema, timeout=settings.db_statement_seconds)
    assert there is not None  # noqa: S101 - it always has a row
    role, place = there["role"], f'schema "{schema}" of database "{there["database"]}"'
    if there["made"] and not there["may_use"]:
        raise UnusableDatabaseError(
            f'The role "{role}" may not use {place}: '
            f"GRANT USAGE ON SCHEMA {_quoted(schema)} TO {_quoted(role)}."
        )
    relations, version = await _tables_and_version(connection, schema, place)
    if version is not None:
        fault = version.fault()
        if fault is None:
            await _refuse_unusable(connection, schema, relations, role, place)
            installation = Installation(version.installation, relations["jobs"]["oid"])
            return Schema(version.revision, installation)
        if version.revision not in _known_revisions():
            raise UnusableDatabaseError(fault)
    elif clashes := sorted(relations.keys() & RIGHTS.keys()):
        raise UnusableDatabaseError(
            f"{place[0].upper()}{place[1:]} has {_enumerated(clashes)}, but no version of "
            f"balance_app's: they are another program's, or restored only in part. {WHAT_TO_DO}"
        )
    elif "db_schema" not in settings.model_fields_set:
        await _refuse_elsewhere(connection, schema, there["usual_schemas"])
    if there["standby"]:
        raise asyncpg.ReadOnlySQLTransactionError("the server is a standby: it can't migrate")
    _refuse_encoding(there)
    _refuse_without_rights(there, schema, relations, place)
    before = ""
    if version is None and not there["made"]:
        before = f"CREATE SCHEMA IF NOT EXISTS {_quoted(schema)};"
    elif version is not None and VERSION_TABLE not in relations:
        before = ADOPT
    return _Upgrade(place, "base" if version is None else version.revision, before)


WHAT_TO_DO: Final = (
    "Nothing was changed. Name a schema of its own (DB_SCHEMA), or another database (DB_NAME)."
)


async def _tables_and_version(
    connection: "asyncpg.Connection[Any]", schema: str, place: str
) -> tuple[dict[str, Any], Version | None]:
    """Return our tables, by name, and the version, as they were at one moment.

    Another instance may migrate meanwhile. (No snapshot would do: a migration that rewrites a table
    empties it for older ones.)
    """
    names = [*RIGHTS, VERSION_TABLE, "alembic_version"]
    before = None
    while True:
        rows = await connection.fetch(RELATIONS, [schema], names)
        relations = {row["name"]: row for row in rows}
        if before is not None and relations == before[0]:
            return before
        before = relations, await _version(connection, schema, relations, place)


async def _version(
    connection: "asyncpg.Connection[Any]", schema: str, relations: dict[str, Any], place: str
) -> Version | None:
    """Return the version recorded in the schema; None when it has no table of versions.

    Raises:
        UnusableDatabaseError: the version is not one of this program.
    """
    for table in (VERSION_TABLE, "alembic_version"):
        if table not in relations:
            continue
        try:
            # ast-grep-ignore: sql-from-pieces - names can't be parameters; this one is quoted
            rows = await connection.fetch(f"TABLE {_quoted(schema)}.{table}")
        except asyncpg.InsufficientPrivilegeError as error:
            raise UnusableDatabaseError(
                f"{place[0].upper()}{place[1:]} can't be read ({error}): "
                f"GRANT SELECT ON {_quoted(schema)}.{table}."
            ) from error
        found = [dict(row) for row in rows]
        if len(found) == 1 and (
            found[0].keys() >= {"version_num", "compatible_from", "installation"}
            if table == VERSION_TABLE
            else found[0].get("version_num") in FIRST_REVISIONS
            and all(
                name in relations and columns <= set(relations[name]["columns"])
                for name, columns in FIRST_TABLES.items()
            )
        ):
            row = found[0]
            return Version(
                row["version_num"], row.get("compatible_from"), str(row.get("installation"))
            )
        says = _enumerated([str(row.get("version_num")) for row in found]) if found else "nothing"
        raise UnusableDatabaseError(
            f"{place[0].upper()}{place[1:]} is another program's, or restored only in part: its "
            f"{table} says {says}, which does not fit the tables. {WHAT_TO_DO}"
        )
    return None


async def _refuse_elsewhere(
    connection: "asyncpg.Connection[Any]", schema: str, usual_schemas: list[str]
) -> None:
    """Refuse an empty schema when the role's search path leads to a schema with our tables."""
    rows = await connection.fetch(
        RELATIONS, [each for each in usual_schemas if each != schema], list(FIRST_TABLES)
    )
    for other in usual_schemas:
        columns = {row["name"]: set(row["columns"]) for row in rows if row["schema"] == other}
        if columns and all(FIRST_TABLES[name] <= columns.get(name, set()) for name in FIRST_TABLES):
            raise UnusableDatabaseError(
                f'Schema "{schema}" is empty, but balance_app\'s tables are in "{other}", which is '
                f"in the search path: set DB_SCHEMA to one of them. Nothing was changed."
            )


async def _refuse_unusable(
    connection: "asyncpg.Connection[Any]",
    schema: str,
    relations: dict[str, Any],
    role: str,
    place: str,
) -> None:
    """Refuse a schema at the right revision whose tables are missing or may not be used."""
    if missing := sorted(RIGHTS.keys() - relations.keys()):
        raise UnusableDatabaseError(
            f"{place[0].upper()}{place[1:]} is incomplete: {_enumerated(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Restore it from a backup."
        )
    pairs = [(name, right) for name, rights in RIGHTS.items() for right in rights]
    lacking = await connection.fetch(MISSING_RIGHTS, schema, *map(list, zip(*pairs, strict=True)))
    if lacking:
        rights = "; ".join(f"{row['rights']} on {row['name']}" for row in lacking)
        raise UnusableDatabaseError(
            f'The role "{role}" lacks rights in {place}: {rights}. As '
            f'"{relations["jobs"]["owner"]}", run `balance-app migrate` with DB_RUN_ROLE={role}.'
        )


def _refuse_encoding(there: Any) -> None:  # noqa: ANN401 - a row of INSPECT
    # Some change a character on its way: an entry would not match what was hashed of it.
    if there["bytes"] > 1 and there["encoding"] != "UTF8":
        raise UnusableDatabaseError(
            f'The encoding of database "{there["database"]}" is {there["encoding"]}: create one '
            "with ENCODING 'UTF8'. Nothing was changed."
        )


def _refuse_without_rights(
    there: Any,  # noqa: ANN401 - a row of INSPECT
    schema: str,
    relations: dict[str, Any],
    place: str,
) -> None:
    role = there["role"]
    if not there["made"] and not there["may_make"]:
        raise UnusableDatabaseError(
            f'There is no {place}, and the role "{role}" may not create it: '
            f"GRANT CREATE ON DATABASE {_quoted(there['database'])} TO {_quoted(role)}."
        )
    if there["made"] and not there["may_create"]:
        raise UnusableDatabaseError(
            f'The role "{role}" may not create tables in {place}. Run `balance-app migrate` as '
            f"the database's owner first, or, if this role is to own the tables, "
            f"GRANT CREATE ON SCHEMA {_quoted(schema)} TO {_quoted(role)}."
        )
    for row in relations.values():
        if not row["is_ours"]:
            raise UnusableDatabaseError(
                f'The role "{role}" can\'t migrate {place}: {row["name"]} belongs to '
                f'"{row["owner"]}". Run `balance-app migrate` as "{row["owner"]}".'
            )


async def _upgrade(
    connection: "asyncpg.Connection[Any]", settings: Settings, found: _Upgrade
) -> _Wait | None:
    """Send an upgrade; return a wait when another session is in the way."""
    schema = settings.db_schema
    lock = _lock(schema)
    # Checked first, as an upgrade that finds the lock taken fails, and fills the server's log.
    if (wait := await _running_upgrade(connection, lock)) is not None:
        return wait
    message = UPGRADE.format(
        schema=_quoted(schema),
        run_role=settings.db_run_role,
        lock=lock,
        version_table=VERSION_TABLE,
        revision=found.upgrade_from,
        statements=f"{found.before}\n{_statements(found.upgrade_from)}",
    )
    try:
        await connection.execute(message)
    except asyncpg.PostgresError as error:
        if error.sqlstate == CONCURRENT_UPGRADE:
            await connection.execute("ROLLBACK")
            done = _Wait("Another instance has just migrated.", RETRY_SECONDS)
            return await _running_upgrade(connection, lock) or done
        if (wait := _wait_for_others(error)) is not None:
            return wait
        cause = classify(error)
        if cause is not None and cause.kind not in NOT_RETRIED:
            raise
        clash = isinstance(error, DUPLICATES)
        raise UnusableDatabaseError(
            f"Migrating {found.place} from {found.upgrade_from} failed: {error.args[0]}. "
            + (WHAT_TO_DO if clash else "Nothing was changed.")
        ) from error
    return None


def _wait_for_others(error: asyncpg.PostgresError) -> _Wait | None:
    """Return the wait that an error asks for when another session is in the way."""
    if isinstance(error, asyncpg.LockNotAvailableError | asyncpg.DeadlockDetectedError):
        reason = f"The migration waits for a table that is in use: {error.args[0]}."
        return _Wait(reason, LOCKED_SECONDS)
    if CONFLICT in str(error):
        return _Wait("The migration waits for the grants of another schema.", RETRY_SECONDS)
    return None


# Grants concern the database and the role, too, which services in several schemas share.
# PostgreSQL has no code of its own for it, and does not translate it.
CONFLICT: Final = "tuple concurrently updated"


async def _running_upgrade(connection: "asyncpg.Connection[Any]", lock: int) -> _Wait | None:
    """Return a wait for the instance that migrates at this moment; None: no instance does."""
    holder = await connection.fetchrow(HOLDER, lock)
    if holder is None:
        return None
    return _Wait(
        f"The migration waits for another instance that migrates: {holder['application_name']}, "
        f"PostgreSQL process {holder['pid']}, since {holder['since']} UTC.",
        RETRY_SECONDS,
    )


def _statements(revision: str) -> str:
    """Return the SQL of all migrations after a revision."""
    from alembic import command  # noqa: PLC0415 - see `_known_revisions`

    written = StringIO()
    config = alembic_config()
    config.output_buffer = written
    command.upgrade(config, f"{revision}:head", sql=True)
    return written.getvalue()


def _lock(schema: str) -> int:
    """Return the lock of a schema: services in two schemas of a database don't block each other."""
    return MIGRATION_LOCK ^ (0 if schema == "public" else zlib.crc32(schema.encode()))


def _quoted(name: str) -> str:
    return '"{}"'.format(name.replace('"', '""'))


def _enumerated(names: list[str]) -> str:
    return " and ".join([*filter(None, [", ".join(names[:-1])]), names[-1]])
