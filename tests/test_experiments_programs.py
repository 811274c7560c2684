"""What is read from the text of a compiled program: loops, branches, products, factorisations, what is sent."""

import jax
import jax.numpy as jnp
import pytest
from collectives import Program

TEXT = """
HloModule step, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

%body (state: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %state = (s32[], f32[8,8]{1,0}) parameter(0)
  %matrix = f32[8,8]{1,0} get-tuple-element(%state), index=1
  %factor = (f32[8,8]{0,1}, s32[]) custom-call(%matrix), custom_call_target="lapack_spotrf_ffi"
  %product = f32[8,8]{1,0} dot(%matrix, %matrix), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %next = (s32[], f32[8,8]{1,0}) tuple(%matrix, %product)
}

%condition (state: (s32[], f32[8,8])) -> pred[] {
  ROOT %go = pred[] constant(true)
}

%due (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %start = (s32[], f32[8,8]{1,0}) tuple(%x, %x)
  %loop = (s32[], f32[8,8]) while(%start), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %gathered = f32[4,8]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

%idle (x: f32[4,8]) -> f32[4,8] {
  ROOT %x = f32[4,8]{1,0} parameter(0)
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %summed = (f32[4,8]{1,0}, f32[2]{0}) all-reduce(%x, %y), channel_id=2, to_apply=%add
  ROOT %end = f32[4,8]{1,0} conditional(%when, %x, %x), branch_computations={%due, %idle}
}
"""


def test_a_loop_counts_as_often_as_it_runs_and_a_branch_if_it_is_asked_for():
    due, idle = Program(TEXT, 4), Program(TEXT, 4, dearest=False)
    assert due.flops() == pytest.approx(3 * (8**3 / 3 + 2 * 8**3)) and idle.flops() == 0
    assert due.solves() == {8: 3}
    summed, gathered = 2 * 3 / 4 * 4 * (32 + 2), 3 / 4 * 4 * 32
    assert due.bytes_sent() == summed + gathered and idle.bytes_sent() == summed
    assert [(each.what, each.shape) for each in due.sent()] == [("all-reduce", "f32[4,8]"), ("all-gather", "f32[4,8]")]


def test_a_collective_in_a_loop_that_solves_is_told():
    assert not Program(TEXT, 4).solves_while_it_sends()
    inside = TEXT.replace(
        "%product = f32[8,8]{1,0} dot(", "%more = f32[8,8]{1,0} all-gather(%matrix)\n  %product = f32[8,8]{1,0} dot("
    )
    assert Program(inside, 4).solves_while_it_sends()


def test_a_program_that_was_compiled_is_read():
    compiled = jax.jit(lambda x, y: jnp.linalg.cholesky(x) @ y).lower(jnp.eye(6), jnp.ones((6, 5))).compile()
    program = Program(compiled.as_text(), 1)
    assert program.flops() == pytest.approx(6**3 / 3 + 2 * 6 * 6 * 5) and program.sent() == []
    images, kernel = jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 4))
    layout = ("NHWC", "HWIO", "NHWC")
    convolved = jax.jit(lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout))
    text = convolved.lower(images, kernel).compile().as_text()
    assert Program(text, 1).flops() == 2 * (2 * 6 * 6 * 4) * (3 * 3 * 3)
