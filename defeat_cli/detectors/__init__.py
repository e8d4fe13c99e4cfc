"""Detectors by the contract of `base.py`, one family a file."""
