"""Watching a model: one forward pass, two pullbacks, and the evidence that they give."""
