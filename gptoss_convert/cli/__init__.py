"""The command line: each command reads options, makes one call, and prints text or JSON."""
