"""Rewards that are models of their own: text goes in, so their tokenizer need not be the policy's.

decoder.py (a Llama with a reward head), encoder.py (BERT, RoBERTa, DeBERTa), pairrm.py, steamshp.py (T5), judge.py
(any decoder, asked which of two it prefers). reading.py and pairs_of_texts.py batch and tokenise, comparing.py turns
comparisons into scores, remembering.py answers a question once, function.py is what a run calls, catalogue.py what a
config names. May import checkpoints, data, models and parallel. Never trains, never sees a policy's ids."""
