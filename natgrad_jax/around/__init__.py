"""What stands around a direction: its length, its momentum, the complete optimizer."""
