"""FLOPs and collectives read off compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from mm_jax.parallel.hlo import analyse

TEXT = """HloModule step, is_scheduled=true

%fused (p0: bf16[8,64], p1: bf16[64,32]) -> f32[8,32] {
  %p0 = bf16[8,64]{1,0} parameter(0)
  %p1 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %conv = f32[8,32]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%body (arg: (s32[], bf16[8,64], bf16[64,32])) -> (s32[], bf16[8,64], bf16[64,32]) {
  %arg = (s32[], bf16[8,64]{1,0}, bf16[64,32]{1,0}) parameter(0)
  %x = bf16[8,64]{1,0} get-tuple-element(%arg), index=1
  %w = bf16[64,32]{1,0} get-tuple-element(%arg), index=2
  %part = bf16[16,32]{1,0} slice(%w), slice={[0:16], [0:32]}
  %start = (bf16[16,32]{1,0}, bf16[64,32]{1,0}) all-gather-start(%part), replica_groups=[1,4]<=[4], dimensions={0}
  %whole = bf16[64,32]{1,0} all-gather-done(%start)
  %y = f32[8,32]{1,0} fusion(%x, %whole), kind=kOutput, calls=%fused
  %z = f32[2,32]{1,0} reduce-scatter(%y), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%sum
  ROOT %out = (s32[], bf16[8,64]{1,0}, bf16[64,32]{1,0}) tuple(%i, %x, %w)
}

ENTRY %main (a: f32[4,6], b: f32[6,10]) -> f32[4,10] {
  %a = f32[4,6]{1,0} parameter(0)
  %b = f32[6,10]{1,0} parameter(1)
  %loop = (s32[], bf16[8,64]{1,0}, bf16[64,32]{1,0}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0"}}
  %k = f32[4,10]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/attention/splash_mha_fwd"}
  %all = f32[100]{0} all-reduce(%b), to_apply=%sum
  ROOT %dot = f32[4,10]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""  # noqa: E501


def test_a_program_by_literal_example():
    cost = analyse(TEXT)
    assert cost.flops == 2 * 4 * 10 * 6 + 3 * 2 * 8 * 32 * 64
    assert cost.collectives == {
        "all-gather": [3, 3 * 64 * 32 * 2],
        "reduce-scatter": [3, 3 * 8 * 32 * 4],
        "all-reduce": [1, 400],
    }
    assert cost.kernels == {"splash_mha_fwd": 1}


def test_a_collective_in_pieces_counts_once():
    again = "%more = f32[100]{0} all-reduce(%b), channel_id=7, to_apply=%sum"
    text = TEXT.replace("all-reduce(%b), to_apply", "all-reduce(%b), channel_id=7, to_apply")
    assert analyse(text.replace("  ROOT %dot", f"  {again}\n  ROOT %dot")).collectives["all-reduce"] == [
        1,
        400,
    ]
    other = again.replace("=7", "=8")
    assert analyse(text.replace("  ROOT %dot", f"  {other}\n  ROOT %dot")).collectives["all-reduce"] == [
        2,
        800,
    ]


def test_the_steps_of_a_ring_have_one_channel():
    one = "%one = f32[100]{0} collective-permute(%b), channel_id=1, source_target_pairs={{0,1},{1,0}}"
    two = one.replace("%one", "%two")
    found = analyse(TEXT.replace("  ROOT %dot", f"  {one}\n  {two}\n  ROOT %dot")).collectives
    assert found["collective-permute"] == [2, 800]


CONDITION = """
%cond (arg: (s32[], bf16[8,64], bf16[64,32])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %arg = (s32[], bf16[8,64]{1,0}, bf16[64,32]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT, backend_config={"flag_configs":[]}
}

ENTRY"""


@pytest.mark.parametrize("start, stride, trips", [(0, "", 7), (2, "", 5), (0, "2", 4), (0, "1 1", 4)])
def test_a_loop_of_which_only_the_condition_tells(start: int, stride: str, trips: int):
    first = (
        f"%zero = s32[] constant({start})\n  %init = (s32[], bf16[8,64], bf16[64,32]) tuple(%zero, %x, %w)\n"
    )
    text = TEXT.replace("ENTRY", CONDITION.lstrip(), 1).replace("%loop", f"{first}  %loop", 1)
    text = text.replace('"known_trip_count":{"n":"3"},', "")
    if stride:  # two rounds in one
        first, *second = stride.split()
        more = f"%by = s32[] constant({first})\n  %i = s32[] add(%old, %by)"
        if second:
            more = more.replace("%i =", "%half =") + "\n  %i = s32[] add(%half, %by)"
        text = text.replace("  ROOT %out", f"  {more}\n  ROOT %out", 1)
    assert analyse(text).flops == 2 * 4 * 10 * 6 + trips * 2 * 8 * 32 * 64


def test_a_convolution_counts_no_padding():
    """A product of batches as TPUs write it: 5 pairs of matrices, one window of 5 with padding 4 on both sides."""
    window = "window={size=5 pad=4_4 rhs_reversal=1}, dim_labels=0bf_0oi->0bf"
    text = f"""ENTRY %main (p: f32[5,7,3], q: f32[5,11,3]) -> f32[5,7,11] {{
  %p = f32[5,7,3]{{2,1,0}} parameter(0)
  %q = f32[5,11,3]{{2,1,0}} parameter(1)
  ROOT %c = f32[5,7,11]{{2,1,0}} convolution(%p, %q), {window}
}}
"""
    places = sum(0 <= o + k - 4 < 5 for o in range(5) for k in range(5))
    assert analyse(text).flops == 2 * 7 * 11 * 3 * places


@pytest.mark.parametrize("remat", [False, True])
def test_loops_count_as_often_as_they_run(remat):
    """Five products of 16 x 16 matrices in a scan, forward and backward, with and without doing them again."""

    def loss(weights, x):
        def layer(x, w):
            return jnp.sin(x @ w), None

        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((5, 16, 16)), jnp.ones((16, 16))).compile()
    product = 2 * 16**3
    # forward 5 and again 5; backward 5 for the weights and 5 for x (but nothing asks for that of the first x)
    expected = {5 * product * n for n in ((4,) if remat else (3,))}
    assert analyse(compiled.as_text()).flops in expected
