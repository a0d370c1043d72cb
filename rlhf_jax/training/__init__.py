"""The only room with a clock, a logger and changing weights: state, optimizer, the table of algorithms, the one loop.

May import everything below. Never judges a finished run (evaluation does), never parses flags (experiments do)."""
