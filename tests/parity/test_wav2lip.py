"""Wav2Lip's networks against a torch restatement of the published layers, through files under the published names."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from omnax import hub
from omnax.hub.families import wav2lip as formats
from omnax.models.wav2lip import Generator, SyncNet, Wav2LipConfig, initial_values, num_forward_flops, stack_frames
from oracles import torch
from references import wav2lip as reference

TOLERANCE = 1e-5  # reached in training mode: 6e-6, as batch statistics of maps of 1 x 1 pixel amplify rounding
NETWORKS = {"generator": reference.Wav2Lip, "expert": reference.SyncNet, "discriminator": reference.Discriminator}
# name -> state dict keys, parameters, batch statistics (spec wav2lip.md 2.6)
PUBLISHED = {
    "generator": (352, 36_298_035, 22_752),
    "expert": (217, 16_435_072, 14_080),
    "discriminator": (28, 14_113_793, 0),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """name -> (torch network, path of its published file)."""
    torch.manual_seed(0)
    folder, made = tmp_path_factory.mktemp("published"), {}
    for seed, (name, network) in enumerate(NETWORKS.items()):
        made[name] = reference.randomise(network(), seed), folder / f"{name}.pth"
        state = {f"module.{key}": value for key, value in made[name][0].state_dict().items()}
        torch.save({"state_dict": state, "optimizer": None, "global_step": 3, "global_epoch": 1}, made[name][1])
    return made


@pytest.fixture(scope="module")
def clips():
    """A batch of clips, [B, T, ...] as our networks take them."""
    rng = np.random.default_rng(0)
    mel = rng.uniform(-4, 4, (4, 2, 80, 16, 1)).astype(np.float32)
    return mel, rng.random((4, 2, 96, 96, 6), dtype=np.float32)


def to_torch(clip):
    """[B, T, X, Y, C] -> [B, C, T, X, Y]."""
    return torch.tensor(clip.transpose(0, 4, 1, 2, 3).copy())


def load(published, name):
    bundle = hub.load(published[name][1])
    return bundle, {"params": bundle.params} | bundle.variables


@pytest.mark.parametrize("train", [False, True])
def test_generator(published, clips, train):
    bundle, variables = load(published, "generator")
    mel, face = clips
    oracle = published["generator"][0].train(train)
    before = {key: value.clone() for key, value in oracle.state_dict().items()}
    expected = oracle(torch.tensor(mel.transpose(0, 1, 4, 2, 3).copy()), to_torch(face))
    apply = jax.jit(lambda v: bundle.model.apply(v, mel, face, train=train, mutable=["batch_stats"]))
    got, updates = apply(variables)
    got = got.transpose(0, 4, 1, 2, 3)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    compare_statistics("generator", updates, oracle)
    oracle.load_state_dict(before)


def test_expert(published):
    bundle, variables = load(published, "expert")
    rng = np.random.default_rng(1)
    mel, face = rng.uniform(-4, 4, (8, 80, 16, 1)).astype(np.float32), rng.random((8, 48, 96, 15), dtype=np.float32)
    oracle = published["expert"][0]
    before = {key: value.clone() for key, value in oracle.state_dict().items()}
    for train in (False, True):
        apply = jax.jit(lambda v, train=train: bundle.model.apply(v, mel, face, train=train, mutable=["batch_stats"]))
        got, updates = apply(variables)
        inputs = (torch.tensor(x.transpose(0, 3, 1, 2).copy()) for x in (mel, face))
        for name, expected in zip(("audio", "face"), oracle.train(train)(*inputs), strict=True):
            np.testing.assert_allclose(got[name], expected, atol=TOLERANCE)
        compare_statistics("expert", updates, oracle)
    oracle.load_state_dict(before)


def compare_statistics(name, updates, oracle):
    """Running mean and unbiased variance after one call, every layer."""
    table, shapes = formats._table(name), formats.abstract(name, Wav2LipConfig())
    tensors = formats.save_tensors(formats.join(shapes, updates["batch_stats"]), table)
    for key, value in oracle.state_dict().items():
        if "running" in key:
            np.testing.assert_allclose(tensors[key].read(), value, atol=TOLERANCE, err_msg=key)


def test_discriminator(published, clips):
    bundle, variables = load(published, "discriminator")
    faces = clips[1][..., :3]
    expected = published["discriminator"][0](to_torch(faces))  # time outermost
    lower = faces[:, :, 48:].swapaxes(0, 1).reshape(-1, 48, 96, 3)
    got = jax.nn.sigmoid(bundle.model.apply(variables, lower))[:, None]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_initial_values_are_torchs():
    """Uniform within 1 / sqrt(fan in) for kernels and biases, transposed convolutions by their output channels."""
    shapes = formats.abstract("generator", Wav2LipConfig())
    values = initial_values(jax.random.key(0), shapes)
    torch.manual_seed(0)
    block = reference.Wav2Lip().face_decoder_blocks[2][0].conv_block[0]
    ours = values["face_decoder_2"]["layer_0"]["conv"]
    for got, expected in ((ours["kernel"], block.weight), (ours["bias"], block.bias)):
        bound = (512 * 9) ** -0.5
        assert 0.98 * bound < np.abs(got).max() <= bound and 0.98 * bound < expected.abs().max() <= bound
        assert np.std(got) == pytest.approx(expected.std().item(), rel=0.1)
    norm = values["face_decoder_2"]["layer_0"]["norm"]
    assert [float(norm[name].mean()) for name in ("scale", "bias", "mean", "var")] == [1, 0, 0, 1]


def test_operations_are_those_of_the_published_sizes():
    for name, macs in (("generator", 3.967e9), ("expert", 1.210e9), ("discriminator", 1.256e9)):
        assert num_forward_flops(name, Wav2LipConfig()) / 2 == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_published_shapes_and_counts(name):
    keys, parameters, statistics = PUBLISHED[name]
    with torch.device("meta"):
        state = NETWORKS[name]().state_dict()
    assert len(state) == keys
    tree = formats.abstract(name, Wav2LipConfig())
    tensors = formats.save_tensors(tree, formats._table(name))
    expected = {key: tuple(value.shape) for key, value in state.items() if "num_batches" not in key}
    assert {key: tensor.shape for key, tensor in tensors.items()} == expected
    leaves = traverse_util.flatten_dict(tree)
    tracked = sum(math.prod(leaf.shape) for path, leaf in leaves.items() if path[-1] in ("mean", "var"))
    assert tracked == statistics
    assert sum(math.prod(leaf.shape) for leaf in leaves.values()) - tracked == parameters


@pytest.mark.parametrize(
    "format,name", [*(("torch", name) for name in NETWORKS), ("safetensors", "expert"), ("safetensors", "generator")]
)
def test_export_round_trip(published, name, format, tmp_path):
    oracle, path = published[name]
    hub.save(hub.load(path), tmp_path / "saved", format)
    if format == "torch":
        saved = torch.load(tmp_path / "saved", weights_only=True)
        assert saved["optimizer"] is None
        state = saved["state_dict"]
        assert list(state) == list(oracle.state_dict())
        NETWORKS[name]().load_state_dict(state)
    else:
        from safetensors.torch import load_file

        state = load_file(tmp_path / "saved")
    expected = oracle.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), key


def test_sizes_show_in_the_file(tmp_path):
    """Other widths, resolutions and clip lengths are recognised again; overrides that do not fit are errors."""
    config = Wav2LipConfig(image_size=192, width_mult=0.125, clip_len=16)
    zeros = lambda leaf: jnp.zeros(leaf.shape)  # noqa: E731
    for network in ("generator", "expert"):
        params, statistics = formats.split(jax.tree.map(zeros, formats.abstract(network, config)))
        model = formats.NETWORKS[network].model(config)
        bundle = hub.Bundle(model, params, config, variables={"batch_stats": statistics})
        hub.save(bundle, tmp_path / "small.pth", "torch")
        loaded = hub.load(tmp_path / "small.pth")
        expected = config if network == "expert" else Wav2LipConfig(192, 0.125)
        assert loaded.config == expected
    with pytest.raises(ValueError, match=r"small.pth does not fit the model:\n.*unfit"):
        hub.load(tmp_path / "small.pth", width_mult=0.25)
    with pytest.raises(ValueError, match="unknown field 'width' of Wav2LipConfig; nearest: 'width_mult'"):
        hub.load(tmp_path / "small.pth", width=0.25)


def test_one_frame_equals_the_clip(clips):
    """In evaluation a frame of a clip and the frame alone give the same picture."""
    config = Wav2LipConfig(width_mult=0.0625)
    mel, face = clips
    params, statistics = formats.split(initial_values(jax.random.key(0), formats.abstract("generator", config)))
    variables = {"params": params, "batch_stats": statistics}
    apply = jax.jit(Generator(config).apply)
    frame = apply(variables, mel[:, 1], face[:, 1])
    np.testing.assert_allclose(apply(variables, mel, face)[:, 1], frame, atol=1e-6)


def test_clip_of_sixteen_frames():
    """The notes' sixteen video frames per segment: 48 channels and 51 mel frames, averaged before the last layers."""
    config = Wav2LipConfig(width_mult=0.0625, clip_len=16)
    assert config.mel_steps == 51
    face = stack_frames(jnp.ones((2, 16, 48, 96, 3)))
    shapes = jax.eval_shape(SyncNet(config).init, jax.random.key(0), jnp.ones((2, 80, 51, 1)), face)
    assert face.shape == (2, 48, 96, 48)
    assert shapes["params"]["audio_encoder"]["layer_12"]["conv"]["kernel"].shape == (1, 1, 16, 32)
