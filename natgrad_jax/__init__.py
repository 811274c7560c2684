"""Natural-gradient optimizers as ordinary Optax transformations. `import natgrad_jax as ng`."""

from natgrad_jax import losses, sharding
from natgrad_jax.around.adaptive import adaptive_damping
from natgrad_jax.around.automatic import automatic
from natgrad_jax.around.averaging import averaged, averaged_params
from natgrad_jax.around.clip import clip_by_kl
from natgrad_jax.around.control import controlled
from natgrad_jax.around.graft import graft
from natgrad_jax.around.search import searched
from natgrad_jax.around.spring import spring
from natgrad_jax.around.statistics import observe, refresh, warm_start, without_operators
from natgrad_jax.base import Evidence, Gradual, Layer, Layers, Method
from natgrad_jax.diagnosis import diagnose
from natgrad_jax.lift.lift import lift
from natgrad_jax.lift.state import NaturalGradientState, Schedule
from natgrad_jax.methods.ekfac import ekfac, scale_by_ekfac
from natgrad_jax.methods.kbfgs import kbfgs
from natgrad_jax.methods.kfac import kfac, scale_by_kfac
from natgrad_jax.methods.mbf import mbf, scale_by_mbf
from natgrad_jax.methods.shampoo import scale_by_shampoo, shampoo
from natgrad_jax.methods.soap import scale_by_soap, soap
from natgrad_jax.methods.tekfac import scale_by_tekfac, tekfac
from natgrad_jax.methods.tengrad import scale_by_tengrad, tengrad
from natgrad_jax.methods.tkfac import scale_by_tkfac, tkfac
from natgrad_jax.methods.tnt import scale_by_tnt, tnt
from natgrad_jax.watch import linen, nnx
from natgrad_jax.watch.doors import Inputs
from natgrad_jax.watch.function import capture
from natgrad_jax.watch.terms import Terms, terms
from natgrad_jax.wrapping import wrapped

__all__ = [
    "Evidence",
    "Gradual",
    "Inputs",
    "Layer",
    "Layers",
    "Method",
    "NaturalGradientState",
    "Schedule",
    "Terms",
    "adaptive_damping",
    "automatic",
    "averaged",
    "averaged_params",
    "capture",
    "clip_by_kl",
    "controlled",
    "diagnose",
    "ekfac",
    "graft",
    "kbfgs",
    "kfac",
    "lift",
    "linen",
    "losses",
    "mbf",
    "nnx",
    "observe",
    "refresh",
    "scale_by_ekfac",
    "scale_by_kfac",
    "scale_by_mbf",
    "scale_by_shampoo",
    "scale_by_soap",
    "scale_by_tekfac",
    "scale_by_tengrad",
    "scale_by_tkfac",
    "scale_by_tnt",
    "searched",
    "shampoo",
    "sharding",
    "soap",
    "spring",
    "tekfac",
    "tengrad",
    "terms",
    "tkfac",
    "tnt",
    "warm_start",
    "without_operators",
    "wrapped",
]

__version__ = "0.2.0"
