"""Reads a compiled program (the text of its optimized HLO): what runs how often in a step, collectives, cycles.

The format isn't specified; what is read here was seen from libtpu 0.0.42 and 0.0.50, and the golden files of the tests show
where a new compiler writes something else. A body of a loop is counted as often as the loop runs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
CALLS = ("call", "call-start", "async-start")  # of a computation; call-start: on another core of the chip (tpu7x's collectives)
NO_IDEA = str(2**63 - 1)  # of an instruction's cycles
_CYCLES = r'"estimated_cycles":"(\d+)"'
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[fsuc]\d+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`shape` is the text of the result's type, `rest` that of everything from the opening parenthesis of the operands."""

    name: str
    opcode: str
    shape: str
    rest: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest[:_closing(self.rest)])

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern` in what follows the operands."""
        match = re.search(pattern, self.rest[_closing(self.rest):])
        return match[1] if match else None

    @property
    def op_name(self) -> str:
        """The path of the JAX operation that it comes from."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def cycles(self) -> int:
        """The compiler's own estimate for running it once; 0 where it has none."""
        return 0 if self.is_beyond_it else int(self.attribute(_CYCLES) or 0)

    @property
    def is_beyond_it(self) -> bool:
        """Does the compiler say that it has no idea (scatters on the sparse cores)?"""
        return self.attribute(_CYCLES) == NO_IDEA


@dataclasses.dataclass(frozen=True)
class Program:
    entry: str
    computations: Mapping[str, Mapping[str, Instruction]]  # computation -> instruction's name -> instruction


@dataclasses.dataclass(frozen=True)
class Collective:
    """One of the program's, and how often a step runs it.

    bytes: of the whole array on one device: what is gathered, reduced, or given away. axis: mesh axes that it is over, joined
    by "+". arrays: dtype and shape of those. padded: an all-reduce of arrays of which each device fills in a part: a gather.
    """

    kind: str
    axis: str
    times: int
    bytes: int
    group: int  # devices in a group
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    op_name: str
    padded: bool = False


def parse(text: str) -> Program:
    """Raises ValueError for a text without an entry computation."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            opcode = _OPCODE.search(match[2])
            if opcode:
                current[match[1]] = Instruction(match[1], opcode[1], match[2][:opcode.start(1)].strip(),
                                                match[2][opcode.end() - 1:], line.lstrip().startswith("ROOT"))
    if entry is None:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    return Program(entry, computations)


def _closing(text: str) -> int:
    """The place behind the parenthesis that closes the one at the start."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def arrays(shape: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(dtype, dimensions) of every array of a type, which may be a tuple."""
    return tuple((dtype, tuple(int(d) for d in dims.split(",")) if dims else ()) for dtype, dims in _ARRAY.findall(shape))


def size(dtype: str, shape: Sequence[int]) -> int:
    """Bytes."""
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(shape) * bits // 8


def trip_count(program: Program, computation: str, loop: Instruction) -> int | None:
    """How often a counted loop runs its body; None where the text doesn't say.

    The compiler writes it down, or the condition compares the counter, an element of the loop's tuple that begins at a constant
    and grows by one, with a third.
    """
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition = program.computations[loop.attribute(r"condition=%([\w.\-]+)")]
    body = program.computations[loop.attribute(r"body=%([\w.\-]+)")]
    compare = next((i for i in condition.values() if i.opcode == "compare" and i.is_root), None)
    if compare is None or compare.attribute(r"direction=(\w+)") != "LT":
        return None
    counter, limit = (condition[name] for name in compare.operands)
    index = counter.attribute(r"index=(\d+)")
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant" or index is None:
        return None
    outside = program.computations[computation]
    start = _element(outside, outside[loop.operands[0]], int(index))
    root = next((i for i in body.values() if i.is_root), None)
    step = _element(body, root, int(index)) if root else None
    by = next((body[name] for name in (step.operands if step and step.opcode == "add" else ())
               if body[name].opcode == "constant"), None)
    if start is None or start.opcode != "constant" or by is None:
        return None
    return max(0, -(-(_constant(limit) - _constant(start)) // _constant(by)))


def _element(instructions: Mapping[str, Instruction], value: Instruction, index: int) -> Instruction | None:
    """What is at `index` of a tuple, seen through copies."""
    if value.opcode != "tuple" or index >= len(value.operands):
        return None
    found = instructions[value.operands[index]]
    while found.opcode in ("copy", "bitcast") and found.operands:
        found = instructions[found.operands[0]]
    return found


def _constant(instruction: Instruction) -> int:
    return int(instruction.rest.strip("(").split(")")[0])


def walk(program: Program, into_fusions: bool = False) -> Iterator[tuple[str, Instruction, int]]:
    """(computation, instruction, times) of everything that a step runs, each as often as its loops run it.

    A fusion is one instruction unless `into_fusions`. Of a conditional every branch is there: read it as an upper bound. A loop
    whose length isn't known is there once: `unknown_loops` says how many are.
    """

    def visit(name: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
        for instruction in program.computations[name].values():
            yield name, instruction, times
            if instruction.opcode == "while":
                count = trip_count(program, name, instruction)
                yield from visit(instruction.attribute(r"body=%([\w.\-]+)"), times * (1 if count is None else count))
            elif instruction.opcode in CALLS or (into_fusions and instruction.opcode == "fusion"):
                yield from visit(instruction.attribute(r"(?:calls|to_apply)=%([\w.\-]+)"), times)
            elif instruction.opcode == "conditional":
                listed = instruction.attribute(r"branch_computations=\{([^}]*)\}") or ",".join(
                    re.findall(r"(?:true|false)_computation=(%[\w.\-]+)", instruction.rest))
                for branch in re.findall(r"%([\w.\-]+)", listed):
                    yield from visit(branch, times)

    yield from visit(program.entry, 1)


def unknown_loops(program: Program) -> int:
    """How many loops the text has whose lengths it doesn't say: what they run is counted once."""
    found = {(name, i.name): trip_count(program, name, i) for name, i, _ in walk(program) if i.opcode == "while"}
    return sum(count is None for count in found.values())


def cycles(program: Program) -> int:
    """The compiler's estimate for a step on one core: its estimate of each instruction, as often as it runs."""
    return sum(times * instruction.cycles for _, instruction, times in walk(program))


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective of a step, once. `mesh`: sizes of its axes, in the order in which the devices were laid out.

    A collective that runs beside other work is written several times (its start, the steps that were fused into that work, its
    end): copies share a channel, within one loop. An all-reduce in a fusion called all-reduce-scatter is a reduce-scatter.
    """
    found: dict[tuple, Collective] = {}
    for computation, instruction, times in walk(program, into_fusions=True):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        channel = instruction.attribute(r"channel_id=(\d+)")
        # One channel serves several ragged exchanges; they are never fused, so each is one.
        own = channel is None or kind == "ragged-all-to-all"
        key = (computation, instruction.name) if own else (kind, channel, times)
        if key in found:
            continue
        groups = device_groups(instruction, math.prod(mesh.values()))
        if groups.shape[1] < 2:
            continue
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        given = "".join(program.computations[computation][name].shape for name in instruction.operands)
        whole = max((arrays(instruction.shape), arrays(given)), key=lambda found: sum(size(*a) for a in found))
        if instruction.opcode.endswith("-start"):  # its result is a tuple of operands and results
            whole = max((arrays(given), arrays(instruction.shape)[len(arrays(given)):]), key=lambda f: sum(size(*a) for a in f))
        found[key] = Collective(kind, over(groups, mesh), times, sum(size(*a) for a in whole), groups.shape[1], whole,
                                instruction.op_name, any("dynamic-update-slice" in name for name in instruction.operands))
    return list(found.values())


def device_groups(instruction: Instruction, devices: int) -> np.ndarray:
    """groups_GxN: the devices that talk to each other, by their place in the mesh."""
    if pairs := instruction.attribute(r"source_target_pairs=\{(\{[^=]*?\}|)\}"):
        moves = np.array([[int(i) for i in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs)])
        moves = moves[moves[:, 0] != moves[:, 1]]
        return moves if len(moves) else np.zeros((1, 1), int)
    if named := instruction.attribute(r"(?:replica_groups|device_list)=(mesh\[[^\]]*\](?:, device_ids=\([^)]*\))? ?\{[^}]*\})"):
        sizes = {name: int(count) for name, count in re.findall(r"'([^']+)'=(\d+)", named)}
        order = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        inside = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", named.split("{")[1])]
        outside = [axis for axis in range(len(sizes)) if axis not in inside]
        return order.transpose(*outside, *inside).reshape(-1, math.prod(list(sizes.values())[axis] for axis in inside))
    if iota := instruction.attribute(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)"):
        shape, dims, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", iota).groups()
        ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
        return (ids.transpose(_numbers(order)) if order else ids).reshape(_numbers(shape))
    if listed := instruction.attribute(r"replica_groups=\{(\{[\d,{}]*\})\}"):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed)])
    return np.arange(devices)[None]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def over(groups_GxN: np.ndarray, mesh: Mapping[str, int]) -> str:
    """The mesh axes along which the devices of a group differ, joined by "+"."""
    places = np.stack(np.unravel_index(groups_GxN, tuple(mesh.values())))  # axes x G x N
    differs = (places != places[:, :, :1]).any(axis=(1, 2))
    return "+".join(name for name, moved in zip(mesh, differs) if moved)
