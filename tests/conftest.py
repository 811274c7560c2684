"""Fixtures of the whole suite: one thread for LAPACK, and double precision where a test asks for it."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when the library loads, hence before jax

import jax
import pytest


@pytest.fixture
def x64():
    """Double precision within one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    """A claim in both precisions; the oracle is in float64 either way."""
    with jax.enable_x64(True):
        yield request.param
