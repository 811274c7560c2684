"""The laws on the families of nets that people train, every method: a table, run by `-m full`.

A method that fails one of them fails it for its layers: convolutions with gaps and groups, a table that is tied to the
head, layers in a scan behind batch normalisation, gates of a cell. Their controls stand beside the laws.
"""

import methods_table as table
import pytest
import test_laws as laws
import test_laws_of_state as laws_of_state
from methods_table import ALL_NAMES, NAMES, direction
from tasks import FAMILIES

pytestmark = pytest.mark.whole
REFRESHED = {"statistics_every": 1, "refresh_every": 1}


def descends(where, method):
    """At ten steps, of which five have no statistics."""
    laws.descends(where, direction(method, where), 5 if table.row(method).apart else 3)


def tends_to_the_gradient(where, method):
    """Where the damping is large."""
    row = table.row(method)
    laws.tends_to_the_gradient(lambda damping: table.build(method, where, damping=damping), row.rate, row.power, where)


def ignores_the_order_of_examples(where, method):
    """With the labels of the batch, which no key draws."""
    where = f"{where} true labels"
    laws.ignores_the_order_of_examples(direction(method, where), where)


LAWS = {
    "descends": (descends, ALL_NAMES),
    "is positive definite": (lambda where, method: laws.is_positive_definite(where, direction(method, where)), NAMES),
    "traces once": (lambda where, method: laws.traces_once(direction(method, where), where), ALL_NAMES),
    "tends to the gradient": (tends_to_the_gradient, NAMES),
    "ignores the order of examples": (ignores_the_order_of_examples, ALL_NAMES),
    "keeps types": (lambda where, method: laws_of_state.keeps_types(where, direction(method, where)), NAMES),
    "survives poison": (
        lambda where, method: laws_of_state.survives_poison(where, direction(method, where, **REFRESHED)),
        NAMES,
    ),
    "owns its buffers": (lambda where, method: laws.owns_its_buffers(where, direction(method, where)), ALL_NAMES),
}
"""{law: (what it asks of a method on a net, the methods that it is for)}."""
CELLS = [
    pytest.param(law, where, method, marks=() if (law, method) == ("owns its buffers", NAMES[0]) else pytest.mark.full)
    for law, (_, methods) in LAWS.items()
    for where in FAMILIES
    for method in methods
]


@pytest.mark.slow
@pytest.mark.parametrize(("law", "where", "method"), CELLS)
def test_a_law_holds_on_a_family(law, where, method):
    LAWS[law][0](where, method)
