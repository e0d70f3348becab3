"""The bytes and the collectives of a compiled program, of a text whose figures can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from cfd.benchmark import hlo

# 1,024 float32 values are 4,096 bytes in main memory; S(1) is vector memory, which is not counted.
PROGRAM = """HloModule jit_f

%scaled (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0:T(256)} parameter(0)
  ROOT %m = f32[1024]{0:T(256)} multiply(%p, %p)
}

%row (p.1: f32[10,1024], i: s32[]) -> f32[1,1024] {
  %p.1 = f32[10,1024]{1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = f32[1,1024]{1,0:T(1,128)} dynamic-slice(%p.1, %i), dynamic_slice_sizes={1,1024}
}

%body (t: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %t = (s32[], f32[1024]{0:T(256)}) parameter(0)
  %g = f32[1024]{0:T(256)} get-tuple-element(%t), index=1
  %n = s32[]{:T(128)S(1)} get-tuple-element(%t), index=0
  %f = f32[1024]{0:T(256)} fusion(%g), kind=kLoop, calls=%scaled
  ROOT %r = (s32[], f32[1024]{0:T(256)}) tuple(%n, %f)
}

%condition (t.1: (s32[], f32[1024])) -> pred[] {
  %t.1 = (s32[], f32[1024]{0:T(256)}) parameter(0)
  %n.1 = s32[]{:T(128)S(1)} get-tuple-element(%t.1), index=0
  %c = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%n.1, %c), direction=LT
}

ENTRY %main (x: f32[1024], y: f32[10,1024], j: s32[]) -> f32[1024] {
  %x = f32[1024]{0:T(256)} parameter(0)
  %y = f32[10,1024]{1,0:T(8,128)} parameter(1)
  %j = s32[]{:T(128)S(1)} parameter(2)
  %a = f32[1024]{0:T(256)S(1)} fusion(%x), kind=kLoop, calls=%scaled
  %b = f32[1,1024]{1,0:T(1,128)S(1)} fusion(%y, %j), kind=kLoop, calls=%row
  %s = (f32[1024]{0:T(256)}, f32[1024]{0:T(256)S(1)}, u32[]{:T(128)S(1)}) copy-start(%x)
  %w = (s32[], f32[1024]{0:T(256)}) while(%u), condition=%condition, body=%body
  %e = f32[1024]{0:T(256)S(1)} copy-done(%s)
  %q = bf16[1024]{0:T(256)S(1)} all-gather-start(%a), dimensions={0}
  %h = f32[1024]{0:T(256)S(1)} fusion(%e), kind=kLoop, calls=%scaled
  %k = bf16[1024]{0:T(256)S(1)} all-gather-done(%q)
  ROOT %z = f32[1024]{0:T(256)S(1)} all-reduce(%h), to_apply=%sum
}
"""


def test_bytes_are_those_of_main_memory_in_every_iteration() -> None:
    """One read by %a, one row of %y, one copy, and 7 iterations that read and write 4,096 bytes each."""
    assert hlo.main_memory_bytes(hlo.parse(PROGRAM)) == 3 * 4096 + 7 * 2 * 4096


# A copy of a row of %x to %y and to vector memory: the row is read once, and written to main memory once.
ROWS = """HloModule jit_f

%copy_row (p: f32[10,1024], q: f32[10,1024], i: s32[]) -> (f32[10,1024], f32[1,1024]) {
  %p = f32[10,1024]{1,0:T(8,128)} parameter(0)
  %q = f32[10,1024]{1,0:T(8,128)} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,1024]{1,0:T(1,128)} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,1024}
  %u = f32[10,1024]{1,0:T(8,128)} dynamic-update-slice(%q, %row, %i, %zero)
  ROOT %t = (f32[10,1024]{1,0:T(8,128)}, f32[1,1024]{1,0:T(1,128)S(1)}) tuple(%u, %row)
}

ENTRY %main (x: f32[10,1024], y: f32[10,1024], j: s32[]) -> f32[10,1024] {
  %x = f32[10,1024]{1,0:T(8,128)} parameter(0)
  %y = f32[10,1024]{1,0:T(8,128)} parameter(1)
  %j = s32[]{:T(128)S(6)} parameter(2)
  %f = (f32[10,1024]{1,0:T(8,128)}, f32[1,1024]{1,0:T(1,128)S(1)}) fusion(%x, %y, %j), kind=kLoop, calls=%copy_row
  ROOT %z = f32[10,1024]{1,0:T(8,128)} get-tuple-element(%f), index=0
}
"""


def test_an_array_that_is_updated_in_place_is_written_only_where_it_changes() -> None:
    assert hlo.main_memory_bytes(hlo.parse(ROWS)) == 2 * 4096


# %row and %update are fusions within fusions, as in the loops of attention.
NESTED = """HloModule jit_f

