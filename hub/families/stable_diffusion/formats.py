"""The names of diffusers' tensors for the networks of Stable Diffusion."""

from ....models.stable_diffusion.controlnet import ControlNetConfig
from ....models.stable_diffusion.unet import EncoderConfig, UNetConfig
from ....models.stable_diffusion.vae import VAEConfig
from ...mapping import Row, Table
from ...rows import conv, dense, heads, merge_heads, norm


def pointwise(source: str, target: str) -> tuple[Row, ...]:
    """A 1 x 1 convolution [out, in, 1, 1] -> Dense [in, out]."""
    return Row(f"{source}.weight", f"{target}/kernel", "D C 1 1 -> C D"), Row(f"{source}.bias", f"{target}/bias")


def resnet(source: str, target: str) -> tuple[Row, ...]:
    """A residual block, with a time embedding or without, of the same width or another."""
    return (
        *norm(f"{source}.norm1", f"{target}/norm1"),
        *conv(f"{source}.conv1", f"{target}/conv1"),
        *dense(f"{source}.time_emb_proj", f"{target}/time_emb_proj"),
        *norm(f"{source}.norm2", f"{target}/norm2"),
        *conv(f"{source}.conv2", f"{target}/conv2"),
        *pointwise(f"{source}.conv_shortcut", f"{target}/conv_shortcut"),
    )


def _attention(source: str, target: str) -> tuple[Row, ...]:
    names = {"to_q": "query", "to_k": "key", "to_v": "value"}
    rows = [row for theirs, ours in names.items() for row in heads(f"{source}.{theirs}", f"{target}/{ours}")]
    return *rows, *merge_heads(f"{source}.to_out.0", f"{target}/out")


def _transformer(source: str, target: str, linear_projection: bool) -> tuple[Row, ...]:
    project = dense if linear_projection else pointwise
    block, ours = f"{source}.transformer_blocks.{{i}}", f"{target}/transformer/blocks_{{i}}"
    gated = f"{ours}/ff/fc1", f"{ours}/ff/gate"  # the value first
    return (
        *norm(f"{source}.norm", f"{target}/norm"),
        *project(f"{source}.proj_in", f"{target}/proj_in"),
        *project(f"{source}.proj_out", f"{target}/proj_out"),
        *(row for n in (1, 2, 3) for row in norm(f"{block}.norm{n}", f"{ours}/norm{n}")),
        *_attention(f"{block}.attn1", f"{ours}/attn1"),
        *_attention(f"{block}.attn2", f"{ours}/attn2"),
        Row(f"{block}.ff.net.0.proj.weight", tuple(f"{x}/kernel" for x in gated), "F D -> D F"),
        Row(f"{block}.ff.net.0.proj.bias", tuple(f"{x}/bias" for x in gated)),
        *dense(f"{block}.ff.net.2", f"{ours}/ff/fc2"),
    )


def _encoder(c: EncoderConfig) -> tuple[Row, ...]:
    linear = c.linear_projection
    embeddings = [(f"{x}.linear_{n}", f"encoder/{x}/linear_{n}") for x in _EMBEDDINGS for n in (1, 2)]
    return (
        *conv("conv_in", "encoder/conv_in"),
        *(row for names in embeddings for row in dense(*names)),
        *resnet("down_blocks.{b}.resnets.{j}", "encoder/down_{b}_{j}/resnet"),
        *_transformer("down_blocks.{b}.attentions.{j}", "encoder/down_{b}_{j}/attention", linear),
        *conv("down_blocks.{b}.downsamplers.0.conv", "encoder/downsample_{b}"),
        *resnet("mid_block.resnets.{j}", "encoder/middle/resnet_{j}"),
        *_transformer("mid_block.attentions.0", "encoder/middle/attention", linear),
    )


_EMBEDDINGS = ("time_embedding", "add_embedding")


def unet_table(c: UNetConfig) -> Table:
    """UNet2DConditionModel."""
    rows = (
        *_encoder(c),
        *resnet("up_blocks.{b}.resnets.{j}", "decoder/up_{b}_{j}/resnet"),
        *_transformer("up_blocks.{b}.attentions.{j}", "decoder/up_{b}_{j}/attention", c.linear_projection),
        *conv("up_blocks.{b}.upsamplers.0.conv", "decoder/upsample_{b}"),
        *norm("conv_norm_out", "decoder/norm_out"),
        *conv("conv_out", "decoder/conv_out"),
    )
    return Table(rows)


def controlnet_table(c: ControlNetConfig) -> Table:
    """ControlNetModel."""
    hint = "controlnet_cond_embedding"
    rows = (
        *_encoder(c),
        *(row for name in ("conv_in", "conv_out") for row in conv(f"{hint}.{name}", f"hint_encoder/{name}")),
        *conv(f"{hint}.blocks.{{j}}", "hint_encoder/layers_{j}"),
        *pointwise("controlnet_down_blocks.{j}", "zero_{j}"),
        *pointwise("controlnet_mid_block", "zero_middle"),
    )
    return Table(rows)


# The VAEs of Stable Diffusion 1.x and 2.x were saved when diffusers called its attention so.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def vae_table(c: VAEConfig) -> Table:
    """AutoencoderKL."""

    def half(name: str, blocks: str, sampler: str) -> tuple[Row, ...]:
        theirs, ours = f"{name}.mid_block", f"{name}/middle"
        projections = {"to_q": "query", "to_k": "key", "to_v": "value"}.items()
        level, own = f"{name}.{blocks}_blocks.{{b}}", f"{name}/{blocks}_{{b}}"
        return (
            *conv(f"{name}.conv_in", f"{name}/conv_in"),
            *resnet(f"{level}.resnets.{{j}}", f"{own}/resnet_{{j}}"),
            *conv(f"{level}.{sampler}rs.0.conv", f"{name}/{sampler}_{{b}}"),
            *resnet(f"{theirs}.resnets.{{j}}", f"{ours}/resnet_{{j}}"),
            *norm(f"{theirs}.attentions.0.group_norm", f"{ours}/norm"),
            *(row for q, query in projections for row in heads(f"{theirs}.attentions.0.{q}", f"{ours}/attn/{query}")),
            *merge_heads(f"{theirs}.attentions.0.to_out.0", f"{ours}/attn/out"),
            *norm(f"{name}.conv_norm_out", f"{name}/norm_out"),
            *conv(f"{name}.conv_out", f"{name}/conv_out"),
        )

    rows = (
        *half("encoder", "down", "downsample"),
        *half("decoder", "up", "upsample"),
        *pointwise("quant_conv", "quant_conv"),
        *pointwise("post_quant_conv", "post_quant_conv"),
    )
    renames = [(rf"(attentions\.\d+)\.{old}\.", rf"\1.{new}.") for old, new in _OLD_ATTENTION.items()]
    return Table(rows, renames)
