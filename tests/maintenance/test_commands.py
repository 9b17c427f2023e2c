"""The commands that read the ledger from the database itself."""

import json
import re

from balance_app.db.migrations import alembic_head
from tests.maintenance import forgery
from tests.maintenance.runner import JobRunner
from tests.processes import query
from tests.terminal import Screen, run


async def test_a_sound_ledger_needs_no_service(runner: JobRunner, database: dict[str, str]) -> None:
    """All is counted, the last seal is printed; the one that was noted is recognized."""
    assert await run("seals", **database) == (
        0,
        "There is no seal yet: the job note-daily-balances makes them.\n",
        "",
    )
    noted = (await forgery.build(runner)).hex()
    code, out, err = await run("audit", **database)
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first == "Checked 10 entries of 4 users and 2 seals: all agree."
    assert re.fullmatch(rf"The last seal is 2 of [-:\d ]+ UTC: {noted}", second)
    code, out, _ = await run("audit", "--seal", noted.upper(), **database)
    assert code == 0
    assert re.fullmatch(
        r"All that seal 2 of [-:\d ]+ UTC covers is as it was\.", out.splitlines()[1]
    )
    code, out, _ = await run("seals", **database)
    header, newest, oldest = out.splitlines()
    assert header.split() == ["SEAL", "LEDGERS", "AT", "(UTC)", "DIGEST"]
    assert newest.split()[:2] == ["2", "3"]
    assert newest.split()[-1] == noted
    assert oldest.split()[:2] == ["1", "4"]
    code, out, _ = await run("seals", "--json", "--limit", "1", **database)
    ((seal),) = json.loads(out)
    assert (seal["number"], seal["heads"], seal["digest"]) == (2, 3, noted)
    code, out, _ = await run("--json", "seals", "--before", "2", **database)
    assert [seal["number"] for seal in json.loads(out)] == [1]


async def test_a_forged_ledger_is_named(runner: JobRunner, database: dict[str, str]) -> None:
    """On stdout, by user and version, with exit code 1; what the owner made agree by the seal."""
    noted = (await forgery.build(runner)).hex()
    await forgery.forge(runner.connection, *forgery.FORGERIES["an amount"])
    code, out, _ = await run("audit", **database)
    assert code == 1
    assert out.splitlines()[0] == "user 3: entry 3 does not match its hash"
    assert out.splitlines()[-2] == "Checked 10 entries of 4 users and 2 seals: 2 faults."
    code, out, _ = await run("audit", "--json", **database)
    assert code == 1
    found = json.loads(out)
    assert found["faults"][0] == "user 3: entry 3 does not match its hash"
    assert (found["entries"], found["seals"], found["withoutHash"]) == (10, 2, 0)
    await forgery.forge(runner.connection, chain=True)
    await forgery.seal_again(runner.connection)
    code, out, _ = await run("audit", **database)
    assert code == 0
    assert noted not in out
    code, out, _ = await run("audit", "--seal", noted, **database)
    assert code == 1
    assert out.startswith(f"no seal has the digest {noted}: what it covers was rewritten, or ")


async def test_many_faults_are_counted(runner: JobRunner, database: dict[str, str]) -> None:
    """The first ones are named: 50 on stdout, 1000 as JSON."""
    await forgery.add_parts(runner.connection, 1, 2)
    code, out, _ = await run("audit", **database)
    assert code == 1
    lines = out.splitlines()
    assert len(lines) == 52
    assert lines[49] == "user 1050: entry 7 is missing, which seal 1 covers"
    assert lines[50:] == ["and 1 950 more", "Checked 1 entry of 1 user and 0 seals: 2 000 faults."]
    code, out, _ = await run("audit", "--json", **database)
    assert code == 1
    found = json.loads(out)
    assert (len(found["faults"]), found["moreFaults"]) == (1000, 1000)


async def test_older_accounts_are_counted(runner: JobRunner, database: dict[str, str]) -> None:
    """Those that have no hash yet are no fault."""
    await runner.populate(3, 2)
    code, out, _ = await run("audit", **database)
    assert code == 0
    assert out.splitlines() == [
        "Checked 6 entries of 3 users and 0 seals: all agree.",
        "3 older accounts have no hash yet: the job audit-ledger gives it.",
    ]


async def test_a_role_that_may_only_read_can_audit(
    runner: JobRunner, database: dict[str, str]
) -> None:
    """It needs no right to write; a missing right is named."""
    await forgery.build(runner)
    role = f"auditor_{database['DB_NAME']}"
    await query(database, f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
    auditor = {**database, "DB_USER": role, "DB_PASSWORD": "x"}
    try:
        await query(database, f"GRANT USAGE ON SCHEMA public TO {role}")
        await query(database, f"GRANT SELECT ON balance_app_version TO {role}")
        code, out, err = await run("audit", **auditor)
        assert (code, out) == (1, "")
        assert re.fullmatch(r"The role may not read all .*permission denied for table \w+\.\n", err)
        await query(database, f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        code, out, err = await run("audit", **auditor)
        assert (code, err) == (0, "")
        assert out.startswith("Checked 10 entries of 4 users and 2 seals: all agree.\n")
    finally:
        await query(database, f"DROP OWNED BY {role}")
        await query(database, f"DROP ROLE {role}")


async def test_a_schema_that_does_not_fit_is_named(
    runner: JobRunner, database: dict[str, str]
) -> None:
    """Nothing is checked; a database that is unavailable has an exit code of its own."""
    assert await forgery.audit(runner) is None
    await query(database, "UPDATE balance_app_version SET version_num = '0012'")
    for command in ("audit", "seals"):
        assert await run(command, **database) == (
            1,
            "",
            f"The schema is at 0012, this program needs {alembic_head()}.\n",
        )
        code, out, err = await run(command, **{**database, "DB_SCHEMA": "other"})
        assert (code, out) == (1, "")
        assert err == "The database has no schema of balance_app (DB_SCHEMA).\n"
        code, out, err = await run(command, **{**database, "DB_PORT": "1"})
        assert (code, out) == (3, "")
        assert err.count("\n") == 1


async def test_progress_is_shown_on_a_terminal(runner: JobRunner, database: dict[str, str]) -> None:
    """Only there."""
    await forgery.build(runner)
    async with Screen("audit", **database) as screen:
        await screen.until("entries")
        assert await screen.end() == 0
    assert "all agree." in screen.shown
