"""Verbs that look at a machine or a run directory: `doctor`, `verify`, `clean`."""
