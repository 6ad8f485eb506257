"""Preflight: collect evidence on a node, judge it. Imports nothing of the launcher, nothing but the standard library."""
