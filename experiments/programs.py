"""What a compiled program computes and sends on one device, read from its text.

Loops count as often as they run. Of branches the dearest counts, so of devices that choose theirs by their place the
one that has the most to do; or the cheapest, for a step at which nothing is due. XLA's own `cost_analysis` counts the
body of a loop once, and calls of LAPACK as nothing.

    send      all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute: the bytes that leave a device on a
              ring of D, (D - 1) / D of the array, twice for an all-reduce
    flops     products and convolutions 2 n m k, Cholesky n^3 / 3, triangular solves n^2 m, QR 4 n^3 / 3, as much for Q,
              eigendecompositions 9 n^3 (reduction, divide and conquer, back transformation)
"""

import re
from collections.abc import Callable
from math import prod
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SOLVES = ("potrf", "trsm", "syevd", "heevd", "geqrf", "orgqr", "potrs")
LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Line(NamedTuple):
    """An instruction: its name, the shapes of what it gives [(dtype, sizes)], what it does, the rest of the text."""

    name: str
    shapes: list[tuple[str, tuple[int, ...]]]
    what: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """The names of what it takes."""
        return re.findall(r"%([\w.-]+)", self.rest.split("), ")[0])


class Sent(NamedTuple):
    """A collective: what it does, the shape of what it gives, bytes that leave a device, and how often it runs."""

    what: str
    shape: str
    bytes: float
    times: int


class Program:
    """A compiled program."""

    def __init__(self, text: str, devices: int, dearest: bool = True):
        """Read the text of `compiled.as_text()`, for a number of devices; of branches the dearest or the cheapest."""
        self.devices, self.parts, self.entry, self.dearest = devices, {}, "", dearest
        name = ""
        for line in text.splitlines():
            if head := HEAD.match(line):
                name = head[2]
                self.parts[name] = []
                self.entry = name if head[1] else self.entry
            elif (found := LINE.match(line)) and name:
                self.parts[name].append(Line(found[1], shapes_of(found[2]), found[3], found[4]))

    def flops(self) -> float:
        """Of products and factorisations."""
        return self._total(self._flops)

    def solves(self) -> dict[int, int]:
        """How many factorisations by LAPACK there are of matrices of each size."""
        sizes = {
            line.shapes[0][1][-1] for lines in self.parts.values() for line in lines if _is_solve(line, "potrf|evd")
        }

        def of(size):
            return lambda lines, line: float(_is_solve(line, "potrf|evd") and line.shapes[0][1][-1] == size)

        return {size: int(self._total(of(size))) for size in sorted(sizes)}

    def sent(self) -> list[Sent]:
        """The collectives, with how often each runs."""
        found = []

        def note(name, times):
            for line in self.parts[name]:
                what = line.what.removesuffix("-start")
                if what in COLLECTIVES:
                    found.append(Sent(what, _shown(max(line.shapes, key=size_of)), self._bytes([], line), times))
                inner = self._inner(line)
                if line.what == "conditional":
                    chosen = max if self.dearest else min
                    inner = [chosen(inner, key=lambda each: self._total(self._bytes, each[0]))]
                for name_of, more in inner:
                    note(name_of, times * more)

        note(self.entry, 1)
        return found

    def bytes_sent(self) -> float:
        """Bytes that leave a device, of all collectives."""
        return sum(each.bytes * each.times for each in self.sent())

    def solves_while_it_sends(self) -> bool:
        """Whether a part of the program that factorises has a collective in it, or in what it calls."""

        def has(name, test):
            return any(test(line) or any(has(n, test) for n, _ in self._inner(line)) for line in self.parts[name])

        def sends(line):
            return line.what.removesuffix("-start") in COLLECTIVES

        loops = [
            n for lines in self.parts.values() for line in lines if line.what == "while" for n, _ in self._inner(line)
        ]
        return any(has(name, _is_solve) and has(name, sends) for name in loops)

    def _ring(self, what: str, size: float) -> float:
        """The bytes that leave a device for an array of so many."""
        share = (self.devices - 1) / self.devices
        of = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": self.devices * share, "all-to-all": share}
        return size * of.get(what, 1.0)

    def _inner(self, line: Line) -> list[tuple[str, int]]:
        """The parts of the program that an instruction runs, with how often."""
        if line.what == "while":
            times = re.search(r'known_trip_count":\{"n":"(\d+)"', line.rest)
            return [(_said(r"body=%?([\w.-]+)", line), int(times[1]) if times else 1)]
        names = re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", line.rest)
        if branches := re.search(r"branch_computations=\{(.*?)\}", line.rest):
            names += re.findall(r"%?([\w.-]+)", branches[1])
        return [(name, 1) for name in names if name in self.parts]

    def _total(self, of: Callable[[list[Line], Line], float], name: str | None = None) -> float:
        """A sum over all instructions, as often as they run."""
        lines, total = self.parts[name or self.entry], 0.0
        for line in lines:
            total += of(lines, line)
            each = [times * self._total(of, inner) for inner, times in self._inner(line)]
            chosen = max if self.dearest else min
            total += chosen(each, default=0.0) if line.what == "conditional" else sum(each)
        return total

    def _bytes(self, lines: list[Line], line: Line) -> float:
        del lines
        what = line.what.removesuffix("-start")
        whole = sum if what == "all-reduce" else max  # one may sum several arrays; others may give what they take
        return self._ring(what, whole(map(size_of, line.shapes))) if what in COLLECTIVES else 0.0

    def _flops(self, lines: list[Line], line: Line) -> float:
        if line.what == "dot":
            taken = next(each for each in lines if each.name == line.operands[0]).shapes[0][1]
            axes = _said(r"lhs_contracting_dims=\{([\d,]*)\}", line)
            return 2.0 * prod(line.shapes[0][1]) * prod(taken[int(axis)] for axis in axes.split(",") if axis)
        if line.what == "convolution":
            kernel = next(each for each in lines if each.name == line.operands[1]).shapes[0][1]
            outputs = kernel[_said(r"dim_labels=\w+_(\w+)->", line).index("o")]
            return 2.0 * prod(line.shapes[0][1]) * prod(kernel) / outputs
        if line.what == "custom-call" and (found := re.search("|".join(SOLVES), line.rest)):
            *stack, rows, columns = line.shapes[0][1]
            each = {"potrf": rows**3 / 3, "trsm": rows**2 * columns, "geqrf": 4 * rows * columns**2 / 3}
            each |= {"orgqr": 4 * rows * columns**2 / 3, "potrs": 2 * rows**2 * columns}
            return prod(stack) * each.get(found[0], 9.0 * rows**3)
        return 0.0


def _said(pattern: str, line: Line) -> str:
    found = re.search(pattern, line.rest)
    assert found, f"{line.what} does not say {pattern}"
    return found[1]


def _is_solve(line: Line, kinds: str = "|".join(SOLVES)) -> bool:
    return line.what == "custom-call" and bool(
        re.search(f'target="lapack_.({kinds})|target="lapack_.*({kinds})', line.rest)
    )


def shapes_of(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays in the type of an instruction."""
    return [
        (kind, tuple(int(n) for n in sizes.split(",") if n)) for kind, sizes in SHAPE.findall(text) if kind in BYTES
    ]


def size_of(shape: tuple[str, tuple[int, ...]]) -> int:
    """The bytes of an array."""
    return BYTES[shape[0]] * prod(shape[1])


def _shown(shape: tuple[str, tuple[int, ...]]) -> str:
    """The shape of an array, f32[4,8]."""
    return f"{shape[0]}[{','.join(map(str, shape[1]))}]"
