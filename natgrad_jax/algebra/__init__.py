"""Algebra of arrays and stacks of matrices; nothing here knows a layer."""
