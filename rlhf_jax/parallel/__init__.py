"""The only place that names mesh axes, hosts or topologies.

Lives here: the mesh, the table of rules from logical names to mesh axes, placement of weights and batches; the
processes of a run: how they find each other, what they tell each other, and how they end; and what a program needs that
is compiled for a described slice, and what chips and their links can do.
May import models and types. Never computes a loss or reads a user's file."""
