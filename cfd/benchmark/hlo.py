"""The text of a program compiled by XLA: the bytes that it moves in main memory, and its collectives.

HLO is XLA's language. In a TPU's program, the layout of an array names its memory: S(1) is the chip's vector memory,
and without S the array is in the main memory (HBM). XLA's own count of bytes adds up both, and counts a loop as one
iteration.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

BYTES = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s16=2, u16=2, f32=4, s32=4, u32=4, s64=8, u64=8, f64=8)
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
FREE = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "copy-done", "slice-done", "async-done",
    "after-all", "partition-id", "replica-id", "iota",
}  # fmt: skip
"""Operations that move nothing. A copy is counted where it starts."""
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
    """An exchange between chips: its kind, the bytes of its result, and whether the chip computes meanwhile."""

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
    """The bytes of the arrays of a shape in main memory, or in all memories.

    The padding of tiles is not counted, nor are types without a size in BYTES, such as tokens.
    """
    return sum(
        BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims, layout in ARRAY.findall(shape)
        if everywhere or "S(" not in layout
    )


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
        return size(f"{result[0]}[{result[1]}]") * sum("S(" not in layout for *_, layout in (source, result))
    if one.operation in ("slice", "dynamic-slice"):
        return 2 * size(one.shape)
    if one.operation == "dynamic-update-slice":
        return 2 * size(around[one.operands[1]].shape) if one.operands[1] in around else 0
    if one.operation == "custom-call" and "AllocateBuffer" in one.rest:
        return 0
    body = computations.get(_called(one, "calls"), {})
    written = size(one.shape)
    for inner in body.values():
        if inner.root and inner.operation == "dynamic-update-slice" and written:
            written = size(body[inner.operands[1]].shape, everywhere=True)
    return written + sum(
        _read(body, number, size(around[operand].shape))
        for number, operand in enumerate(one.operands)
        if operand in around
    )


def _read(body: Computation, number: int, whole: int) -> int:
    """The bytes that a fusion reads of its operand `number` of `whole` bytes: less, if it only takes slices of it."""
    names = [name for name, one in body.items() if one.operation == "parameter" and one.rest.startswith(f"{number})")]
    users = [one for one in body.values() if set(names) & set(one.operands)]
    if not whole or not users:
        return whole
    if all(one.operation in ("slice", "dynamic-slice") for one in users):
        return sum(size(one.shape, everywhere=True) for one in users)
    if all(one.operation == "dynamic-update-slice" and one.operands[0] in names for one in users):
        return 0
    return whole


def collectives(computations: dict[str, Computation]) -> list[Collective]:
    """The collectives of all computations. One that ends right where it starts overlaps with nothing."""
    found = []
    for computation in computations.values():
        lines = list(computation.items())
        for place, (name, one) in enumerate(lines):
            kind = one.operation.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            overlaps = False
            if one.operation != kind:
                for _, later in lines[place + 1 :]:
                    if later.operation == f"{kind}-done" and name in later.operands:
                        break
                    overlaps |= later.operation in ("fusion", "convolution", "dot", "while", "custom-call")
            found.append(Collective(kind, size(one.shape, everywhere=True), overlaps))
    return found


def summary(found: list[Collective]) -> str:
    """The collectives in a few words, such as "2 all-reduce (1.2 GB, 1 overlapped)"; "none" if there are none."""
    counts = Counter(one.kind for one in found)
    words = []
    for kind, count in counts.items():
        ones = [one for one in found if one.kind == kind]
        moved, overlapped = sum(one.bytes for one in ones) / 1e9, sum(one.overlaps for one in ones)
        words.append(f"{count} {kind} ({moved:.3g} GB, {overlapped} overlapped)")
    return ", ".join(words) or "none"
