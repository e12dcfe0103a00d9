"""The command line: options in, one call, text or JSON out."""
