"""Completions -> [B, G] reward units: a learned reward role on the device, rules and Python functions on text.

specs reads what a config names, rules are what ships, functions calls either and outlives its failures (process and
worker are the two ends of the pipe), mixture adds several up. May import sampling and everything below it; rules,
specs and worker only errors, so that a worker starts at once. Never updates a weight."""
