"""Layers that several families share: normalisation, attention, feed-forward, residual regularisers, layer stack.

The transformer block is the pre-norm one of ViT (arXiv 2010.11929, eq. 2-3), with the switches by which its descendants
differ: activation, gated feed-forward, layer scale, drop path, rotary positions and attention masks.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..kernels.activations import ACTIVATIONS
from ..kernels.attention import attention
from ..kernels.constraints import constrain
from ..kernels.dense import dot_general
from ..kernels.normalization import layer_norm, rms_norm

Initializer = nn.initializers.Initializer
Rotary = Callable[[Float[Array, "B T N H"]], Float[Array, "B T N H"]]


def wide(param: Array) -> Array:
    """A parameter in float32, before it is added to or resized with others, as if its file had been read so.

    Parameters may lie in half precision while the model computes in float32 (`hub.load` keeps the dtype of the file).
    """
    return jnp.asarray(param, jnp.float32)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis; eps has no default: the published families differ (1e-12 … 1e-5)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis (arXiv 1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.eps)


class MultiHeadAttention(nn.Module):
    """Attention with kernels [D, N, H]; self-attention, or queries `x` over keys and values from `context`."""

    num_heads: int
    qkv_bias: bool = True
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    dtype: DTypeLike = jnp.float32
    out_init: Initializer | None = None  # of the output kernel; None: kernel_init
    qk_norm_eps: float | None = None  # LayerNorms on every head's queries and keys; None: none
    out_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Float[Array, "B S D"] | None = None,
        *,
        rotary: Rotary | None = None,
        attend: Callable[..., Array] = attention,
        **attention_options: Any,
    ) -> Float[Array, "B T D"]:
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"width {width} is not divisible by num_heads {self.num_heads}")
        project = functools.partial(
            nn.DenseGeneral,
            (self.num_heads, width // self.num_heads),
            use_bias=self.qkv_bias,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            dot_general=dot_general,
        )
        context = x if context is None else context
        query = project(name="query")(x)  #       B T N H
        key = project(name="key")(context)  #     B S N H
        value = project(name="value")(context)  # B S N H
        if self.qk_norm_eps is not None:
            query, key = (
                LayerNorm(self.qk_norm_eps, name="q_norm")(query),
                LayerNorm(self.qk_norm_eps, name="k_norm")(key),
            )
        if rotary is not None:
            query, key = rotary(query), rotary(key)
        query, key, value = (constrain(y, "batch", None, "heads", None) for y in (query, key, value))
        mixed = attend(query, key, value, **attention_options)  # B T N H
        out_init = self.out_init or self.kernel_init
        project = functools.partial(nn.DenseGeneral, width, (-2, -1), dtype=self.dtype, dot_general=dot_general)
        return project(use_bias=self.out_bias, kernel_init=out_init, name="out")(mixed)


class ContextAttention(nn.Module):
    """Attention in two steps with kernels [D, N, H], for keys and values that are kept, or come from elsewhere.

    `keys_and_values(context)`, then the queries of `x` over them. `dropout` is that of the attention probabilities,
    in training.
    """

    num_heads: int
    width: int  # of the output, and of all heads together
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.normal(0.02)
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible by num_heads {self.num_heads}")
        options = {"use_bias": self.use_bias, "kernel_init": self.kernel_init, "dtype": self.dtype}
        dense = functools.partial(nn.DenseGeneral, dot_general=dot_general, **options)
        heads = (self.num_heads, self.width // self.num_heads)
        self.query, self.key, self.value = dense(heads), dense(heads), dense(heads)
        self.out = dense(self.width, axis=(-2, -1))
        self.drop = nn.Dropout(self.dropout)

    def keys_and_values(
        self, context: Float[Array, "B S C"]
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        """Of a context, for `__call__`."""
        return self.key(context), self.value(context)

    def __call__(
        self, x: Float[Array, "B T D"], key: Array, value: Array, *, train: bool = False, **options: Any
    ) -> Float[Array, "B T D"]:
        """Mixed values; `options` are those of `kernels.attention`, with dropout `mask` alone."""
        query = self.query(x)  # B T N H
        query, key, value = (constrain(y, "batch", None, "heads", None) for y in (query, key, value))
        if train and self.dropout:
            return self.out(self._dropped(query, key, value, **options))
        return self.out(attention(query, key, value, **options))

    def _dropped(self, query: Array, key: Array, value: Array, mask: Array | None = None) -> Float[Array, "B T N H"]:
        logits = jnp.einsum("btnh,bsnh->bnts", query * query.shape[-1] ** -0.5, key).astype(jnp.float32)
        logits = logits if mask is None else jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        weights = self.drop(jax.nn.softmax(logits), deterministic=False).astype(value.dtype)
        return jnp.einsum("bnts,bsnh->btnh", weights, value)


# torch's default for the kernel of a linear layer or a convolution, U(±1/sqrt(fan_in)).
torch_kernel = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias(fan_in: int) -> Initializer:
    """torch's default for the bias of a linear layer, U(±1/sqrt(fan_in)): the fan a bias does not see by itself."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(key, shape, dtype, -bound, bound)


