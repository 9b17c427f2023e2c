"""Exact balances."""
