"""Leaves of any parameter tree by "/"-joined address, and their replacement.

Dicts, tuples, NamedTuples and dataclasses all read alike: `{"encoder": {"kernel": w}}` has the one leaf
"encoder/kernel", and so it has where a box stands around the array: a Variable of NNX, metadata of linen. An
`optax.MaskedNode` (a leaf that a mask took away) counts as absent.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax

Tree = Any
Path = tuple[Any, ...]


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _is_absent(node: Any) -> bool:
    return node is None or _is_masked(node)


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves of a tree by address, in the order of the tree.

    >>> flatten({"b": {"kernel": 1}, "a": (2, 3)})
    {'a/0': 2, 'a/1': 3, 'b/kernel': 1}

    Args:
        tree: any pytree.

    Returns:
        {address: leaf}, without masked leaves.

    Raises:
        ValueError: if two leaves have one address, as those of {"a/b": 1, "a": {"b": 2}}.
    """
    named = [(address, path, leaf) for address, path, leaf in _named(tree) if not _is_absent(leaf)]
    found = {address: leaf for address, _, leaf in named}
    if len(found) < len(named):
        raise _told_apart(named)
    return found


def masked(tree: Tree) -> frozenset[str]:
    """Addresses at which a mask took the leaf away.

    Args:
        tree: any pytree.

    Returns:
        The addresses of its `optax.MaskedNode`s.
    """
    return frozenset(address for address, _, leaf in _named(tree) if _is_masked(leaf))


def replace(tree: Tree, leaves: Mapping[str, Any]) -> Tree:
    """The tree with some leaves exchanged.

    >>> replace({"a": 1, "b": 2}, {"b": 3})
    {'a': 1, 'b': 3}

    Args:
        tree: any pytree.
        leaves: {address: new leaf}; addresses that the tree lacks are ignored.

    Returns:
        A tree of the same structure.
    """
    new = [leaves.get(address, leaf) for address, _, leaf in _named(tree) if not _is_absent(leaf)]
    return jax.tree.unflatten(jax.tree.structure(tree), new)


def unboxed(tree: Tree) -> Tree:
    """A tree with arrays in the place of Variables of NNX, such as those in which `nnx.Optimizer` keeps a state.

    Args:
        tree: any pytree.

    Returns:
        The same tree of arrays.
    """
    return jax.tree.map(lambda node: jax.tree.leaves(node)[0] if _is_box(node) else node, tree, is_leaf=_is_box)


def boxed(tree: Tree, like: Tree) -> Tree:
    """A tree of arrays, those in Variables that are in some in another tree.

    Args:
        tree: of arrays.
        like: a tree with Variables, or with none.

    Returns:
        The tree. Where the other has Variables alone, an array that is not in it is in a Variable, too.
    """
    found = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_box)[0]
    boxes = {path: jax.tree.structure(node) if _is_box(node) else None for path, node in found}
    other = None if any(box is None for box in boxes.values()) else next(iter(boxes.values()), None)

    def within(path, leaf):
        box = boxes.get(path, other)
        return leaf if box is None else jax.tree.unflatten(box, [leaf])

    return jax.tree_util.tree_map_with_path(within, tree)


def _is_box(node: Any) -> bool:
    return hasattr(node, "get_metadata")  # `value` is there as well, with a warning


def parted(tree: Tree, sort: Callable[[Any], str]) -> tuple[dict[str, list[Any]], Callable[[Mapping[str, Any]], Tree]]:
    """Leaves of a tree by their sort, and the way back.

    >>> leaves, whole = parted({"a": 1, "b": "x", "c": 2}, lambda leaf: type(leaf).__name__)
    >>> leaves["int"], whole({**leaves, "int": [3, 4]})
    ([1, 2], {'a': 3, 'b': 'x', 'c': 4})

    Args:
        tree: any pytree.
        sort: leaf -> its sort.

    Returns:
        {sort: leaves in the order of the tree}; a function of such leaves that gives the tree.
    """
    leaves, structure = jax.tree.flatten(tree)
    sorts = [sort(leaf) for leaf in leaves]
    parts: dict[str, list[Any]] = defaultdict(list)
    for leaf, each in zip(leaves, sorts, strict=True):
        parts[each].append(leaf)

    def whole(parts):
        given = {each: iter(some) for each, some in parts.items()}
        return jax.tree.unflatten(structure, [next(given[each]) for each in sorts])

    return parts, whole


def _named(tree: Tree) -> list[tuple[str, Path, Any]]:
    """Address, path and leaf of all leaves, absent ones too; `value`, the only leaf of a box, is no part of a name."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_absent)
    leaves = Counter(path[:-1] for path, _ in found)

    def address(path: Path) -> str:
        is_box = len(path) > 1 and getattr(path[-1], "name", None) == "value" and leaves[path[:-1]] == 1
        return jax.tree_util.keystr(path[:-1] if is_box else path, simple=True, separator="/")

    return [(address(path), path, leaf) for path, leaf in found]


def _told_apart(named: Iterable[tuple[str, Path, Any]]) -> ValueError:
    """Of the first two paths with one address."""
    seen: dict[str, Path] = {}
    for address, path, _ in named:
        if address in seen:
            first, second = map(jax.tree_util.keystr, (seen[address], path))
            return ValueError(
                f"The tree has {first} and {second}, which are both called {address!r} here; expected names that "
                'differ when they are joined by "/". Rename one of them.'
            )
        seen[address] = path
    raise AssertionError("all addresses differ")
