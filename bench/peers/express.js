'use strict'
// Express and Sequelize: a transaction locks the user, looks at the balance, and saves both rows.

const express = require('express')
const { DataTypes, Sequelize } = require('sequelize')

const sequelize = new Sequelize(process.env.PGDATABASE, process.env.PGUSER, null, {
  dialect: 'postgres',
  host: process.env.PGHOST,
  logging: false,
  pool: { acquire: 600000 } // who waits longer would get an error: the burst is measured, not this
})

const options = { timestamps: false, underscored: true }
const User = sequelize.define('User', {
  id: { type: DataTypes.BIGINT, primaryKey: true },
  balance: DataTypes.BIGINT,
  version: DataTypes.BIGINT
}, { ...options, tableName: 'users' })
const Entry = sequelize.define('Entry', {
  userId: { type: DataTypes.BIGINT, primaryKey: true },
  version: { type: DataTypes.BIGINT, primaryKey: true },
  amount: DataTypes.BIGINT,
  balance: DataTypes.BIGINT
}, { ...options, tableName: 'entries' })

const app = express()
app.use(express.json())

app.post('/api/balance', async (request, response) => {
  const { userId, amount } = request.body
  if (!Number.isSafeInteger(userId) || !Number.isSafeInteger(amount)) {
    return response.status(422).json({ code: 'invalid-request' })
  }
  const [status, answer] = await sequelize.transaction(async (transaction) => {
    const user = await User.findByPk(userId, { transaction, lock: transaction.LOCK.UPDATE })
    if (!user) return [404, { code: 'user-not-found', userId }]
    const balance = Number(user.balance) + amount
    if (balance < 0) {
      return [409, { code: 'insufficient-funds', userId, balance: Number(user.balance), amount }]
    }
    const version = Number(user.version) + 1
    await user.update({ balance, version }, { transaction })
    await Entry.create({ userId, version, amount, balance }, { transaction })
    return [200, { userId, balance, version }]
  })
  response.status(status).json(answer)
})

app.listen(Number(process.env.PORT), '127.0.0.1', 4096)
