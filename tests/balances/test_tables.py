"""The money can be distributed by user: no rule of the tables spans the rows of two users."""

from typing import Final, NamedTuple

import pytest

import balance_app.main  # noqa: F401 - with it every table is known
from balance_app.db.metadata import metadata
from balance_app.db.migrations import migrate
from tests.db.test_pool import settings_for
from tests.processes import connect

# Directories without money: each leads from a text to a user.
DIRECTORIES: Final = {"opening_keys", "external_ids"}
MONEY: Final = {"users", "entries", "holds", "idempotency_keys", "user_settings"}
SUMMARIES: Final = {"daily_balances", "counted_users"}
TABLES: Final = MONEY | SUMMARIES | DIRECTORIES

# What is unique (primary keys, unique constraints and indexes), excludes, or refers to a row.
RULES: Final = """
SELECT rel.relname::text AS table, rules.name::text AS name,
       ARRAY(SELECT attname::text FROM pg_attribute
             WHERE attrelid = rel.oid AND attnum = ANY (rules.columns)) AS columns
FROM pg_class AS rel JOIN (
    SELECT indrelid AS relation, indexrelid::regclass::text AS name, indkey::int2[] AS columns
    FROM pg_index WHERE indisunique OR indisexclusion
    UNION ALL
    SELECT conrelid, conname::text, conkey FROM pg_constraint WHERE contype = 'f'
) AS rules (relation, name, columns) ON relation = rel.oid
WHERE relnamespace = 'public'::regnamespace
"""


class Rule(NamedTuple):
    """A constraint of a table, or a unique index, and its columns."""

    table: str
    name: str
    columns: frozenset[str]

    @property
    def spans_users(self) -> bool:
        """Whether it compares rows of several users."""
        return ("id" if self.table == "users" else "user_id") not in self.columns


async def read_rules(database: dict[str, str], *also: str) -> list[Rule]:
    """Return the rules of the tables that have users, after further statements."""
    await migrate(settings_for(database).as_owner())
    connection = await connect(database)
    try:
        for statement in also:
            await connection.execute(statement)
        rows = await connection.fetch(RULES)
    finally:
        await connection.close()
    return [
        Rule(row["table"], row["name"], frozenset(row["columns"]))
        for row in rows
        if row["table"] in TABLES
    ]


async def test_what_is_unique_is_so_within_one_user(database: dict[str, str]) -> None:
    """Each unique constraint, primary key and foreign key of the money contains the user's id."""
    rules = await read_rules(database)
    assert {rule.table for rule in rules} == TABLES
    assert [rule for rule in rules if rule.spans_users and rule.table not in DIRECTORIES] == []
    # The exceptions are no more than they are named for.
    assert {rule.name for rule in rules if rule.spans_users} == {
        "opening_keys_pkey",
        "external_ids_pkey",
    }


def test_every_table_with_users_is_known() -> None:
    """A new table is in one of the sets above."""
    with_users = {table.name for table in metadata.tables.values() if "user_id" in table.columns}
    assert with_users | {"users"} == TABLES


def test_a_directory_has_no_money() -> None:
    """It has texts and the user's id alone."""
    for name in DIRECTORIES:
        types = {column.name: str(column.type) for column in metadata.tables[name].columns}
        assert types.pop("user_id") == "BIGINT"
        assert set(types.values()) == {"TEXT"}


@pytest.mark.parametrize(
    "planted",
    [
        "ALTER TABLE idempotency_keys ADD CONSTRAINT planted UNIQUE (key)",
        "CREATE UNIQUE INDEX planted ON entries (other_version) WHERE other_version IS NOT NULL",
        "ALTER TABLE holds ADD CONSTRAINT planted EXCLUDE USING btree (key WITH =)",
        "ALTER TABLE users ADD external_id text CONSTRAINT planted UNIQUE",
        "ALTER TABLE entries ADD CONSTRAINT planted FOREIGN KEY (other_user_id) REFERENCES users",
        "CREATE UNIQUE INDEX planted ON idempotency_keys ((user_id || key))",
    ],
)
async def test_a_rule_that_spans_users_is_found(database: dict[str, str], planted: str) -> None:
    """The control: of each kind of rule."""
    rules = await read_rules(database, planted)
    found = [rule.name for rule in rules if rule.spans_users and rule.table not in DIRECTORIES]
    assert found == ["planted"]
