"""The text of a program compiled by XLA: the bytes that it moves in main memory, and its collectives.

HLO is XLA's language. In a TPU's program, the layout of an array names its memory: S(1) is the chip's vector memory,
and without S the array is in the main memory (HBM). XLA's own count of bytes adds up both, and counts a loop as one
iteration.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import takewhile
from typing import NamedTuple

BYTES = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s16=2, u16=2, f32=4, s32=4, u32=4, s64=8, u64=8, f64=8)
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
TILES = re.compile(r"\{([\d,]+):T\(([\d,]+)\)")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "copy-done", "slice-done", "async-done",
    "after-all", "partition-id", "replica-id", "iota", "send-done", "recv-done",
}  # fmt: skip
"""Operations that move nothing. A copy and a transfer between slices are counted where they start."""
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Instruction(NamedTuple):
    """One line of a computation. `rest` is the text from its operands on."""

    shape: str
    operation: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.split("), ")[0])


Computation = dict[str, Instruction]


class Collective(NamedTuple):
    """An exchange between chips: its kind, its bytes, and whether the chip computes meanwhile.

    The bytes are those of the whole array, of which each chip may keep a part.
    """

    kind: str
    bytes: int
    overlaps: bool


def parse(text: str) -> dict[str, Computation]:
    """{name: its instructions by name, in the order in which they run}. The main computation's name is "ENTRY"."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            current = computations.setdefault("ENTRY" if head[1] else head[2], {})
        elif found := INSTRUCTION.match(line):
            current[found[2]] = Instruction(found[3], found[4], found[5], bool(found[1]))
    return computations


def size(shape: str, everywhere: bool = False) -> int:
    """The bytes of the arrays of a shape in main memory, or in all memories, with the padding to whole tiles.

    Types without a size in BYTES, such as tokens, are not counted.
    """
    return sum(
        BYTES.get(dtype, 0) * _elements(dims, layout)
        for dtype, dims, layout in ARRAY.findall(shape)
        if everywhere or "S(" not in layout
    )


def _elements(dims: str, layout: str) -> int:
    """The layout {1,0:T(8,128)} stores axes 1 and 0, the fastest first, and pads them to multiples of 128 and 8."""
    sides = [int(side) for side in dims.split(",") if side]
    if tiles := TILES.match(layout):
        axes, tile = ([int(n) for n in found.split(",")] for found in tiles.groups())
        for axis, side in zip(axes, reversed(tile), strict=False):
            sides[axis] = math.ceil(sides[axis] / side) * side
    return math.prod(sides)


def main_memory_bytes(computations: dict[str, Computation], name: str = "ENTRY") -> int:
    """The bytes that the program reads and writes in main memory, each iteration of its loops included."""
    total = 0
    for one in computations[name].values():
        if one.operation == "while":
            body, condition = (_called(one, role) for role in ("body", "condition"))
            total += _iterations(computations[condition]) * main_memory_bytes(computations, body)
        elif one.operation not in FREE:
            total += _moved(computations, computations[name], one)
    return total


def _called(one: Instruction, role: str) -> str:
    found = re.search(role + r"=%?([\w.-]+)", one.rest)
    return found[1] if found else ""


def _iterations(condition: Computation) -> int:
    """The bound of a loop's counter: the largest constant that its condition compares with."""
    numbers = [re.match(r"\d+", one.rest) for one in condition.values() if one.operation == "constant"]
    return max((int(number[0]) for number in numbers if number), default=1)


def _moved(computations: dict[str, Computation], around: Computation, one: Instruction) -> int:
    if one.operation in ("copy-start", "slice-start", "async-start"):  # its shape is (source, result, ...)
        source, result = ARRAY.findall(one.shape)[:2]
        moved = size("{}[{}]{}".format(*result), everywhere=True)
        return moved * sum("S(" not in layout for *_, layout in (source, result))
    if one.operation in ("send", "recv"):  # the shape is (array, ...)
        return size("{}[{}]{}".format(*ARRAY.findall(one.shape)[0]))
    if one.operation == "custom-call" and "AllocateBuffer" in one.rest:
        return 0
    operands = {number: around[name].shape for number, name in enumerate(one.operands) if name in around}
    if one.operation == "fusion":
        body = computations[_called(one, "calls")]
    else:  # as a fusion of this instruction alone
        body = {
            one.operands[number]: Instruction(x, "parameter", f"{number})", False) for number, x in operands.items()
        }
        body["result"] = one._replace(root=True)
    read = (_read(computations, body, number, size(shape)) for number, shape in operands.items())
    return _written(computations, body, one.shape) + sum(read)


def _written(computations: dict[str, Computation], body: Computation, shape: str) -> int:
    """The bytes that a fusion writes of its result of this shape: of an array that it updates, only the slice."""
    (root,) = (name for name, one in body.items() if one.root)
    roots = body[root].operands if body[root].operation == "tuple" else [root]
    arrays = ["{}[{}]{}".format(*array) for array in ARRAY.findall(shape)]
    if len(roots) != len(arrays):
        return size(shape)
    return sum(_changed(computations, body, root, array) for root, array in zip(roots, arrays, strict=True))


