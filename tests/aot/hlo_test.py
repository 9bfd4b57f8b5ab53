"""What is read from the text of a compiled program: small programs written by hand, in the forms that libtpu writes."""

import numpy as np
import pytest

from research.aot import hlo

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%fused (p0: bf16[8,4], p1: bf16[32,4]) -> bf16[32,4] {
  %p0 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[32,4]{1,0} parameter(1)
  ROOT %all-gather.2 = bf16[32,4]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=7, replica_groups=[2,2]<=[2,2]T(1,0)
}

%all-reduce-scatter.1 (input: f32[32,4]) -> f32[8,4] {
  %input = f32[32,4]{1,0} parameter(0)
  %all-reduce.9 = f32[32,4]{1,0} all-reduce(%input), channel_id=9, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %slice = f32[8,4]{1,0} dynamic-slice(%all-reduce.9)
}

%inner_condition (t1: (s32[], bf16[8,4])) -> pred[] {
  %limit1 = s32[]{:T(128)} constant(5)
  %t1 = (s32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %i1 = s32[]{:T(128)} get-tuple-element(%t1), index=0
  ROOT %lt1 = pred[]{:T(512)} compare(%i1, %limit1), direction=LT
}

%inner (t2: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %t2 = (s32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %i2 = s32[]{:T(128)} get-tuple-element(%t2), index=0
  %x2 = bf16[8,4]{1,0} get-tuple-element(%t2), index=1
  %two = s32[]{:T(128)} constant(2)
  %next2 = s32[]{:T(128)} add(%i2, %two)
  %work = bf16[8,4]{1,0} copy(%x2), metadata={op_name="jit(step)/inner/copy"}, INNER
  ROOT %out2 = (s32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%next2, %work)
}

%condition (t3: (s32[], bf16[8,4])) -> pred[] {
  %limit3 = s32[]{:T(128)} constant(12)
  %t3 = (s32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %i3 = s32[]{:T(128)} get-tuple-element(%t3), index=0
  ROOT %lt3 = pred[]{:T(512)} compare(%i3, %limit3), direction=LT
}

%body (t4: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %t4 = (s32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %i4 = s32[]{:T(128)} get-tuple-element(%t4), index=0
  %x4 = bf16[8,4]{1,0} get-tuple-element(%t4), index=1
  %one = s32[]{:T(128)} constant(1)
  %next4 = s32[]{:T(128)} add(%i4, %one)
  %full = bf16[32,4]{1,0} fusion(%x4, %x4), kind=kOutput, calls=%fused, OUTER
  %again = bf16[32,4]{1,0} fusion(%x4, %full), kind=kOutput, calls=%fused, OUTER
  %zero4 = s32[]{:T(128)} constant(0)
  %start4 = s32[]{:T(128)} copy(%zero4)
  %carry4 = (s32[]{:T(128)}, /*index=1*/bf16[8,4]{1,0}) tuple(%start4, %x4)
  %loop4 = (s32[]{:T(128)}, bf16[8,4]{1,0}) while(%carry4), condition=%inner_condition, body=%inner
  %y4 = bf16[8,4]{1,0} get-tuple-element(%loop4), index=1
  ROOT %out4 = (s32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%next4, %y4)
}

ENTRY %main (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %two.5 = s32[]{:T(128)} constant(2)
  %carry = (s32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%two.5, %p)
  %loop = (s32[]{:T(128)}, bf16[8,4]{1,0}) while(%carry), condition=%condition, body=%body
  %grads = f32[32,4]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %mine = f32[8,4]{1,0} fusion(%grads), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %y = bf16[8,4]{1,0} get-tuple-element(%loop), index=1
}
""".replace("INNER", CYCLES % 3).replace("OUTER", CYCLES % 100)
MESH = {"data": 1, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def program():
    return hlo.parse(PROGRAM)


def test_loops_are_counted_from_their_start_in_their_steps(program):
    counts = {i.name: hlo.trip_count(program, where, i) for where, i, _ in hlo.walk(program) if i.opcode == "while"}
    assert counts == {"loop": 10, "loop4": 3}  # from 2 to 12 by one; from 0 to 5 by two


def test_cycles_are_multiplied_by_both_loops(program):
    assert hlo.cycles(program) == 10 * (100 + 100) + 10 * 3 * 3


HIDDEN = {  # of the inner loop: where it begins, by how much it grows, how it ends
    "start": ("%start4 = s32[]{:T(128)} copy(%zero4)", "%start4 = s32[]{:T(128)} get-tuple-element(%t4), index=0"),
    "step": ("%two = s32[]{:T(128)} constant(2)", "%two = s32[]{:T(128)} get-tuple-element(%t2), index=0"),
    "end": ("%limit1 = s32[]{:T(128)} constant(5)", "%limit1 = s32[]{:T(128)} get-tuple-element(%t1), index=0"),
    "comparison": ("compare(%i1, %limit1), direction=LT", "compare(%i1, %limit1), direction=NE"),
}


@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_loop_that_does_not_say_its_length_is_counted_once_and_told(hidden, program):
    assert hlo.unknown_loops(program) == 0 and PROGRAM.count(HIDDEN[hidden][0]) == 1
    other = hlo.parse(PROGRAM.replace(*HIDDEN[hidden]))
    assert hlo.unknown_loops(other) == 1  # once, though the loop around it runs ten times
    assert hlo.cycles(other) == 10 * (100 + 100) + 10 * 1 * 3


def test_what_the_compiler_has_no_idea_of_has_no_cycles():
    """As it writes scatters on v5p's sparse cores."""
    text = PROGRAM.replace('"estimated_cycles":"100"', f'"estimated_cycles":"{2**63 - 1}"')
    found = hlo.parse(text)
    assert hlo.cycles(found) == 10 * 3 * 3 and found.computations["body"]["full"].is_beyond_it
    assert not found.computations["inner"]["work"].is_beyond_it and not found.computations["body"]["out4"].is_beyond_it


def test_a_trip_count_that_is_written_down_is_taken():
    text = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"4"}}')
    assert hlo.cycles(hlo.parse(text)) == 4 * (100 + 100) + 4 * 3 * 3


def test_copies_of_a_collective_count_once_and_reductions_have_their_name(program):
    gather, scatter = hlo.collectives(program, MESH)
    assert (gather.kind, gather.axis, gather.times, gather.bytes, gather.group) == ("all-gather", "fsdp", 10, 32 * 4 * 2, 2)
    assert (scatter.kind, scatter.axis, scatter.times, scatter.bytes) == ("reduce-scatter", "tensor", 1, 32 * 4 * 4)
    assert scatter.arrays == (("f32", (32, 4)),)


GROUPS = {
    "replica_groups={{0,1},{2,3},{4,5},{6,7}}": "tensor",
    "replica_groups={}": "data+fsdp+tensor",
    "replica_groups=[4,2]<=[8]": "tensor",
    "replica_groups=[2,4]<=[8]": "fsdp+tensor",
    "replica_groups=[4,2]<=[2,2,2]T(0,2,1)": "fsdp",
    "replica_groups=[4,2]<=[2,4]T(1,0)": "data",
    "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}": "tensor",
    "replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','tensor'}": "data+tensor",
    "source_target_pairs={{0,4},{4,0},{1,5},{5,1}}": "data",
    "source_target_pairs={{0,0},{1,2},{2,1},{3,3}}": "fsdp+tensor",
}


@pytest.mark.parametrize("attribute", GROUPS)
def test_axes_of_groups(attribute):
    instruction = hlo.Instruction("x", "all-reduce", "f32[8]", f"(%y), channel_id=1, {attribute}, to_apply=%add", False)
    groups = hlo.device_groups(instruction, 8)
    assert hlo.over(groups, {"data": 2, "fsdp": 2, "tensor": 2}) == GROUPS[attribute]
    assert groups.ndim == 2 and np.issubdtype(groups.dtype, np.integer)


def test_a_sum_of_what_each_device_fills_in_is_told_apart():
    name = "%dynamic-update-slice.1"
    text = PROGRAM.replace("%input = ", f"{name} = ").replace("all-reduce(%input)", f"all-reduce({name})")
    assert [one.padded for one in hlo.collectives(hlo.parse(text), MESH)] == [False, True]
    assert [one.padded for one in hlo.collectives(hlo.parse(PROGRAM), MESH)] == [False, False]


def test_a_collective_of_one_device_is_none():
    text = PROGRAM.replace("replica_groups={{0,1},{2,3}}", "replica_groups={{0},{1},{2},{3}}")
    assert [one.kind for one in hlo.collectives(hlo.parse(text), MESH)] == ["all-gather"]


def test_starts_count_what_they_gather_once():
    """An asynchronous start gives a tuple of what goes in and what comes out."""
    start = ("ROOT %all-gather.2 = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%p0), channel_id=7, "
             "replica_groups={{0,1,2,3}}")
    lines = [start if "all-gather.2" in line else line for line in PROGRAM.splitlines()]
    text = "\n".join(("  " + line if line is start else line) for line in lines)
    assert hlo.collectives(hlo.parse(text), MESH)[0].bytes == 32 * 4 * 2


def test_what_the_sparse_cores_gather_is_seen():
    """As the compiler writes tpu7x's collectives: a computation of their own, begun by a call-start."""
    gather = "all-gather(%x), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}"
    text = f"""%called_computation.4 (x: bf16[8,4], y: token[]) -> bf16[32,4] {{
  %y = token[] parameter(1)
  %x = bf16[8,4]{{1,0}} parameter(0)
  ROOT %all-gather.165 = bf16[32,4]{{1,0}} {gather}
}}, execution_thread="sparsecore"

ENTRY %main (p: bf16[8,4]) -> bf16[32,4] {{
  %p = bf16[8,4]{{1,0}} parameter(0)
  %ready = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  %start = ((bf16[8,4]{{1,0}}, token[]), bf16[32,4]{{1,0}}) call-start(%p, %ready), async_execution_thread="sparsecore", \
to_apply=%called_computation.4
  ROOT %done = bf16[32,4]{{1,0}} call-done(%start)
}}
"""
    found, = hlo.collectives(hlo.parse(text), MESH)
    assert (found.kind, found.times, found.bytes, found.group) == ("all-gather", 1, 32 * 4 * 2, 4)


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule nothing")


@pytest.mark.parametrize("dtype, bytes_", [("bf16", 2), ("f32", 4), ("pred", 1), ("s8", 1), ("u16", 2), ("f8e4m3fn", 1)])
def test_bytes(dtype, bytes_):
    assert hlo.size(dtype, (3, 5)) == 15 * bytes_
