"""One command for a TPU slice: create, set up, launch, watch, resume, stop, delete.

types knows what the names of slices mean, commands builds gcloud calls, source packs the code, cloud makes the calls,
supervise decides what follows, scenario plays it without a cloud; worker.sh is what runs on each worker.
Imports nothing of JAX: it runs on a laptop that has gcloud."""
