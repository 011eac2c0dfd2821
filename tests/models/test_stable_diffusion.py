"""ControlNet at the start of training: which outputs are equal bit for bit, and which gradients are zero.

The derivation (arXiv 2302.05543v1, section 3.1): with y = F(x; T) + Z2(F(x + Z1(c); T')), Z1 = Z2 = 0, the gradient of
everything before Z2 contains Z2's zero weight. So gradients come in waves: the last zero convolutions first, then the
copy and the hint's last convolution, then the hint's encoder.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from omnax.models.layers import stack_layers
from omnax.models.stable_diffusion.controlnet import (
    ControlledUNet,
    ControlNet,
    average,
    block_widths,
    config_from_unet,
    controlled_from_unet,
    controlnet_from_unet,
)
from omnax.models.stable_diffusion.ip_adapter import IPAdapter, adapter_from_unet, place
from omnax.models.stable_diffusion.sizes import ip_adapter_for
from omnax.models.stable_diffusion.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    widths=(8, 16),
    layers=(1, 1),
    attention=(True, False),
    up_attention=(True, False),
    depths=(1, 1),
    num_heads=(2, 2),
    context_dim=6,
    groups=4,
)
UNET = UNet(CONFIG)
NET = ControlNet(config_from_unet(CONFIG, hint_widths=(4, 4)))
NOTES = ControlledUNet(CONFIG, hint_widths=(4, 4))
RNG = np.random.default_rng(0)
LATENTS, TARGET = (jnp.asarray(RNG.normal(size=(2, 4, 4, 4)), jnp.float32) for _ in range(2))
CONTEXT = jnp.asarray(RNG.normal(size=(2, 3, 6)), jnp.float32)
HINTS = [jnp.asarray(RNG.random((2, 8, 8, 3)), jnp.float32) for _ in range(2)]
TIMESTEP = jnp.asarray([10.0, 700.0])
INPUTS = LATENTS, TIMESTEP, CONTEXT


def drawn(shapes, seed):
    """Every parameter away from zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


def fresh(model, seed, *inputs):
    return jax.jit(model.init)(jax.random.key(seed), *inputs)["params"]


@pytest.fixture(scope="module")
def base():
    """A UNet whose output is not zero, as a trained one."""
    return drawn(jax.eval_shape(UNET.init, jax.random.key(0), *INPUTS)["params"], 0)


@pytest.fixture(scope="module")
def start(base):
    return controlnet_from_unet(base, fresh(NET, 1, *INPUTS, HINTS[0]))


@jax.jit
def plain(base):
    return UNET.apply({"params": base}, *INPUTS)


@jax.jit
def controlled(params, base, hint, scale=1.0):
    control = NET.apply({"params": params}, *INPUTS, hint, scale=scale)
    return UNET.apply({"params": base}, *INPUTS, control=control)


@jax.jit
def gradients(params, base, hint):
    """Of the mean squared error, for the ControlNet's parameters."""
    return jax.grad(lambda params: jnp.square(controlled(params, base, hint) - TARGET).mean())(params)


@jax.jit
def notes_gradients(params, hint):
    return jax.grad(lambda params: jnp.square(NOTES.apply({"params": params}, *INPUTS, hint) - TARGET).mean())(params)


def sgd(params, gradient, rate=0.5):
    return jax.tree.map(lambda p, g: p - rate * g, params, gradient)


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def part(path):
    """The wave that a parameter of a ControlNet belongs to."""
    if path.startswith("zero_"):
        return "zero"
    if path.startswith("hint_encoder"):
        return "last of hint" if "conv_out" in path else "hint"
    return "copy"


def moving(gradient, part=part):
    """part -> whether all of its gradients are away from zero, or all exactly zero; anything else fails."""
    found = {}
    for path, leaf in flat(gradient).items():
        found.setdefault(part(path), []).append((path, bool(np.any(leaf))))
    for name, entries in found.items():
        assert len({moves for _, moves in entries}) == 1, (name, entries)
    return {name: entries[0][1] for name, entries in found.items()}


def test_an_untrained_controlnet_leaves_the_output_as_it_is(base, start):
    expected = plain(base)
    assert np.abs(expected).max() > 0.1
    for hint in HINTS:
        np.testing.assert_array_equal(controlled(start, base, hint), expected)
    trained = drawn(start, 5)
    assert np.abs(controlled(trained, base, HINTS[0]) - expected).max() > 1e-3
    np.testing.assert_array_equal(controlled(trained, base, HINTS[0], 0.0), expected)


@pytest.mark.parametrize("copied", [True, False])
def test_gradients_come_in_three_waves(base, start, copied):
    """Copying is about good features: an encoder drawn at random has the same gradients zero."""
    params = start if copied else start | {"encoder": drawn(start["encoder"], 7)}
    waves = []
    for _ in range(3):
        gradient = gradients(params, base, HINTS[0])
        waves.append({name for name, moves in moving(gradient).items() if moves})
        params = sgd(params, gradient)
    assert waves == [{"zero"}, {"zero", "copy", "last of hint"}, {"zero", "copy", "last of hint", "hint"}]


def test_the_first_gradients_do_not_know_the_hint(base, start):
    one, other = (gradients(start, base, hint) for hint in HINTS)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_the_copies_being_non_zero_is_for(base, start):
    """From zero weights the branch has no features: the zero convolutions' biases alone would start to learn."""
    empty = {**start, "encoder": jax.tree.map(jnp.zeros_like, start["encoder"])}
    for path, leaf in flat(gradients(empty, base, HINTS[0])).items():
        assert np.any(leaf) == (path.startswith("zero_") and path.endswith("bias")), path