def _changed(computations: dict[str, Computation], body: Computation, name: str, shape: str) -> int:
    one = body[_origin(body, name)]
    if one.operation == "fusion":
        return _written(computations, computations[_called(one, "calls")], shape)
    in_place = one.operation == "dynamic-update-slice" and body[_origin(body, one.operands[0])].operation == "parameter"
    return size(body[one.operands[1]].shape, everywhere=True) if in_place and size(shape) else size(shape)


def _origin(body: Computation, name: str) -> str:
    """The instruction whose result `name` is, in another shape."""
    return _origin(body, body[name].operands[0]) if body[name].operation == "bitcast" else name


def _read(computations: dict[str, Computation], body: Computation, number: int, whole: int) -> int:
    """The bytes that a fusion reads of its operand `number` of `whole` bytes: less, if it only takes slices of it."""
    names = [name for name, one in body.items() if one.operation == "parameter" and one.rest.startswith(f"{number})")]
    return min(whole, sum(_taken(computations, body, name, whole) for name in names))


def _taken(computations: dict[str, Computation], body: Computation, name: str, whole: int) -> int:
    if body[name].root:
        return whole
    taken = 0
    for user, one in body.items():
        if name not in one.operands:
            continue
        place = one.operands.index(name)
        if one.operation in ("slice", "dynamic-slice") and place == 0:
            taken += size(one.shape, everywhere=True)
        elif one.operation == "bitcast":
            taken += _taken(computations, body, user, whole)
        elif one.operation == "fusion":
            taken += _read(computations, computations[_called(one, "calls")], place, whole)
        elif one.operation != "dynamic-update-slice" or place > 0:
            return whole
    return taken


def collectives(computations: dict[str, Computation]) -> list[Collective]:
    """The collectives of all computations, in the order in which they start.

    One overlaps if the chip computes between its start and its end. XLA writes it in one of four ways: as one
    operation, which overlaps with nothing; as a start and a done; in steps, each of which is fused with a convolution
    or another operation ("async collective fusion"), where all steps have the same chain_id; or, between slices, as a
    send and a recv of the same rendezvous.
    """
    found, chains = [], dict[str, list[int]]()
    for name, computation in computations.items():
        lines = list(computation.items())
        for place, (start, one) in enumerate(lines):
            kind = one.operation.removesuffix("-start")
            rendezvous = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', one.rest)
            if one.operation == "send" and rendezvous:
                between = _until(lines[place + 1 :], "recv-done", _receives(computation, rendezvous[0]))
                kind = _quoted(one, "_xla_megascale_transfer_type").lower().replace("_", "-") + " between slices"
                moved = size("{}[{}]{}".format(*ARRAY.findall(one.shape)[0]), everywhere=True)
                found.append(Collective(kind, moved, any(map(_computes, between))))
            elif kind in COLLECTIVES and (chain := _quoted(one, "chain_id")):
                chains.setdefault(chain, [len(found), 0])[1] += 1
                if chains[chain][1] == 1:
                    found.append(Collective(kind, _whole(computation, one), False))
            elif kind in COLLECTIVES:
                # A fusion of an all-reduce with the slice of it that a chip keeps.
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                between = _until(lines[place + 1 :], f"{kind}-done", {start}) if one.operation != kind else []
                found.append(Collective(kind, _whole(computation, one), any(map(_computes, between))))
    for place, steps in chains.values():
        found[place] = found[place]._replace(overlaps=steps > 2)  # the first starts it, and the last ends it
    return found


def _whole(computation: Computation, one: Instruction) -> int:
    """The bytes of a collective's result, or of the operands of a reduce-scatter, which are larger."""
    shapes = [one.shape]
    if one.operation.startswith("reduce-scatter"):
        shapes = [computation[name].shape for name in one.operands if name in computation] or shapes
    return sum(size(shape, everywhere=True) for shape in shapes)


def _quoted(one: Instruction, key: str) -> str:
    found = re.search(key + r'="([^"]*)"', one.rest)
    return found[1] if found else ""


def _receives(computation: Computation, rendezvous: str) -> set[str]:
    return {name for name, one in computation.items() if one.operation == "recv" and rendezvous in one.rest}


def _until(lines: list[tuple[str, Instruction]], operation: str, operands: set[str]) -> Iterator[Instruction]:
    """The instructions before the first `operation` on one of `operands`."""
    ends = (operation, operands)
    return (one for _, one in takewhile(lambda line: not _is(line[1], *ends), lines))


def _is(one: Instruction, operation: str, operands: set[str]) -> bool:
    return one.operation == operation and not operands.isdisjoint(one.operands)


def _computes(one: Instruction) -> bool:
    return one.operation in ("fusion", "convolution", "dot", "while", "custom-call")


def summary(found: list[Collective]) -> str:
    """The collectives in a few words, such as "2 all-reduce (1.2 GB, 40% overlapped)"; "none" if there are none."""
    words = []
    for kind, count in Counter(one.kind for one in found).items():
        ones = [one for one in found if one.kind == kind]
        moved, overlapped = sum(one.bytes for one in ones), sum(one.bytes for one in ones if one.overlaps)
        words.append(f"{count} {kind} ({moved / 1e9:.3g} GB, {overlapped / max(moved, 1):.0%} overlapped)")
    return ", ".join(words) or "none"
