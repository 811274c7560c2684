"""Several devices: where the state of an optimizer goes, who refreshes what, and what that costs."""

from natgrad_jax.algebra.devices import exchange
from natgrad_jax.sharding.places import bytes_per_device, state_specs
from natgrad_jax.sharding.planning import Cost, Plan, plan
from natgrad_jax.sharding.sharing import share_gradients, share_refreshes

__all__ = ["Cost", "Plan", "bytes_per_device", "exchange", "plan", "share_gradients", "share_refreshes", "state_specs"]
