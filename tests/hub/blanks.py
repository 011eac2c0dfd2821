"""Small checkpoints of every family, made of zeros: for what looks at files rather than at numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from omnax import hub
from omnax.models import clip, dinov2, s3fd, vit, wav2lip
from omnax.models.published import floats, integers
from omnax.models.qwen_vl import model as qwen_vl

TRUNK = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "patch_size": 4, "image_size": 8}
TEXT = clip.TextConfig(
    16, 2, 2, 32, vocab_size=50, context_length=10, activation="quick_gelu", pool="eos", eos_id=49, projection_dim=8
)
IMAGE = clip.ImageConfig(clip.image_trunk(8, 4, 16, 2, 2, 32, activation="quick_gelu"), 8)


def blank(module, format, rng=None, **inputs):
    """A bundle of a module: parameters zero, or drawn from a NumPy generator."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), **inputs)
    draw = np.zeros if rng is None else lambda shape, dtype: rng.normal(size=shape).astype(dtype)
    arrays = jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape, leaf.dtype)), dict(shapes))
    params = arrays.pop("params")
    config = getattr(module, "config", s3fd.S3FDConfig())
    return hub.Bundle(module, params, config, format=format, variables=arrays)


def text_tower(rng=None):
    return blank(clip.TextTower(TEXT), "transformers", rng, tokens=integers(1, 10))


def image_tower(rng=None):
    return blank(clip.ImageTower(IMAGE), "transformers", rng, image=floats(1, 8, 8, 3))


def one_of_each():
    """{family: bundle}"""
    pair = clip.CLIP(clip.CLIPConfig(IMAGE, TEXT))
    plain = vit.ViT(vit.ViTConfig(**TRUNK, num_classes=5, activation="gelu", eps=1e-6))
    dino = dinov2.Dinov2(dinov2.Dinov2Config(32, 2, 2, 128, 14, image_size=28, pos_interpolation="bicubic"))
    lips = wav2lip.SyncNet(wav2lip.Wav2LipConfig(width_mult=1 / 64))
    text = {"width": 64, "depth": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 32, "vocab_size": 40}
    eyes = {"depth": 1, "width": 32, "num_heads": 2, "mlp_dim": 16, "out_width": 64, "full_blocks": (0,)}
    speaker = qwen_vl.config("3B", text=text | {"mrope_section": (2, 3, 3)}, vision=eyes)
    image = {"image": floats(1, 8, 8, 3)}
    published = qwen_vl.PUBLISHED["3B"].inputs
    return {
        "CLIP": blank(pair, "transformers", **image, tokens=integers(1, 10)),
        "DINOv2": blank(dino, "transformers", image=floats(1, 28, 28, 3)),
        "Qwen-VL": blank(qwen_vl.QwenVL(speaker), "transformers", **published),
        "S3FD": blank(s3fd.S3FD(), "torch", image=floats(1, 64, 64, 3)),
        "ViT": blank(plain, "transformers", **image),
        "Wav2Lip network": blank(lips, "torch", mel=floats(1, 80, 16, 1), face=floats(1, 48, 96, 15)),
    }
