"""From a method of one layer to an Optax transformation of the parameter tree."""
