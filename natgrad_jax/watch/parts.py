"""Products of parts of one array, as uses of the whole: fused kernels of attention, gates in one array, layers in one.

The layer is that of the whole array. What a product does not use of it has rows of zeros there. Where products read the
same and give columns of their own they are one product of the joint kernel, whether the model cuts the kernel or the
result; products of different copies stand beside one another, too.
"""

from collections.abc import Callable, Sequence
from math import prod

from natgrad_jax.algebra.arranged import Arranged, Arrangement, parts, shape
from natgrad_jax.algebra.cuts import Block, whole
from natgrad_jax.base import Array
from natgrad_jax.watch.reading import Reading, Seen

_UNCLEAR = "cut before its product in a way that is not followed"


def of_whole(found: list[Seen]) -> list[Seen] | str:
    """What products say of parts of an array, as said of all of it.

    Args:
        found: what each product says.

    Returns:
        The same, or why there is no such layer; where nothing is cut, as it was.
    """
    if not any(part.cuts for seen in found for part in parts(seen.kernel)):
        return found
    said: list[Seen] = []
    for seen in found:
        mine = _of_whole(seen)
        if isinstance(mine, str):
            return mine
        said.append(mine)
    return said


def _of_whole(seen: Seen) -> Seen | str:
    """What one product says of the whole array."""
    if not isinstance(seen.kernel, Arranged):
        return "cut, and joined with others"
    if (known := whole(seen.kernel)) is None:
        return _UNCLEAR
    kernel, block = known
    sizes, copies = shape(kernel), len(shape(kernel)) - len(shape(seen.kernel)) + len(seen.stack)
    if seen.kind == "conv" and (seen.groups > 1 or block.sizes[copies:-1] != sizes[copies:-1]):
        return "a convolution whose kernel is cut along its inputs"
    rows = prod(sizes[copies:-1])
    part = Block(
        (*block.starts[:copies], sum(block.starts[copies:-1]), block.starts[-1]),
        (*block.sizes[:copies], prod(block.sizes[copies:-1]), block.sizes[-1]),
    )
    ahead = copies - len(seen.stack)
    call = seen.call._replace(inputs=_ahead(seen.call.inputs, ahead), outputs=_ahead(seen.call.outputs, ahead))
    return seen._replace(
        kernel=kernel,
        bias=_bias(seen.bias, part, (*sizes[:copies], sizes[-1])),
        stack=sizes[:copies],
        shape=(rows, sizes[-1]),
        use=seen.use._replace(part=part),
        call=call,
    )


def _ahead(reading: Callable[..., Array], count: int) -> Reading:
    """A reading with axes of copies in front, of which it has one."""
    assert isinstance(reading, Reading), "what lifts one comes later"
    ones = (1,) * count
    wide = None if reading.wide is None else ones + reading.wide
    return reading._replace(shape=ones + reading.shape, wide=wide, place=reading.place + count)


def _bias(bias: Arrangement | None, part: Block, sizes: tuple[int, ...]) -> Arrangement | None:
    """The whole of a bias that is cut as the columns and the copies of its kernel are; None of another."""
    if not isinstance(bias, Arranged) or (known := whole(bias)) is None:
        return None
    found, block = known
    alike = shape(found) == sizes and block == Block(*((*axes[:-2], axes[-1]) for axes in part))
    return found if alike else None


def side_by_side(found: list[Seen]) -> list[Seen]:
    """The uses of parts in an order in which those that stand in the same rows follow one another.

    Args:
        found: what the products of a layer say.

    Returns:
        The same, `beside` told; as it was where all of the matrix is used, or a use is transposed.
    """
    if any(seen.use.part is None or seen.use.transposed for seen in found):
        return found
    rounds: list[list[Seen]] = []
    for seen in found:
        for others in rounds:
            if all(_fit(seen, other) for other in others):
                others.append(seen._replace(use=seen.use._replace(beside=True)))
                break
        else:
            rounds.append([seen])
    return [seen for members in rounds for seen in members]


def _fit(one: Seen, other: Seen) -> bool:
    """Whether two uses can stand in the same rows: they are of different copies, or read the same."""
    mine, theirs = one.use.part, other.use.part
    if (one.kind, one.use.positions) != (other.kind, other.use.positions):
        return False
    copies = len(one.stack)
    if mine.is_apart(theirs, copies):
        return True
    same = one.call.product.reads is not None and one.call.product.reads == other.call.product.reads
    return same and one.call.inputs == other.call.inputs and _but_columns(mine) == _but_columns(theirs)


def _but_columns(part: Block) -> Sequence[tuple[int, ...]]:
    return [axes[:-1] for axes in part]
