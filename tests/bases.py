"""What a state says, whatever eigenvectors were chosen: none has a sign, and those of one eigenvalue can be rotated."""

import jax
import jax.numpy as jnp

from natgrad_jax.algebra.averages import Average


def without_choice(tree):
    """The tree with U U^T of each side, and U V U^T in the place of what was measured, for every basis U in it.

    Of several sides U is their Kronecker product, and V the diagonal matrix of what was measured. None of it changes
    with the sign of a column, nor by a rotation among columns of which the same was measured. Complete bases only.
    """

    def is_of_a_basis(node):
        return hasattr(node, "basis") and hasattr(node, "scale")

    def said(node):
        if not is_of_a_basis(node):
            return node
        average = isinstance(node.scale, Average)
        total = node.scale.total if average else node.scale
        sizes = total.shape[total.ndim - len(node.basis) :]
        sides = [jnp.eye(size) if side is None else side for side, size in zip(node.basis, sizes, strict=True)]
        whole = [jnp.einsum("...nc,...mc->...nm", side, side) for side in sides]
        found = matrix(total, sides)
        return node._replace(basis=whole, scale=node.scale._replace(total=found) if average else found)

    return jax.tree.map(said, tree, is_leaf=is_of_a_basis)


def matrix(diagonal, sides):
    """U V U^T [S, n_1 n_1 ... n_k n_k] of V [S, c_1, ..., c_k]; the first mode left is turned, and goes last."""
    stack = diagonal.shape[: diagonal.ndim - len(sides)]
    for side in sides:
        first = diagonal.reshape(*stack, side.shape[-1], -1)
        diagonal = jnp.einsum("...cr,...nc,...mc->...rnm", first, side, side).reshape(*stack, -1)
    return diagonal
