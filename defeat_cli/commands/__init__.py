"""The commands, one a file: options in, one call out."""
