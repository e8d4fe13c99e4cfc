"""Studies: variants x seeds, their processes, tables and picture."""
