"""The bytes and the collectives of a compiled program, of a text whose figures can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from cfd.benchmark import hlo

# 1,000 float32 values are 4,000 bytes in main memory; S(1) is vector memory, which is not counted.
PROGRAM = """HloModule jit_f

%scaled (p: f32[1000]) -> f32[1000] {
  %p = f32[1000]{0:T(256)} parameter(0)
  ROOT %m = f32[1000]{0:T(256)} multiply(%p, %p)
}

%row (p.1: f32[10,1000], i: s32[]) -> f32[1,1000] {
  %p.1 = f32[10,1000]{1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = f32[1,1000]{1,0:T(8,128)} dynamic-slice(%p.1, %i), dynamic_slice_sizes={1,1000}
}

%body (t: (s32[], f32[1000])) -> (s32[], f32[1000]) {
  %t = (s32[], f32[1000]{0:T(256)}) parameter(0)
  %g = f32[1000]{0:T(256)} get-tuple-element(%t), index=1
  %n = s32[]{:T(128)S(1)} get-tuple-element(%t), index=0
  %f = f32[1000]{0:T(256)} fusion(%g), kind=kLoop, calls=%scaled
  ROOT %r = (s32[], f32[1000]{0:T(256)}) tuple(%n, %f)
}

%condition (t.1: (s32[], f32[1000])) -> pred[] {
  %t.1 = (s32[], f32[1000]{0:T(256)}) parameter(0)
  %n.1 = s32[]{:T(128)S(1)} get-tuple-element(%t.1), index=0
  %c = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%n.1, %c), direction=LT
}

ENTRY %main (x: f32[1000], y: f32[10,1000], j: s32[]) -> f32[1000] {
  %x = f32[1000]{0:T(256)} parameter(0)
  %y = f32[10,1000]{1,0:T(8,128)} parameter(1)
  %j = s32[]{:T(128)S(1)} parameter(2)
  %a = f32[1000]{0:T(256)S(1)} fusion(%x), kind=kLoop, calls=%scaled
  %b = f32[1,1000]{1,0:T(8,128)S(1)} fusion(%y, %j), kind=kLoop, calls=%row
  %s = (f32[1000]{0:T(256)}, f32[1000]{0:T(256)S(1)}, u32[]{:T(128)S(1)}) copy-start(%x)
  %w = (s32[], f32[1000]{0:T(256)}) while(%u), condition=%condition, body=%body
  %e = f32[1000]{0:T(256)S(1)} copy-done(%s)
  %q = bf16[1000]{0:T(256)S(1)} all-gather-start(%a), dimensions={0}
  %h = f32[1000]{0:T(256)S(1)} fusion(%e), kind=kLoop, calls=%scaled
  %k = bf16[1000]{0:T(256)S(1)} all-gather-done(%q)
  ROOT %z = f32[1000]{0:T(256)S(1)} all-reduce(%h), to_apply=%sum
}
"""


def test_bytes_are_those_of_main_memory_in_every_iteration() -> None:
    """One read by %a, one row of %y, one copy, and 7 iterations that read and write 4,000 bytes each."""
    assert hlo.main_memory_bytes(hlo.parse(PROGRAM)) == 4000 + 4000 + 4000 + 7 * 8000


def test_collectives_have_kinds_bytes_and_whether_the_chip_computes_meanwhile() -> None:
    found = hlo.collectives(hlo.parse(PROGRAM))
    assert found == [hlo.Collective("all-gather", 2000, True), hlo.Collective("all-reduce", 4000, False)]
    assert hlo.summary(found) == "1 all-gather (2e-06 GB, 1 overlapped), 1 all-reduce (4e-06 GB, 0 overlapped)"
    assert hlo.summary([]) == "none"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_program_for_this_machine_is_read_too(dtype: str) -> None:
    """One elementwise function reads its argument and writes its result, on every platform."""
    x = jax.ShapeDtypeStruct((1000,), dtype)
    text = jax.jit(lambda x: -x).lower(x).compile().as_text()
    assert text and hlo.main_memory_bytes(hlo.parse(text)) == 2 * 1000 * jnp.dtype(dtype).itemsize
