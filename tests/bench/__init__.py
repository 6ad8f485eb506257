"""Measurements: of the launcher, on a box (`make bench`), and of what has a command of its own (universal.py)."""
