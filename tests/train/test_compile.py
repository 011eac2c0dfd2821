"""Compile-only: collectives, FLOPs and the command."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec
from omnax.kernels.flops import count_flops
from omnax.train.compile import Collective, find_collectives, main

HLO = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (x: f32[16]) -> f32[4] {
  %inner = f32[16]{0} all-reduce(%x), channel_id=7, to_apply=%add
  ROOT %slice = f32[4]{0} slice(%inner)
}

%async_collective_fusion.1 (x: bf16[4,4]) -> bf16[4,8] {
  ROOT %gathered = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, metadata={op_name="f" stack_frame_id=5}
}

%fused_computation.2 (x: bf16[4,4]) -> bf16[4,8] {
  ROOT %again = bf16[4,8]{1,0} all-gather(%x), channel_id=1, metadata={op_name="f" stack_frame_id=5}
}

%fused_computation.3 (x: f32[4]) -> f32[8] {
  ROOT %other = f32[8]{0} all-gather(%x), channel_id=1, metadata={op_name="f" stack_frame_id=6}
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %begun = bf16[4,8]{1,0} fusion(%x), kind=kLoop, calls=%async_collective_fusion.1
  %ended = bf16[4,8]{1,0} fusion(%begun), kind=kLoop, calls=%fused_computation.2
  %scattered = f32[4]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[], bf16[4,8]) tuple(%i, %gathered)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %loop = (s32[], bf16[4,8]{1,0}) while(%init), condition=%condition, body=%body
  %known = (s32[], f32[]) while(%start), condition=%other, body=%other, backend_config={"known_trip_count":{"n":"3"}}
  %both = (f32[8]{0}, /*index=1*/pred[16]{0}) all-reduce(%a, %b), channel_id=2, to_apply=%add
  %line = f32[8]{0} fusion(%y), kind=kLoop, calls=%fused_computation.3
  %sent = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%c), channel_id=1
  %sent2 = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%d), channel_id=1
  ROOT %received = f32[8]{0} collective-permute-done(%sent)
}

%other (p: (s32[], f32[])) -> (s32[], f32[]) {
  %shuffled = s4[16]{0} all-to-all(%z), channel_id=4
}
"""


def test_collectives_of_a_module_by_hand():
    """The gather runs 5 times (one channel and line, over two fusions), that of another line once; the second loop's
    computation 3 times as body, and as condition; a tuple's sizes add up, but for a "-start"."""
    assert find_collectives(HLO) == {
        "all-gather": Collective(6, 5 * 64 + 32),
        "all-reduce": Collective(1, 32 + 16),
        "all-to-all": Collective(6, 6 * 8),
        "collective-permute": Collective(2, 2 * 32),
        "reduce-scatter": Collective(5, 5 * 64),
    }


def test_flops_of_products_convolutions_and_loops():
    """[4,6]·[6,5] twice in a scan of 3; a 3x3 convolution 2 -> 7 channels on 8x8; one of two branches; no dead code;
    a product on every device of a shard_map."""

    def f(x, w, image, kernel):
        x, _ = jax.lax.scan(lambda x, _: (x @ w @ w.T, None), x, None, length=3)
        convolve = jax.checkpoint(lambda i: jax.lax.conv_general_dilated(i, kernel, (1, 1), "SAME"))
        square = jax.lax.platform_dependent(x, cpu=lambda x: x.T @ x, default=lambda x: x.T @ x)
        _ = w @ w.T
        return square.sum() + convolve(image).sum()

    shapes = [(4, 6), (6, 5), (1, 2, 8, 8), (7, 2, 3, 3)]
    jaxpr = jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    assert count_flops(jaxpr.jaxpr) == 3 * 2 * (2 * 4 * 6 * 5) + 2 * 6 * 4 * 6 + 2 * 64 * 7 * 2 * 9
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding=[(1, 1)] * 2, lhs_dilation=(2, 2)
    )
    jaxpr = jax.make_jaxpr(convolve)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes[2:]))
    assert count_flops(jaxpr.jaxpr) == 2 * 15 * 15 * 7 * 2 * 9 // 4  # nothing for the inserted zeros
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    specs = {"in_specs": (rows, everywhere), "out_specs": rows, "axis_names": {"data"}}
    spread = jax.shard_map(lambda x, w: x @ w, mesh=mesh, **specs)  # [2,6]·[6,5] on two devices
    jaxpr = jax.make_jaxpr(spread)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes[:2]))
    assert count_flops(jaxpr.jaxpr) == 2 * 4 * 6 * 5


def test_command(capsys):
    arguments = ["--config", "configs/vit.py", "--devices", "8", "--config.model.depth=1", "--config.mesh.fsdp=4"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "memory per chip: 0.0" in out and "8 × cpu, mesh data 2 × fsdp 4" in out
    assert "all-reduce" in out and "of the model" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.mesh.fsdp=3"], "mesh {'data': -1, 'fsdp': 3, 'tensor': 1, 'context': 1, 'expert': 1} does not fit"),
        (["--config.optimizer.lrr=3"], "unknown config key 'optimizer.lrr', did you mean 'optimizer.lr'"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert main(["--config", "configs/vit.py", "--devices", "8", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ValueError: ") and message in error and error.count("\n") == 1
