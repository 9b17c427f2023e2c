"""What people and programs see and do with balances: routes, parameters, answers."""
