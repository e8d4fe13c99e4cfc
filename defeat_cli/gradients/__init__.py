"""Where the detection loss pulls on the neck: maps, numbers, pictures."""
