"""The command line: `moe-runtime`."""
