"""Terms: the ways in which a teacher supervises a student, one class each."""
