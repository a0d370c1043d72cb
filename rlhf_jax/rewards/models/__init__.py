"""Rewards that are models of their own: text goes in, so their tokenizer need not be the policy's.

decoder.py (a Llama with a reward head), judge.py (any decoder, asked which of two it prefers); comparing.py turns
comparisons into scores, remembering.py answers a question once, catalogue.py names them for a config. All have the
protocol of protocol.py. May import checkpoints, data, models and parallel. Never trains, never sees a policy's ids."""
