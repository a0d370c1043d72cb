"""The only place that names mesh axes, hosts or topologies.

Lives here: the mesh, the table of rules from logical names to mesh axes, placement of weights and batches, and the
processes of a run: how they find each other, what they tell each other, and how they end.
May import models and types. Never computes a loss or reads a user's file."""
