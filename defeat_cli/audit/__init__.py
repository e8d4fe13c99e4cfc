"""What a data set is like, and what is wrong with it. `defeat check --data` tells all of it, `train` what it needs."""
