"""What a compiled program computes, read from its text.

Loops count as often as they run; of branches the dearest counts, or the cheapest, for a step at which nothing is due.
XLA's own `cost_analysis` counts the body of a loop once, and calls of LAPACK as nothing.

    flops     products and convolutions 2 n m k, Cholesky n^3 / 3, triangular solves n^2 m, QR 4 n^3 / 3, as much for Q,
              eigendecompositions 9 n^3 (reduction, divide and conquer, back transformation)
"""

import re
from collections.abc import Callable
from math import prod
from typing import NamedTuple

SOLVES = "potrf|trsm|syevd|heevd|geqrf|orgqr|potrs"
LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
SHAPE = re.compile(r"(pred|[a-z]+\d+)\[([\d,]*)\]")
CALLS = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")


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

    def says(self, pattern: str) -> str:
        """What its text has in the place of the group of a pattern."""
        found = re.search(pattern, self.rest)
        assert found, f"{self.what} does not say {pattern}"
        return found[1]

    def solve(self, kinds: str = SOLVES) -> str:
        """Which factorisation it calls, of some; "" if none of these."""
        found = self.what == "custom-call" and re.search(f'target="[^"]*?({kinds})', self.rest)
        return found[1] if found else ""


class Program:
    """A compiled program."""

    def __init__(self, text: str, dearest: bool = True):
        """Read the text of `compiled.as_text()`; of branches the dearest or the cheapest."""
        self.parts: dict[str, list[Line]] = {}
        self.entry, self.choose = "", max if dearest else min
        name = ""
        for line in text.splitlines():
            if head := HEAD.match(line):
                name = head[2]
                self.parts[name] = []
                self.entry = name if head[1] else self.entry
            elif (found := LINE.match(line)) and name:
                shapes = [(kind, tuple(map(int, filter(None, n.split(","))))) for kind, n in SHAPE.findall(found[2])]
                self.parts[name].append(Line(found[1], shapes, found[3], found[4]))

    def flops(self) -> float:
        """Of products and factorisations."""
        return self.total(_flops)

    def inner(self, line: Line) -> list[tuple[str, int]]:
        """The parts of the program that an instruction runs, with how often."""
        if line.what == "while":
            times = re.search(r'known_trip_count":\{"n":"(\d+)"', line.rest)
            return [(line.says(r"body=%?([\w.-]+)"), int(times[1]) if times else 1)]
        names = CALLS.findall(line.rest)
        if branches := re.search(r"branch_computations=\{(.*?)\}", line.rest):
            names += re.findall(r"%?([\w.-]+)", branches[1])
        return [(name, 1) for name in names if name in self.parts]

    def total(self, of: Callable[[list[Line], Line], float], name: str | None = None) -> float:
        """A sum over all instructions, as often as they run."""
        lines, total = self.parts[name or self.entry], 0.0
        for line in lines:
            each = [times * self.total(of, inner) for inner, times in self.inner(line)]
            total += of(lines, line) + (self.choose(each, default=0.0) if line.what == "conditional" else sum(each))
        return total


def _flops(lines: list[Line], line: Line) -> float:
    if line.what == "dot":
        taken = next(each for each in lines if each.name == line.operands[0]).shapes[0][1]
        axes = line.says(r"lhs_contracting_dims=\{([\d,]*)\}")
        return 2.0 * prod(line.shapes[0][1]) * prod(taken[int(axis)] for axis in axes.split(",") if axis)
    if line.what == "convolution":
        kernel = next(each for each in lines if each.name == line.operands[1]).shapes[0][1]
        outputs = kernel[line.says(r"dim_labels=\w+_(\w+)->").index("o")]
        return 2.0 * prod(line.shapes[0][1]) * prod(kernel) / outputs
    if kind := line.solve():
        *stack, rows, columns = line.shapes[0][1]
        each = {"potrf": rows**3 / 3, "trsm": rows**2 * columns, "geqrf": 4 * rows * columns**2 / 3}
        each |= {"orgqr": 4 * rows * columns**2 / 3, "potrs": 2 * rows**2 * columns}
        return prod(stack) * each.get(kind, 9.0 * rows**3)
    return 0.0