def test_nothing_learns_beside_a_base_whose_output_is_zero(base, start):
    silent = {**base, "decoder": {**base["decoder"], "conv_out": fresh(UNET, 0, *INPUTS)["decoder"]["conv_out"]}}
    assert not np.any(plain(silent))
    assert not any(moving(gradients(start, silent, HINTS[0])).values())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_first_step_of_adamw_moves_copies_by_their_decay_alone(base, start, decay):
    rate = 1e-2
    optimizer = optax.adamw(rate, weight_decay=decay)
    updates, _ = optimizer.update(gradients(start, base, HINTS[0]), optimizer.init(start), start)
    after = flat(optax.apply_updates(start, updates))
    for path, leaf in flat(start).items():
        if part(path) == "zero":
            assert np.all(after[path] != leaf), path
        else:
            np.testing.assert_allclose(after[path], leaf * (1 - rate * decay), rtol=1e-6 if decay else 0)


def test_a_controlnet_of_another_base_is_named(start):
    other = {"encoder": {**start["encoder"], "conv_in": {"kernel": jnp.zeros((3, 3, 9, 8)), "bias": jnp.zeros(8)}}}
    with pytest.raises(ValueError, match="another base model"):
        controlnet_from_unet(other, start)


# The notes' wording: "beside every block of the UNet a control branch is copied; the branch ends in a 1 x 1 convolution
# that starts as 0, so that the output at the start of training is unchanged; the output of every block is the UNet's
# plus the branch's; the copied weights start non-zero as the UNet's, so that the first gradients are not 0".


@pytest.fixture(scope="module")
def notes(base):
    return controlled_from_unet(base, fresh(NOTES, 1, *INPUTS, HINTS[0]))


def notes_part(path):
    top = path.split("/")[0]
    if top in ("encoder", "decoder"):
        return "unet"
    if top.startswith("branch"):
        return "copy"
    return "hint" if top == "hint_encoder" else top.rsplit("_", 1)[0]


@pytest.mark.long
def test_notes_every_block_has_a_branch_with_the_unets_own_weights(base, notes):
    blocks = len(CONFIG.steps) + 1 + 4  # encoder, middle, decoder
    assert sum(name.startswith("zero_out") for name in notes) == blocks == len(block_widths(CONFIG)[0])
    own, copies = flat(base), flat(notes)
    for path, leaf in copies.items():
        if path.startswith("branch_"):
            np.testing.assert_array_equal(leaf, own[path.removeprefix("branch_")])
            assert np.any(leaf), path
        if path.startswith("zero_"):
            assert not np.any(leaf), path
    head = {path for path in own if path.split("/")[1] in ("norm_out", "conv_out")}  # no block
    assert {f"branch_{path}" for path in own.keys() - head} == {path for path in copies if path.startswith("branch_")}


def test_notes_the_output_starts_unchanged_and_scale_zero_keeps_it_so(base, notes):
    run = jax.jit(lambda params, scale: NOTES.apply({"params": params}, *INPUTS, HINTS[0], scale=scale))
    start = run(notes, 1.0)
    np.testing.assert_allclose(start, plain(base), atol=1e-6)  # two programs, whose sums XLA fuses in two ways
    branches = {name: drawn(tree, 3) for name, tree in notes.items() if name not in ("encoder", "decoder")}
    trained = {**notes, **branches}
    assert np.abs(run(trained, 1.0) - start).max() > 1e-3
    np.testing.assert_array_equal(run(trained, 0.0), start)


@pytest.mark.long
def test_notes_gradients_come_in_three_waves(notes):
    params, waves = notes, []
    for _ in range(3):
        gradient = notes_gradients(params, HINTS[0])
        assert moving({name: gradient[name] for name in ("encoder", "decoder")}, notes_part)["unet"]
        branch = {name: tree for name, tree in gradient.items() if name not in ("encoder", "decoder")}
        waves.append({name for name, moves in moving(branch, notes_part).items() if moves})
        params = {**params, **sgd({name: params[name] for name in branch}, branch, 0.05)}
    assert waves == [{"zero_out"}, {"zero_out", "copy", "zero_in"}, {"zero_out", "copy", "zero_in", "hint"}]


def test_hints_are_averaged_over_equal_cells():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(average(x, (2, 2))[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    with pytest.raises(ValueError, match="4 x 4 do not fall into 3 x 2 equal cells"):
        average(x, (3, 2))


ADAPTER = ip_adapter_for(CONFIG, features=5, tokens=2)
FEATURES = jnp.asarray(RNG.normal(size=(2, 1, 5)), jnp.float32)


@jax.jit
def adapter_gradients(params, base, scale):
    def loss(params):
        output = IPAdapter(ADAPTER).apply({"params": params}, FEATURES)
        images = place(CONFIG, ADAPTER, output, scale)
        return jnp.square(UNET.apply({"params": base}, *INPUTS, images=images) - TARGET).mean()

    return jax.grad(loss)(params)


def test_an_adapter_starts_from_the_texts_projections_and_learns_everywhere_at_once(base):
    """Unlike a ControlNet: it changes the output at once, and none of its gradients is zero; at scale 0 all are."""
    shapes = jax.eval_shape(IPAdapter(ADAPTER).init, jax.random.key(0), FEATURES)["params"]
    start = adapter_from_unet(CONFIG, base, drawn(shapes, 2), ADAPTER)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, shapes)
    text = base["decoder"]["up_1_1"]["attention"]["transformer"]["blocks_0"]["attn2"]["key"]["kernel"]
    np.testing.assert_array_equal(start["layers_2_key"]["kernel"], text.reshape(6, 8))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(adapter_gradients(start, base, 1.0)))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(adapter_gradients(start, base, 0.0)))
    scanned = adapter_from_unet(CONFIG, stack_layers(base), start, ADAPTER)
    jax.tree.map(np.testing.assert_array_equal, scanned, start)
