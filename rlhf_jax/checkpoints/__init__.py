"""Every format that weights are kept in, and the steps that a run resumes from.

Lives here: store.py (orbax steps of a TrainState: checked by digest.py and record.py, resumed bit for bit), lock.py
(one writer a workdir), huggingface.py, encoders.py, peft.py, gguf.py (weights from and for others), roles.py (a
finished role), tiny.py and tiny_encoder.py (models to test).
May import: types, errors, models, parallel.
Never: trains, samples, scores, lets a file decide a shape, runs code that came with a file."""
