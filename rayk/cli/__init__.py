"""The command line: `rayk COMMAND`."""
