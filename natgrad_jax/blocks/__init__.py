"""What is kept of ONE layer, and how it is applied."""
