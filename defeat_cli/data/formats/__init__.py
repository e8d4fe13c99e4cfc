"""The layouts that data sets come in, one a file."""
