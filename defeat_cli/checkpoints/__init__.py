"""Reading and writing detector checkpoints, one format a file."""
