"""Completions -> [B, G] reward units: a learned reward role on the device, or rules on text.

May import sampling and everything below it. Never updates a weight."""
