"""What a compiled program sends, and where it factorises, read from its text.

Of devices that choose their branch by their place the one that has the most to do counts.

    send      all-gather, all-reduce, reduce-scatter, all-to-all, collective-permute: the bytes that leave a device on a
              ring of D, (D - 1) / D of the array, twice for an all-reduce
"""

from math import prod
from typing import NamedTuple

from experiments import programs

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Sent(NamedTuple):
    """A collective: what it does, the shape of what it gives, bytes that leave a device, and how often it runs."""

    what: str
    shape: str
    bytes: float
    times: int


class Program(programs.Program):
    """A compiled program of several devices."""

    def __init__(self, text, devices, dearest=True):
        super().__init__(text, dearest)
        self.devices = devices

    def solves(self):
        """How many factorisations by LAPACK there are of matrices of each size."""
        lines = [line for part in self.parts.values() for line in part if line.solve("potrf|evd")]

        def of(size):
            return lambda _, line: float(bool(line.solve("potrf|evd")) and line.shapes[0][1][-1] == size)

        return {size: int(self.total(of(size))) for size in sorted({line.shapes[0][1][-1] for line in lines})}

    def sent(self):
        """The collectives, with how often each runs."""
        found = []

        def note(name, times):
            for line in self.parts[name]:
                if sends(line):
                    kind, sizes = max(line.shapes, key=size_of)
                    shape = f"{kind}[{','.join(map(str, sizes))}]"
                    found.append(Sent(line.what.removesuffix("-start"), shape, self._bytes([], line), times))
                inner = self.inner(line)
                if line.what == "conditional":
                    inner = [self.choose(inner, key=lambda each: self.total(self._bytes, each[0]))]
                for name_of, more in inner:
                    note(name_of, times * more)

        note(self.entry, 1)
        return found

    def bytes_sent(self):
        """Bytes that leave a device, of all collectives."""
        return sum(each.bytes * each.times for each in self.sent())

    def solves_while_it_sends(self):
        """Whether a part of the program that factorises has a collective in it, or in what it calls."""

        def has(name, test):
            return any(test(line) or any(has(n, test) for n, _ in self.inner(line)) for line in self.parts[name])

        lines = [line for part in self.parts.values() for line in part if line.what == "while"]
        loops = [name for line in lines for name, _ in self.inner(line)]
        return any(has(name, programs.Line.solve) and has(name, sends) for name in loops)

    def _bytes(self, _, line):
        """The bytes that leave a device by an instruction."""
        if not sends(line):
            return 0.0
        what, share = line.what.removesuffix("-start"), (self.devices - 1) / self.devices
        of = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": self.devices * share, "all-to-all": share}
        whole = sum if what == "all-reduce" else max  # one may sum several arrays; others may give what they take
        return whole(map(size_of, line.shapes)) * of.get(what, 1.0)


def sends(line):
    """Whether an instruction is a collective."""
    return line.what.removesuffix("-start") in COLLECTIVES


def size_of(shape):
    """The bytes of an array."""
    return BYTES.get(shape[0], 0) * prod(shape[1])
