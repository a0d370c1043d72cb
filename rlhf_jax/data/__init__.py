"""From a user's files to batches of token ids.

Lives here: sources.py and strict_json.py (files and data sets to rows, bad lines named), formats.py (which format a
file has; rows to the records of records.py), judged.py, asked.py, conversations.py, stackexchange.py, summaries.py and
fields.py (how each is read), conversions.py (one kind of record from another), tokenization.py (text to ids and back),
batching.py (ids to a GroupedBatch, the order of records, resuming), packing.py (examples joined into rows of one
length), writing.py (files of a run), two *.jsonl (packaged prompts), tiny_corpus.py (text for a tiny model).
May import: types, errors, models, parallel.
Never: samples, scores, trains, guesses what a bad record meant."""
