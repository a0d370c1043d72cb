"""Tokens from a role: one jitted prefill and decode loop.

May import models, parallel, types. Knows no algorithm, reward or file."""
