"""Preflight: collect evidence on a node, judge it. Imports only the standard library, nothing of the launcher."""
