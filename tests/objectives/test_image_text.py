"""BLIP-2's objectives beside plain statements of the published ones, their gradients, negatives, eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from omnax.models.blip2.model import task_mask
from omnax.objectives import image_text
from omnax.train.sharding import MeshConfig, make_mesh

RNG = np.random.default_rng(0)


def unit(*shape):
    x = RNG.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


IMAGE, TEXT = unit(8, 3, 5), unit(8, 5)


def contrast(image, text, temperature, **options):
    return image_text.contrast_loss(*image_text.similarities(image, text, temperature, **options))[0]


def torch_contrast(image, text, temperature, gather_gradient):
    """LAVIS's lines, in words of torch: label smoothing of cross_entropy, gathered features without gradient."""
    from oracles import torch

    all_image, all_text = (image, text) if gather_gradient else (image.detach(), text.detach())
    to_text = torch.einsum("iqe,je->ijq", image, all_text).max(-1).values / temperature
    to_image = torch.einsum("ie,jqe->ijq", text, all_image).max(-1).values / temperature
    label, cross = torch.arange(len(image)), torch.nn.functional.cross_entropy
    return (cross(to_text, label, label_smoothing=0.1) + cross(to_image, label, label_smoothing=0.1)) / 2


@pytest.mark.parametrize("gather_gradient", [False, True])
def test_contrast_and_its_gradients(gather_gradient):
    from oracles import torch

    leaves = [torch.tensor(x, requires_grad=True) for x in (IMAGE, TEXT, np.float32(0.07))]
    with torch.enable_grad():
        theirs = torch_contrast(*leaves, gather_gradient)
        theirs.backward()
    loss = jax.value_and_grad(lambda *x: contrast(*x, gather_gradient=gather_gradient), (0, 1, 2))
    ours, gradients = jax.jit(loss)(IMAGE, TEXT, jnp.float32(0.07))
    np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-5)
    for got, leaf in zip(gradients, leaves, strict=True):
        scale = max(1.0, float(leaf.grad.abs().max()))  # the temperature's is large: float32 of that size
        np.testing.assert_allclose(got, leaf.grad, atol=1e-5 * scale)


def test_contrast_over_eight_devices_equals_one():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2), jax.devices())
    with jax.set_mesh(mesh):
        spread = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        rows = [jax.device_put(x, spread) for x in (IMAGE, TEXT)]
        sharded = jax.jit(jax.value_and_grad(contrast, (0, 1)))(*rows, jnp.float32(0.07))
    whole = jax.jit(jax.value_and_grad(contrast, (0, 1)))(IMAGE, TEXT, jnp.float32(0.07))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), sharded, whole)


def test_several_captions_of_one_image_are_all_right():
    """Rows 0 and 1 share an image: each has half of the target."""
    same = np.eye(3, dtype=bool)
    same[:2, :2] = True
    scores = RNG.normal(size=(3, 3)).astype(np.float32)
    log_probs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    targets = np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
    expected = -(0.9 * targets * log_probs).sum(1).mean() - 0.1 * log_probs.mean()
    total, terms = image_text.contrast_loss(*map(jnp.asarray, (scores, scores, same)))
    np.testing.assert_allclose([total, terms["image_to_text"]], expected, rtol=1e-6)


def test_negatives_follow_the_scores_and_are_never_the_pair():
    logits = np.full((4, 4), 50.0, np.float32)  # of the pairs by far the highest
    logits[~np.eye(4, dtype=bool)] = np.tile(np.log([1.0, 2.0, 5.0]), 4)
    scores = jnp.asarray(logits)
    draw = jax.jit(jax.vmap(lambda key: image_text.draw_negatives(scores, key)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    assert not (drawn == np.arange(4)).any()
    shares = np.bincount(drawn[:, 0], minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, [0, 1 / 8, 2 / 8, 5 / 8], atol=0.03)  # 4 deviations
    keys = jax.random.split(jax.random.key(1), 4000)
    alike = np.asarray(jax.vmap(lambda key: image_text.draw_negatives(scores, key, kind="random"))(keys))
    np.testing.assert_allclose(np.bincount(alike[:, 3], minlength=4) / 4000, [1 / 3, 1 / 3, 1 / 3, 0], atol=0.03)
    same = np.eye(4, dtype=bool)
    same[0, 1:3] = True
    assert (jax.vmap(lambda key: image_text.draw_negatives(scores, key, jnp.asarray(same)))(keys)[:, 0] == 3).all()
    with pytest.raises(ValueError, match="a batch of 1 has no negatives"):
        image_text.draw_negatives(jnp.zeros((1, 1)), keys[0])


def test_matching_and_captions_by_torch():
    from oracles import torch

    cross = torch.nn.functional.cross_entropy
    pairs, others = RNG.normal(size=(3, 2)).astype(np.float32), RNG.normal(size=(6, 2)).astype(np.float32)
    labels = torch.tensor([1] * 3 + [0] * 6)
    expected = cross(torch.tensor(np.concatenate([pairs, others])), labels)
    np.testing.assert_allclose(image_text.match_loss(jnp.asarray(pairs), jnp.asarray(others))[0], expected, rtol=1e-6)
    # Nothing learnt, twice as many strangers as pairs: the entropy of 1/3
    indifferent = np.log([[2 / 3, 1 / 3]]).astype(np.float32)
    loss, _ = image_text.match_loss(jnp.asarray(indifferent), jnp.repeat(indifferent, 2, 0))
    np.testing.assert_allclose(loss, 0.6365, atol=1e-4)

    logits, tokens = RNG.normal(size=(2, 5, 7)).astype(np.float32), RNG.integers(0, 7, (2, 5))
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    ignored = torch.tensor(np.where(mask, tokens, -100))[:, 1:].reshape(-1)
    scores = torch.tensor(logits[:, :-1]).reshape(-1, 7)
    for smoothing in (0.0, 0.1):
        expected = cross(scores, ignored, ignore_index=-100, label_smoothing=smoothing)
        inputs = map(jnp.asarray, (logits[:, :-1], tokens[:, 1:], mask[:, 1:]))
        loss, terms = image_text.caption_loss(*inputs, smoothing=smoothing)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
    right = (logits[:, :-1].argmax(-1) == tokens[:, 1:])[mask[:, 1:]]
    np.testing.assert_allclose(terms["caption_accuracy"], right.mean(), rtol=1e-6)


# Three queries, four places of text of which the last is padding: the matrices that the paper draws (figure 2).
DRAWN = {
    "contrast": ["111 0000"] * 3 + ["000 1110"] * 4,
    "match": ["111 1110"] * 7,
    "caption": ["111 0000"] * 3 + ["111 1000", "111 1100", "111 1110", "111 1110"],
}


@pytest.mark.parametrize("task", DRAWN)
def test_masks_are_the_drawn_matrices(task):
    text = np.array([[True, True, True, False], [True, True, True, True]])
    rows = [[digit == "1" for digit in row.replace(" ", "")] for row in DRAWN[task]]
    got = task_mask(task, 3, text)
    np.testing.assert_array_equal(got[0], rows)
    assert not got[0, :, -1].any() and got[1, -1, -1]  # the second text has no padding
