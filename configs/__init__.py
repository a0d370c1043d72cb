"""One short, complete config an experiment; `common.py` holds what all share, with one block a size."""
