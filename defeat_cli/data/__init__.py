"""Data sets: read from the layouts in `formats`, divided and thinned out, changed at random, and put into batches."""
