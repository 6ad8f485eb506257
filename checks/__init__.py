"""Preflight: collect evidence on a node, judge it. Imports nothing from the launcher; runs with the standard library."""
