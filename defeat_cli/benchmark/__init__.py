"""What things cost: the parts of a training step, and detectors as users deploy them."""