class Mlp(nn.Module):
    """Dense, activation, Dense; or gated (SwiGLU, arXiv 2002.05202): fc2(activation(gate(x)) * fc1(x))."""

    hidden: int
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    dropout: float = 0.0
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    bias_init: Initializer | None = nn.initializers.normal(1e-6)  # None: torch's default, U(±1/sqrt(fan_in))
    dtype: DTypeLike = jnp.float32
    out_init: Initializer | None = None  # of the kernel of fc2; None: kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], train: bool = False) -> Float[Array, "B T D"]:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features,
                use_bias=self.use_bias,
                kernel_init=self.out_init or self.kernel_init if name == "fc2" else self.kernel_init,
                bias_init=self.bias_init or torch_bias(self.hidden if name == "fc2" else x.shape[-1]),
                dtype=self.dtype,
                dot_general=dot_general,
                name=name,
            )

        activation = ACTIVATIONS[self.activation]
        y = dense(self.hidden, name="fc1")(x)  # B T F
        y = activation(dense(self.hidden, name="gate")(x)) * y if self.gated else activation(y)
        y = constrain(y, "batch", None, "mlp")
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return dense(x.shape[-1], name="fc2")(y)  # B T D


class LayerScale(nn.Module):
    """Per-channel gain on a residual branch (CaiT, arXiv 2103.17239, eq. 2)."""

    initial: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x * self.param("gamma", nn.initializers.constant(self.initial), (x.shape[-1],)).astype(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops the branch of whole examples and scales the others up by 1 / keep."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], rate: Float[Array, ""], train: bool) -> Float[Array, "B T D"]:
        if not train:
            return x
        keep = 1.0 - rate
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.shape[0], 1, 1))
        return jnp.where(kept, x / keep.astype(x.dtype), 0)


class TransformerBlock(nn.Module):
    """Pre-norm block: x += path(scale(attn(norm1(x)))), x += path(scale(mlp(norm2(x))))."""

    num_heads: int
    mlp_dim: int
    eps: float
    activation: str = "gelu"
    gated: bool = False
    qkv_bias: bool = True
    qk_norm: bool = False
    proj_bias: bool = True  # of the attention's output and of the MLP
    layer_scale: float | None = None
    dropout: float = 0.0
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    mlp_bias_init: Initializer | None = nn.initializers.normal(1e-6)
    dtype: DTypeLike = jnp.float32
    mlp_init: Initializer | None = None  # of the MLP's first kernel; None: kernel_init
    out_init: Initializer | None = None  # of the last kernel of both branches; None: kernel_init

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        drop_path: Float[Array, ""] | None = None,
        *,
        train: bool = False,
        **attention_options: Any,
    ) -> Float[Array, "B T D"]:
        def residual(y: Float[Array, "B T D"], index: int) -> Float[Array, "B T D"]:
            if self.layer_scale is not None:
                y = LayerScale(self.layer_scale, name=f"scale{index}")(y)
            y = nn.Dropout(self.dropout, deterministic=not train)(y)
            return y if drop_path is None else DropPath(name=f"drop_path{index}")(y, drop_path, train)

        attend = MultiHeadAttention(
            self.num_heads,
            self.qkv_bias,
            self.kernel_init,
            self.dtype,
            self.out_init,
            self.eps if self.qk_norm else None,
            self.proj_bias,
            name="attn",
        )
        mlp = Mlp(
            self.mlp_dim,
            self.activation,
            self.gated,
            self.proj_bias,
            dropout=self.dropout,
            kernel_init=self.mlp_init or self.kernel_init,
            bias_init=self.mlp_bias_init,
            dtype=self.dtype,
            out_init=self.out_init or self.kernel_init,
            name="mlp",
        )
        x = constrain(x, "batch", None, None)
        x = x + residual(attend(LayerNorm(self.eps, name="norm1")(x), **attention_options), 1)
        return x + residual(mlp(LayerNorm(self.eps, name="norm2")(x), train), 2)


