"""Measurements of the launcher itself, on a box: `make bench`."""