%row (p.1: f32[10,1024], i.1: s32[]) -> f32[1,1024] {
  %p.1 = f32[10,1024]{1,0:T(8,128)} parameter(0)
  %i.1 = s32[] parameter(1)
  %v.1 = f32[10,1024]{1,0:T(8,128)} bitcast(%p.1)
  ROOT %d.1 = f32[1,1024]{1,0:T(1,128)} dynamic-slice(%v.1, %i.1), dynamic_slice_sizes={1,1024}
}

%update (p.2: f32[10,1024], r.2: f32[1,1024], i.2: s32[]) -> f32[10,1024] {
  %p.2 = f32[10,1024]{1,0:T(8,128)} parameter(0)
  %r.2 = f32[1,1024]{1,0:T(1,128)} parameter(1)
  %i.2 = s32[] parameter(2)
  ROOT %u.2 = f32[10,1024]{1,0:T(8,128)} dynamic-update-slice(%p.2, %r.2, %i.2)
}

%outer (p.3: f32[10,1024], q.3: f32[10,1024], i.3: s32[]) -> f32[10,1024] {
  %p.3 = f32[10,1024]{1,0:T(8,128)} parameter(0)
  %q.3 = f32[10,1024]{1,0:T(8,128)} parameter(1)
  %i.3 = s32[] parameter(2)
  %f.3 = f32[1,1024]{1,0:T(1,128)} fusion(%p.3, %i.3), kind=kLoop, calls=%row
  %n.3 = f32[1,1024]{1,0:T(1,128)} negate(%f.3)
  %g.3 = f32[10,1024]{1,0:T(8,128)} fusion(%q.3, %n.3, %i.3), kind=kLoop, calls=%update
  ROOT %b.3 = f32[10,1024]{1,0:T(8,128)} bitcast(%g.3)
}

%filled (p.4: f32[1,1024], i.4: s32[]) -> f32[10,1024] {
  %p.4 = f32[1,1024]{1,0:T(1,128)} parameter(0)
  %i.4 = s32[] parameter(1)
  %c.4 = f32[] constant(0)
  %z.4 = f32[10,1024]{1,0:T(8,128)} broadcast(%c.4), dimensions={}
  ROOT %u.4 = f32[10,1024]{1,0:T(8,128)} dynamic-update-slice(%z.4, %p.4, %i.4)
}

ENTRY %main (x: f32[10,1024], y: f32[10,1024], j: s32[]) -> f32[10,1024] {
  %x = f32[10,1024]{1,0:T(8,128)} parameter(0)
  %y = f32[10,1024]{1,0:T(8,128)} parameter(1)
  %j = s32[]{:T(128)S(6)} parameter(2)
  LINE
}
"""


@pytest.mark.parametrize(
    "line, expected",
    [
        ("ROOT %z = f32[10,1024]{1,0:T(8,128)} fusion(%x, %y, %j), kind=kLoop, calls=%outer", 4096 + 4096),
        ("ROOT %z = f32[1,1024]{1,0:T(1,128)S(1)} fusion(%x, %j), kind=kLoop, calls=%row", 4096),
        ("ROOT %z = f32[1,1024]{1,0:T(1,128)S(1)} dynamic-slice(%x, %j), dynamic_slice_sizes={1,1024}", 4096),
        ("ROOT %z = f32[1,1024]{1,0:T(1,128)} slice(%x), slice={[0:1], [0:1024]}", 2 * 4096),
        ("ROOT %z = f32[16,1024]{1,0:T(8,128)} add(%x, %x)", 2 * 4 * 16 * 1024),  # one array, read once
        ("ROOT %z = f32[10,1024]{1,0:T(8,128)} fusion(%r, %j), kind=kLoop, calls=%filled", 4 * 16 * 1024),  # from 0
    ],
)
def test_of_a_slice_only_its_own_bytes_count(line: str, expected: int) -> None:
    """10 rows are stored as 16."""
    assert hlo.main_memory_bytes(hlo.parse(NESTED.replace("LINE", line))) == expected


def test_collectives_have_kinds_bytes_and_whether_the_chip_computes_meanwhile() -> None:
    found = hlo.collectives(hlo.parse(PROGRAM))
    assert found == [hlo.Collective("all-gather", 2048, True), hlo.Collective("all-reduce", 4096, False)]
    assert hlo.summary(found) == "1 all-gather (2.05e-06 GB, 100% overlapped), 1 all-reduce (4.1e-06 GB, 0% overlapped)"
    assert hlo.summary([]) == "none"


# Two gathers in steps that are fused with computation or not, two reduce-scatters, and two sums between slices.
EXCHANGES = """HloModule jit_g

%start.1 (p.1: bf16[256]) -> bf16[1024] {
  %g.1 = bf16[1024]{0:T(1024)} all-gather(%p.1), channel_id=5, frontend_attributes={chain_id="1"}
}