class Stack(nn.Module):
    """`depth` equal blocks: an unrolled loop (parameters `blocks_{i}`), or one scanned block (`blocks`, layers first).

    Scanning compiles one block whatever the depth. `remat` names what the backward pass keeps of a block: "none"
    recomputes nothing, "full" recomputes everything, any other name is a policy of `jax.checkpoint_policies`.
    """

    block: Callable[..., nn.Module]  # block(name=...) -> module; module(x, layer, **options) -> x, or (x, y)
    depth: int
    scan: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, x: Array, layers: Any = None, *, collect: bool = False, **options: Any) -> tuple[Array, Any]:
        """Runs the blocks on `x`; `layers` is a pytree with a leading layer axis (or None), `options` go to all alike.

        Returns the output, and what the blocks gave beside it stacked over the layers (None if nothing); with `collect`
        the outputs of all blocks [depth, ...] instead.
        """

        def body(block: nn.Module, x: Array, layer: Any) -> tuple[Array, Any]:
            result = block(x, layer, **options)  # type: ignore[operator]  # a linen module with a __call__
            x, y = result if isinstance(result, tuple) else (result, None)
            return x, x if collect else y

        if self.remat != "none":
            body = nn.remat(body, policy=remat_policy(self.remat), prevent_cse=not self.scan)
        if self.scan:
            scanned = nn.scan(
                body, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=self.depth
            )
            return scanned(self.block(name="blocks"), x, layers)
        outputs = []
        for i in range(self.depth):
            x, y = body(self.block(name=f"blocks_{i}"), x, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
            outputs.append(y)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def remat_policy(name: str) -> Callable[..., bool] | None:
    """The checkpoint policy of that name; ValueError names the choices."""
    if name == "full":
        return None
    choices = sorted(key for key in vars(jax.checkpoint_policies) if not key.startswith("_"))
    if name not in choices:
        raise ValueError(f"unknown remat policy {name!r}, expected 'none', 'full' or one of {choices}")
    return getattr(jax.checkpoint_policies, name)


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """Unrolled parameters (`…/blocks_{i}/…`) -> the scanned layout (`…/blocks/…` with a leading layer axis)."""
    stacked: dict[tuple[str, ...], Any] = {}
    groups: dict[tuple[str, ...], dict[int, Any]] = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        position = next((p for p, part in enumerate(path) if _layer_index(part) is not None), None)
        if position is None:
            stacked[path] = leaf
        else:
            index = _layer_index(path[position])
            groups.setdefault((*path[:position], "blocks", *path[position + 1 :]), {})[index] = leaf  # type: ignore[index]
    for path, leaves in groups.items():
        stacked[path] = jnp.stack([leaves[i] for i in range(len(leaves))])
    return traverse_util.unflatten_dict(stacked)


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `stack_layers`."""
    unstacked: dict[tuple[str, ...], Any] = {}
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)  # type: ignore[assignment]
    for path, leaf in flat.items():
        if "blocks" not in path:
            unstacked[path] = leaf
            continue
        position = path.index("blocks")
        for i in range(leaf.shape[0]):
            unstacked[*path[:position], f"blocks_{i}", *path[position + 1 :]] = leaf[i]
    return traverse_util.unflatten_dict(unstacked)


def _layer_index(part: str) -> int | None:
    name, _, index = part.rpartition("_")
    return int(index) if name == "blocks" and index.isdigit() else None


def patchify(image: Float[Array, "B X Y C"], patch_size: tuple[int, int]) -> Float[Array, "B X2 Y2 F"]:
    """Cuts images into patches flattened as (row, column, channel), the order of a convolution kernel [P, P, C, D]."""
    rows, columns = patch_size
    if image.shape[-3] % rows or image.shape[-2] % columns:
        raise ValueError(
            f"image of {image.shape[-3]}x{image.shape[-2]} pixels is not divisible into {rows}x{columns} patches"
        )
    return rearrange(image, "b (x p) (y q) c -> b x y (p q c)", p=rows, q=columns)


class PatchEmbed(nn.Module):
    """Linear embedding of patches: a convolution's kernel [P, P, C, D], applied as one matrix product."""

    width: int
    patch_size: tuple[int, int]
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "B X Y C"]) -> Float[Array, "B X2 Y2 D"]:
        patches = patchify(jnp.asarray(image, self.dtype), self.patch_size)
        kernel = self.param("kernel", self.kernel_init, (*self.patch_size, image.shape[-1], self.width))
        flat = kernel.reshape(-1, self.width).astype(self.dtype)
        embedded = dot_general(patches, flat, (((3,), (0,)), ((), ())))
        if not self.use_bias:
            return embedded
        return embedded + self.param("bias", self.bias_init, (self.width,)).astype(self.dtype)
