"""Tensors by definition, in numpy and double precision: second moments of their modes, and dense Kronecker products."""

from functools import reduce

import numpy as np
from reference import damped


def moments(draws):
    """H_i, the mean over draws [K, n_1, ..., n_k] of G_(i) G_(i)^T."""
    draws = np.asarray(draws, np.float64)
    unfolded = [
        np.moveaxis(draws, mode + 1, 1).reshape(len(draws), size, -1) for mode, size in enumerate(draws.shape[1:])
    ]
    return [np.einsum("kix,kjx->ij", unfolding, unfolding) / len(draws) for unfolding in unfolded]


def units(factors):
    """U_i: H_i times what brings all mean eigenvalues to the k-th root of that of the product."""
    sizes, trace = [len(factor) for factor in factors], np.trace(factors[0])
    mean = (trace / np.prod(sizes)) ** (1 / len(sizes))
    return [factor * mean / (np.trace(factor) / size) for factor, size in zip(factors, sizes, strict=True)]


def kron(factors):
    """The Kronecker product of all factors."""
    return reduce(np.kron, (np.asarray(factor, np.float64) for factor in factors))


def solved(factors, strengths, momentum):
    """The dense Kronecker product of the damped factors, solved for a tensor."""
    strengths = np.broadcast_to(strengths, len(factors))
    block = kron([damped(factor, strength) for factor, strength in zip(factors, strengths, strict=True)])
    return np.linalg.solve(block, np.asarray(momentum, np.float64).ravel()).reshape(momentum.shape)


def traces(block, sizes):
    """The partial traces of a block [N, N] over all modes but one, for each."""
    sizes, count = tuple(sizes), len(sizes)
    block, letters = np.reshape(block, sizes + sizes), "abcdefgh"[:count]
    return [np.einsum(f"{letters}{letters.replace(i, 'z')}->{i}z", block) for i in letters]
