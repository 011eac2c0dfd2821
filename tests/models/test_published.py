"""`python -m omnax.models`: every published size with the published integers."""

import dataclasses
import subprocess
import sys

import pytest
from omnax.models import clip, dinov2, vit
from omnax.models.__main__ import main, parts
from omnax.models.published import count, describe
from omnax.models.qwen_vl import model as qwen_vl
from omnax.models.qwen_vl import qwen3
from omnax.models.systems import SYSTEMS

# One size of every form of network: parameters (of the published code: tests/parity, spec tables), operations.
EXACT = {
    "vit:B/16@384": (86_859_496, vit.config("B/16", image_size=384).num_forward_flops()),
    "vit:So400m/14@384": (428_225_600, None),
    # The cosine of the pair is one product of the common width more.
    "clip:B/32": (151_277_313, sum(clip.config("B/32").num_forward_flops()) + 2 * 512),
    "clip:EVA02-L/14": (427_755_457, sum(clip.config("EVA02-L/14").num_forward_flops()) + 2 * 768),
    "clip:SigLIP-B/16": (203_155_970, None),
    "dinov2:S/14": (22_056_576, dinov2.config("S/14").num_forward_flops(224)),
    "dinov2:g/14+registers": (1_136_486_912, dinov2.config("g/14", num_registers=4).num_forward_flops(224)),
    "dinov2:DINO-S/8": (21_670_272, dinov2.config_v1("S/8").num_forward_flops()),
    "qwen2_5_vl:7B": (8_292_166_656, None),
    "qwen3_vl:2B": (2_127_532_032, None),
    "qwen3_vl:30B-A3B": (31_070_754_032, None),
    "wav2lip:generator": (36_298_035, None),
    "wav2lip:expert": (16_435_072, None),
    "wav2lip:discriminator": (14_113_793, None),
    "s3fd:S3FD": (22_459_110, None),
    "mtcnn:P-Net": (6_632, None),
    "mtcnn:R-Net": (100_178, None),
    "mtcnn:O-Net": (389_040, None),
    "t5:flan-t5-xl": (2_849_757_184, None),
    "opt:2.7b": (2_651_596_800, None),
    "blip2:itm-g": (1_172_032_258, None),
    "blip2:flant5xl-L": (3_243_538_944, None),
}


@pytest.mark.parametrize("name", EXACT)
def test_parameters_and_operations_are_exact(name):
    system, _, size = name.partition(":")
    it = describe(SYSTEMS[system][size], scan=True)
    parameters, flops = EXACT[name]
    assert count(it.params) == sum(parts(it.params).values()) == sum(parts(it.params, 2).values()) == parameters
    resized = system == "dinov2" and "DINO" not in size  # positions of 518 pixels brought to 224: products too
    assert flops is None or it.flops == pytest.approx(flops, rel=2e-3 if resized else 0, abs=0)
    assert it.flops > 0


def test_no_size_of_a_table_is_left_out():
    assert {name.split("/")[0] for name in vit.PUBLISHED} == set(vit.SIZES)
    assert set(clip.PUBLISHED) == set(clip.SIZES)
    assert set(qwen_vl.PUBLISHED) == set(qwen_vl.SIZES) and set(qwen3.PUBLISHED) == set(qwen3.SIZES)
    backbones = {name for name in dinov2.PUBLISHED if not name.startswith("DINO")}
    assert backbones == {f"{size}/14{registers}" for size in "SBLg" for registers in ("", "+registers")}


def test_scanned_layers_count_as_unrolled_ones():
    """The table traces one layer for all; the two towers of CLIP, and windowed blocks, stay what they are."""
    for name in ("vit:Ti/16", "clip:EVA02-B/16", "dinov2:S/14+registers"):
        system, _, size = name.partition(":")
        scanned, unrolled = (describe(SYSTEMS[system][size], scan=scan) for scan in (True, False))
        assert parts(scanned.params) == parts(unrolled.params)
        assert scanned.flops == unrolled.flops


def test_qwen_blocks_see_windows():
    """Of a picture of 1024 patches, 28 of 32 blocks look at 64 of them."""
    full = dataclasses.replace(qwen_vl.config("3B").vision, full_blocks=tuple(range(32)))
    windowed = qwen_vl.config("3B", text={"depth": 1})
    modules = (qwen_vl.QwenVL(config) for config in (dataclasses.replace(windowed, vision=full), windowed))
    published = (dataclasses.replace(qwen_vl.PUBLISHED["3B"], build=lambda scan, m=module: m) for module in modules)
    wide, narrow = (describe(it).flops for it in published)
    assert wide - narrow == 28 * 2 * 2 * 1024 * (1024 - 64) * 1280


def test_a_line_per_size_where_there_is_no_terminal(capsys):
    assert main(["mtcnn"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [
        ["mtcnn:P-Net", "6632"],
        ["mtcnn:R-Net", "100178"],
        ["mtcnn:O-Net", "389040"],
    ]
    assert lines[0][3:] == ["mtcnn: pnet.lz4", "features=6434", "box=132", "face=66"]


def test_one_size_is_explained(capsys):
    assert main(["dinov2:s/14", "--shapes"]) == 0  # the case is free where it is clear
    out = capsys.readouterr().out
    assert "dinov2:S/14: Dinov2, fits facebook/dinov2-small" in out and "parameters: 22,056,576" in out
    assert "image float32[1,224,224,3]" in out and "config.num_heads = 6" in out
    assert "encoder/blocks_*/mlp/fc1/kernel" in out and "12 × [384, 1536]" in out
    assert main(["wav2lip:expert"]) == 0
    assert "14,080 numbers in batch_stats" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["vit:H/15"], "unknown size of vit 'H/15', did you mean 'H/14'?"),
        (["vit:g/15"], "unknown size of vit 'g/15'"),
        (["qwen"], "unknown system 'qwen', did you mean 'qwen3_vl'? (known: vit, clip, dinov2"),
        (["vit", "--shapes"], "--shapes needs one size, as vit:B/16"),
    ],
)
def test_unknown_names_are_one_line(arguments, message, capsys):
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("ValueError: ") and message in captured.err and captured.err.count("\n") == 1


def test_as_a_command():
    done = subprocess.run([sys.executable, "-m", "omnax.models", "s3fd"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("s3fd:S3FD\t22459110\t")
