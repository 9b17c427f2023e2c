'use strict'
// Fastify and node-postgres: one statement decides a change, and writes its entry (LEDGER=no: none).

const fastify = require('fastify')
const pg = require('pg')

const WITH_LEDGER = `
  WITH changed AS (
    UPDATE users SET balance = balance + $2, version = version + 1
    WHERE id = $1 AND balance + $2 >= 0
    RETURNING id, balance, version
  )
  INSERT INTO entries (user_id, version, amount, balance)
  SELECT id, version, $2, balance FROM changed
  RETURNING balance, version`

const WITHOUT_LEDGER = `
  UPDATE users SET balance = balance + $2, version = version + 1
  WHERE id = $1 AND balance + $2 >= 0
  RETURNING balance, version`

const ledger = process.env.LEDGER !== 'no'
const change = { name: 'change', text: ledger ? WITH_LEDGER : WITHOUT_LEDGER }
const look = { name: 'look', text: 'SELECT balance, version FROM users WHERE id = $1' }

// PGHOST, PGUSER and PGDATABASE say where; bigint columns are small enough for a number here.
pg.types.setTypeParser(pg.types.builtins.INT8, Number)
const pool = new pg.Pool()
const app = fastify({ logger: false })

const body = {
  type: 'object',
  required: ['userId', 'amount'],
  additionalProperties: false,
  properties: {
    userId: { type: 'integer', minimum: 1 },
    amount: { type: 'integer' }
  }
}

app.post('/api/balance', { schema: { body } }, async (request, reply) => {
  const { userId, amount } = request.body
  const made = await pool.query({ ...change, values: [userId, amount] })
  if (made.rows.length) {
    const { balance, version } = made.rows[0]
    return { userId, balance, version }
  }
  const found = await pool.query({ ...look, values: [userId] })
  if (!found.rows.length) return reply.code(404).send({ code: 'user-not-found', userId })
  const { balance, version } = found.rows[0]
  return reply.code(409).send({ code: 'insufficient-funds', userId, balance, version, amount })
})

app.listen({ host: '127.0.0.1', port: Number(process.env.PORT), backlog: 4096 })
