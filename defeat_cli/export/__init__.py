"""The way out: detectors as files that run without this tool, and the proof that they detect the same."""
