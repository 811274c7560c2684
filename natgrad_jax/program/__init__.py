"""Traced functions: what is done with their parameters, and the same function with records and probes."""
