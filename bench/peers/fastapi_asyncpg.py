"""FastAPI as one usually writes it: a pydantic model, a pool of asyncpg, a transaction."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel


class Change(BaseModel):
    """A request: a negative amount withdraws."""

    userId: int  # noqa: N815 - as in JSON
    amount: int


class Changed(BaseModel):
    """The account after it."""

    userId: int  # noqa: N815 - as in JSON
    balance: int
    version: int


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Connect; PGHOST, PGUSER and PGDATABASE say where."""
    async with asyncpg.create_pool() as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/api/balance")
async def change(asked: Change) -> Changed:
    """Change a balance, and write its entry."""
    # ast-grep-ignore: acquire-without-timeout - as one usually writes it
    async with app.state.pool.acquire() as connection, connection.transaction():
        row = await connection.fetchrow(
            """
            UPDATE users SET balance = balance + $2, version = version + 1
            WHERE id = $1 AND balance + $2 >= 0
            RETURNING balance, version
            """,
            *(asked.userId, asked.amount),
        )
        if row is not None:
            await connection.execute(
                "INSERT INTO entries (user_id, version, amount, balance) VALUES ($1, $2, $3, $4)",
                *(asked.userId, row["version"], asked.amount, row["balance"]),
            )
            return Changed(userId=asked.userId, balance=row["balance"], version=row["version"])
        balance = await connection.fetchval("SELECT balance FROM users WHERE id = $1", asked.userId)
    if balance is None:
        raise HTTPException(404, detail="user not found")
    raise HTTPException(409, detail=f"insufficient funds: {balance}")


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        backlog=4096,
        access_log=False,
        log_level="warning",
    )
