"""The commands: flags, one call, an exit status. Everything may be imported here; nothing imports these."""
