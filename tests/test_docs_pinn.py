"""The programs of `docs/pinn.md` run, and do what the page says of them."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.flatten_util import ravel_pytree
from reference import assert_differs, assert_equal, normal

single = partial(normal, dtype="float32")
PAGE = Path(__file__).parents[1] / "docs" / "pinn.md"


SOLVED, *OTHERS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
IMPORTS = SOLVED[: SOLVED.index("def ")]


def defined(*programs):
    """What programs of the page define, one after the other."""
    found = {}
    for program in programs:
        exec(compile(program, str(PAGE), "exec"), found)
    return found


@pytest.fixture(scope="module")
def names():
    """What the programs behind the first define; that one trains."""
    return defined(IMPORTS, *OTHERS)


@pytest.mark.full
def test_the_equation_of_the_page_is_solved():
    found = defined(SOLVED)
    assert float(found["error"]) < 1e-3
    assert set(found["losses"]) == {"inside", "edge"} and found["layers"].examples == 42


@pytest.mark.slow
def test_the_heads_of_the_page_have_one_gradient(names):
    p = {
        "body": single(3, 4),
        "policy": single(4, 2, seed=1),
        "value": single(4, 1, seed=2),
    }
    x, y = (
        single(5, 3, seed=3),
        {"policy": jnp.array([0, 1, 1, 0, 1]), "value": single(5, 1, seed=4)},
    )
    out = jax.jit(lambda p: names["heads"].value_and_grad(p, x, y, key=jax.random.key(0))._replace(curvature=None))(p)
    assert_equal(out.value, out.losses["policy"] + 0.5 * out.losses["value"], 1e-6)
    assert jnp.all(jnp.isfinite(ravel_pytree(out.grad)[0]))


@pytest.mark.full
def test_the_curvature_of_a_policy_gradient_is_the_fisher_matrix_whatever_the_advantages_are(names):
    p, x = (
        {"body": single(3, 4), "policy": single(4, 2, seed=1)},
        single(5, 3, seed=3),
    )
    actions = jnp.array([0, 1, 1, 0, 1])

    def found(advantages):
        out = names["policy_gradient"].value_and_grad(p, x, (actions, advantages))
        along = out.curvature.along(jax.tree.map(jnp.ones_like, p))
        return ravel_pytree(out.grad)[0], jnp.sum(along**2)

    (gradient, bent), (other, same) = (found(sign * single(5, seed=6)) for sign in (1, -1))
    assert_equal(gradient, -other, 1e-5)
    assert_equal(bent, same, 1e-5)
    flat, tree = ravel_pytree(p)
    probabilities = jax.nn.softmax(names["policy"](p, x))
    tangent = jax.jvp(lambda f: names["policy"](tree(f), x), (flat,), (jnp.ones_like(flat),))[1]
    mean = jnp.sum(probabilities * tangent, axis=1)
    assert_equal(bent, jnp.mean(jnp.sum(probabilities * tangent**2, axis=1) - mean**2), 1e-5)
    assert_differs(gradient, 0 * gradient + jnp.mean(gradient))