%async_collective_fusion.1 (p.2: f32[1024]) -> f32[1024] {
  %p.2 = f32[1024]{0:T(256)} parameter(0)
  ROOT %m.2 = f32[1024]{0:T(256)} multiply(%p.2, %p.2)
  %g.2 = bf16[1024]{0:T(1024)} all-gather(%q.2), channel_id=5, frontend_attributes={chain_id="1"}
}

%done.1 (p.3: bf16[256]) -> bf16[1024] {
  %g.3 = bf16[1024]{0:T(1024)} all-gather(%p.3), channel_id=5, frontend_attributes={chain_id="1"}
}

%start.2 (p.4: bf16[512]) -> bf16[2048] {
  %g.4 = bf16[2048]{0:T(1024)} all-gather(%p.4), channel_id=6, frontend_attributes={chain_id="2"}
}

%done.2 (p.5: bf16[512]) -> bf16[2048] {
  %g.5 = bf16[2048]{0:T(1024)} all-gather(%p.5), channel_id=6, frontend_attributes={chain_id="2"}
}

%all-reduce-scatter (p.6: f32[1024]) -> f32[256] {
  %r.6 = f32[1024]{0:T(256)} all-reduce(%p.6), to_apply=%sum
  ROOT %s.6 = f32[256]{0:T(256)} dynamic-slice(%r.6, %i.6), dynamic_slice_sizes={256}
}

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0:T(256)} parameter(0)
  %send.1 = (f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%x, %t), SLICES_A
  %f = f32[1024]{0:T(256)} fusion(%x), kind=kLoop, calls=%async_collective_fusion.1
  %send-done.1 = token[] send-done(%send.1), channel_id=1
  %r = f32[256]{0:T(256)} reduce-scatter(%f), dimensions={0}, to_apply=%sum
  %send.2 = (f32[16,128]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%f, %t), SLICES_B
  %recv.2 = (f32[16,128]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%t), SLICES_B
  %recv-done.2 = (f32[16,128]{1,0:T(8,128)}, token[]) recv-done(%recv.2), channel_id=4
  %recv.1 = (f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%t), SLICES_A
  ROOT %recv-done.1 = (f32[8,128]{1,0:T(8,128)}, token[]) recv-done(%recv.1), channel_id=2
}
"""
SUM = 'frontend_attributes={_xla_host_transfer_rendezvous="sum_%s",_xla_megascale_transfer_type="ALL_REDUCE"}'
EXCHANGES = EXCHANGES.replace("SLICES_A", SUM % "A").replace("SLICES_B", SUM % "B")


def test_collectives_in_steps_and_between_slices_count_once_each() -> None:
    """The first gather is computed beside one step, the first sum beside %f, and the others beside nothing."""
    between = "all-reduce between slices"
    found = hlo.collectives(hlo.parse(EXCHANGES))
    assert found == [
        hlo.Collective("all-gather", 2048, True),
        hlo.Collective("all-gather", 4096, False),
        hlo.Collective("reduce-scatter", 4096, False),
        hlo.Collective(between, 4096, True),
        hlo.Collective("reduce-scatter", 4096, False),
        hlo.Collective(between, 8192, False),
    ]
    assert "2 all-gather (6.14e-06 GB, 33% overlapped)" in hlo.summary(found)


def test_a_transfer_between_slices_reads_what_it_sends_and_writes_what_it_receives() -> None:
    """Two arrays of 4,096 and 8,192 bytes each way. The fusion moves 2 * 4,096, and the scatter 4,096 + 1,024."""
    assert hlo.main_memory_bytes(hlo.parse(EXCHANGES)) == 2 * (4096 + 8192) + 2 * 4096 + 4096 + 1024


@pytest.mark.parametrize(
    "shape, expected",
    [
        ("f32[3,5]", 4 * 3 * 5),  # no layout
        ("f32[]{:T(128)}", 4),
        ("f32[3,100]{1,0:T(8,128)}", 4 * 8 * 128),
        ("f32[3,100]{0,1:T(8,128)}", 4 * 128 * 104),  # axis 0 is the fastest
        ("bf16[6,32,1024,64]{3,0,2,1:T(8,128)(2,1)}", 2 * 8 * 32 * 1024 * 128),
        ("(f32[200]{0:T(256)}, f32[9]{0:T(256)S(1)}, token[])", 4 * 256),
    ],
)
def test_tiles_are_stored_whole(shape: str, expected: int) -> None:
    assert hlo.size(shape) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_program_for_this_machine_is_read_too(dtype: str) -> None:
    """One elementwise function reads its argument and writes its result, on every platform."""
    x = jax.ShapeDtypeStruct((1024,), dtype)
    text = jax.jit(lambda x: -x).lower(x).compile().as_text()
    assert text and hlo.main_memory_bytes(hlo.parse(text)) == 2 * 1024 * jnp.dtype(dtype).itemsize
