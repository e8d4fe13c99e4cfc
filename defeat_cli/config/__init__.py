"""What a user can set: the typed recipe, its YAML, named variants."""
