"""The method: masks, losses, adapters, and the step that puts them together."""
