"""One file a side: what is timed, in a process and an environment of its own. protocol.py is all they share."""
