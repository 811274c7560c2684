"""Layers, from the products of a traced function.

Every product says which axes of the parameter are inputs, outputs and copies, and so which matrix the parameter is. A
layer is all products of the same arrays, if they agree about that matrix, or see it the other way round. A parameter
that enters otherwise as well has a block of its own, with the reason in its note.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from natgrad_jax.algebra import arranged
from natgrad_jax.algebra.arranged import Arrangement, addresses
from natgrad_jax.base import UNSEEN, Layer, Layers, Leaf
from natgrad_jax.layers.parameter import dtype_of, parameter
from natgrad_jax.program.products import Entrywise, Found, Product
from natgrad_jax.watch.norms import Touch
from natgrad_jax.watch.norms import found as norms_of
from natgrad_jax.watch.parts import of_whole, side_by_side
from natgrad_jax.watch.reading import Call, Seen, parts_of, read


class Exceptions(NamedTuple):
    """What is not to be a layer.

    Attributes:
        exclude: addresses, or the beginnings of some, to treat as unknown.
        unexplained: {layer: why} of those that are not to be trusted.
    """

    exclude: tuple[str, ...] = ()
    unexplained: Mapping[str, str] = {}


def recognise(
    leaves: Mapping[str, Any],
    found: Found,
    examples: int,
    draws: int,
    exceptions: Exceptions,
    root: str,
    norms: bool = False,
) -> tuple[Layers, dict[str, tuple[Call, ...]], dict[str, tuple[Touch, ...]]]:
    """Every parameter of a function, as part of a layer or as a block of its own.

    Args:
        leaves: the parameters by address, shapes suffice.
        found: what is done with them.
        examples: N.
        draws: K.
        exceptions: what is not to be a layer.
        root: the name of a layer whose kernel has no parent; "" for its address.
        norms: whether scales and shifts of channels are norms; parameters by themselves if not.

    Returns:
        The layers and the remaining parameters; the uses of each layer; the products of each norm.

    Raises:
        ValueError: if `exclude` excludes nothing.
    """
    groups: dict[tuple[str, ...], list[Product]] = defaultdict(list)
    for product in found.products:
        if not isinstance(product.options, Entrywise):
            groups[addresses(product.kernel)].append(product)
    names = _names(list(groups), root)
    notes = dict(found.otherwise) | _excepted(leaves, names, exceptions)
    normed = _norms(leaves, found.products, examples, notes, exceptions, norms)
    seen = {arrays: _agreed(products, examples, draws, found.alone) for arrays, products in groups.items()}
    for arrays, what in seen.items():
        if any(others != arrays and set(others) & set(arrays) for others in groups):
            notes |= dict.fromkeys(arrays, "used with other arrays and without them")
        why = [notes[address] for address in arrays if address in notes] + ([what] if isinstance(what, str) else [])
        if why:
            notes |= dict.fromkeys(arrays, why[0])
    layers = {arrays: what for arrays, what in seen.items() if not isinstance(what, str) and arrays[0] not in notes}
    biases = _biases(layers, found.products, notes)
    known = [_layer(names[arrays], what, biases.get(arrays), leaves) for arrays, what in layers.items()]
    calls = {names[arrays]: tuple(each.call for each in what) for arrays, what in layers.items()}
    touches = {layer.name: of_norm for layer, of_norm in normed.values()}
    taken = {leaf.address for layer in known for leaf in layer.leaves}
    taken |= {leaf.address for layer, _ in normed.values() for leaf in layer.leaves}
    rest = []
    for address, leaf in leaves.items():
        if address in normed:
            rest.append(normed[address][0])
        elif address not in taken:
            unused = "" if address in found.used else UNSEEN
            rest.append(parameter(address, leaf.shape, dtype_of(leaf), notes.get(address, unused)))
    return Layers(tuple(known), tuple(rest), examples, draws), calls, touches


def _names(groups: Sequence[tuple[str, ...]], root: str) -> dict[tuple[str, ...], str]:
    """The name of a layer: the address that its arrays stand under; their own where they do not stand there alone."""
    parents = Counter(address.rpartition("/")[0] for arrays in groups for address in arrays)
    found = {}
    for arrays in groups:
        own = [a.rpartition("/")[0] if parents[a.rpartition("/")[0]] == 1 else a for a in arrays]
        if len(own) == 1:
            found[arrays] = own[0] or (root if root and parents[""] == 1 else arrays[0])
        else:
            parent = own[0].rpartition("/")[0]
            found[arrays] = "+".join([own[0], *(each.removeprefix(parent + "/") for each in own[1:])])
    return found


def _excepted(
    leaves: Mapping[str, Any], names: Mapping[tuple[str, ...], str], exceptions: Exceptions
) -> dict[str, str]:
    """{address: why} of what is not to be a layer."""
    notes: dict[str, str] = {}
    for entry in exceptions.exclude:
        if entry not in names.values() and not any(_is_under(address, entry) for address in leaves):
            raise ValueError(
                f"`exclude` names {entry!r}, which the model does not have; it has {list(names.values())}."
            )
        for arrays, name in names.items():
            if name == entry or any(_is_under(address, entry) for address in arrays):
                notes |= dict.fromkeys(arrays, "excluded")
    for arrays, name in names.items():
        if name in exceptions.unexplained:
            notes |= dict.fromkeys(arrays, exceptions.unexplained[name])
    return notes


def _norms(
    leaves: Mapping[str, Any],
    products: Sequence[Product],
    examples: int,
    notes: dict[str, str],
    exceptions: Exceptions,
    wanted: bool,
) -> dict[str, tuple[Layer, tuple[Touch, ...]]]:
    """The norms by the address of their scale; the notes of what is none are added."""
    kept = {}
    for layer, touches in norms_of(leaves, products, examples, notes, wanted):
        why = exceptions.unexplained.get(layer.name)
        if any(_is_under(leaf.address, entry) for entry in exceptions.exclude for leaf in layer.leaves):
            why = "excluded"
        if why is None:
            kept[layer.leaves[0].address] = layer, touches
        else:
            notes |= dict.fromkeys((leaf.address for leaf in layer.leaves), why)
    return kept


def _is_under(address: str, entry: str) -> bool:
    return address == entry or address.startswith(entry + "/")


def _agreed(products: Sequence[Product], examples: int, draws: int, alone: bool) -> list[Seen] | str:
    """What all products of some arrays say, or why they make no layer."""
    found = []
    for product in products:
        seen = read(product, examples, alone)
        if isinstance(seen, str):
            return seen
        found.append(seen)
    found = of_whole(found)
    if isinstance(found, str):
        return found
    biased = [seen for seen in found if seen.bias is not None and {each.kind for each in found} == {"dense"}]
    first = (biased or found)[0]  # a bias says which side is that of the outputs
    for place, seen in enumerate(found):
        if (seen.kernel, seen.stack) == (first.kernel, first.stack) and (seen.kind == "conv") == (first.kind == "conv"):
            continue
        turned = arranged.transposed(seen.kernel, (*range(len(seen.stack)), len(seen.stack) + 1, len(seen.stack)))
        if seen.kind != "dense" or first.kind == "conv" or (turned, seen.stack) != (first.kernel, first.stack):
            return "its products see it as different matrices"
        part = seen.use.part and seen.use.part.turned()
        use = seen.use._replace(transposed=True, positions=seen.use.positions * max(draws, 1), part=part)
        found[place] = seen._replace(use=use)
    if any(seen.use.transposed for seen in found) and any(parts_of(seen.call.outputs) for seen in found):
        return "used the other way round, on parts of examples"
    return side_by_side(found)


def _biases(
    layers: Mapping[tuple[str, ...], list[Seen]], products: Sequence[Product], notes: dict[str, str]
) -> dict[tuple[str, ...], Arrangement]:
    """The bias of each layer that has one: added at its products and nowhere else; their uses say at which.

    Args:
        layers: what the products of their arrays say.
        products: all of the function.
        notes: why an address is in no layer; those of the other biases are added.

    Returns:
        {arrays of a layer: its bias}.
    """
    owners: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for product in products:
        for address in () if product.bias is None else addresses(product.bias):
            owners[address].add(addresses(product.kernel))
    biases = {}
    for arrays, seen in layers.items():
        bias = next((each.bias for each in seen if each.bias is not None), None)
        alike = all(each.bias is None or (each.bias == bias and not each.use.transposed) for each in seen)
        if bias is not None and alike and not any(a in notes or owners[a] != {arrays} for a in addresses(bias)):
            biases[arrays] = bias
            seen[:] = [each._replace(use=each.use._replace(biased=each.bias is not None)) for each in seen]
    taken = {address for bias in biases.values() for address in addresses(bias)}
    for address, arrays in owners.items():
        if address not in taken:
            one = next(iter(arrays))[0]
            alone = f"the bias of {one}, which is no layer, or has others as well"
            notes.setdefault(address, alone if len(arrays) == 1 else "added to products of several parameters")
    return biases


def _layer(name: str, seen: list[Seen], bias: Arrangement | None, leaves: Mapping[str, Any]) -> Layer:
    """The noun of a layer."""
    first = next((each for each in seen if not each.use.transposed), seen[0])
    rows, columns = first.shape
    main = "embedding" if first.kind == "embed" else "kernel"
    arrays = [(main, first.kernel)] + ([] if bias is None else [("bias", bias)])
    parts = []
    for role, arrangement in arrays:
        own = addresses(arrangement)
        roles = [role] if len(own) == 1 else [f"{role}{number}" for number in range(len(own))]
        parts += [Leaf(each, address, tuple(leaves[address].shape)) for each, address in zip(roles, own, strict=True)]
    plain = all(arranged.is_as_it_is(arrangement, leaves[addresses(arrangement)[0]].shape) for _, arrangement in arrays)
    return Layer(
        name=name,
        kind=first.kind,
        shape=(rows + (bias is not None), columns),
        leaves=tuple(parts),
        stack=first.stack + ((first.groups,) if first.groups > 1 else ()),
        dtype=max(dtype_of(leaves[leaf.address]) for leaf in parts),
        geometry=first.use.geometry if first.kind == "conv" else None,
        grouped=first.groups > 1,
        window=first.window,
        one_hot=all(each.kind == "embed" for each in seen),
        uses=tuple(each.use for each in seen),
        arrays=() if plain else tuple(arrays),
    )
