"""The registered models of timm whose functions `models.vit` and `models.eva` have, with their arguments.

timm's `config.json` names an architecture, and holds only the arguments that differ from those registered under that
name (timm/models/vision_transformer.py, deit.py, eva.py, at 1.0.31). Sizes that tensors show are left out here: width,
depth, patch, MLP. Braces list alternatives, as in a shell. `tests/hub/test_timm_architectures.py` compares every entry
with timm's own function.

Besides timm's arguments: "class" is the model's class, "eps" that of its norms, "gated" a gated MLP. timm's files
cannot say these, so they come from the name alone.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

Arguments = Mapping[str, Any]

# Heads by the word for the size; arguments below go before.
_HEADS = {
    "tiny": 3,
    "small": 6,
    "medium": 8,
    "mediumd": 8,
    "base": 12,
    "large": 16,
    "huge": 16,
    "giant": 16,
    "gigantic": 16,
    "giantopt": 16,
    "enormous": 16,
    "so400m": 16,
    "so150m": 14,
    "so150m2": 13,
    "betwixt": 10,
    "intern300m": 16,
    "little": 5,
    "wee": 4,
    "xsmall": 4,
}
_CLIP = {"pre_norm": True, "eps": 1e-5}
_GAP = {"class_token": False, "global_pool": "avg"}
_MAP = {"class_token": False, "global_pool": "map"}
_REGISTER_GAP = {**_GAP, "init_values": 1e-5, "no_embed_class": True}
_RADIO = {"no_embed_class": True, "final_norm": False}
_GATED = {"num_heads": 24, "gated": True, "act_layer": "silu"}
_EVA: dict[str, Any] = {"class": "eva"}
_EVA02 = {**_EVA, "swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (16, 16)}
_EVA02_CLIP = {**_EVA02, "qkv_fused": False, "scale_mlp": True, "scale_attn_inner": True, "global_pool": "token"}
_ROPE = {**_EVA, "attn_type": "rope", "init_values": 1e-5, "global_pool": "token", "use_rot_pos_emb": True}
_ROPE |= {"rope_grid_indexing": "xy", "rope_temperature": 100.0}
_ROPE_GAP = {**_EVA, "init_values": 1e-5, "class_token": False, "use_rot_pos_emb": True, "use_abs_pos_emb": False}
_ROPE_GAP |= {"ref_feat_shape": (16, 16)}
_PE = {**_EVA, "attn_type": "rope", "use_pre_transformer_norm": True, "use_rot_pos_emb": True, "eps": 1e-5}
_PE |= {"rope_grid_indexing": "xy", "rope_grid_offset": 1.0}
_PE_CORE = {**_PE, "global_pool": "map", "attn_pool_num_heads": 8, "attn_pool_mlp_ratio": 4.0}
_PE_TOKENS = {**_PE, "use_post_transformer_norm": False, "use_fc_norm": False, "ref_feat_shape": (32, 32)}
_PE_GIGANTIC = {**_PE_TOKENS, "class_token": False, "init_values": 0.1, "rope_grid_offset": 0.0}

_GROUPS: tuple[tuple[str, Arguments], ...] = (
    ("vit_tiny_patch16_{224,384} vit_{small,base}_patch{8_224,16_224,16_384,32_224,32_384}", {}),
    ("vit_large_patch{14_224,16_224,16_384,32_224,32_384} vit_{huge,giant,gigantic}_patch14_224", {}),
    ("deit_{tiny,small}_patch16_224 deit_base_patch16_{224,384}", {}),
    ("deit_{tiny,small,base}_distilled_patch16_224 deit_base_distilled_patch16_384", {"class": "distilled"}),
    (
        "deit3_medium_patch16_224 deit3_{small,base,large}_patch16_{224,384} deit3_huge_patch14_224",
        {"init_values": 1e-6, "no_embed_class": True},
    ),
    ("flexivit_{small,base,large}", {"no_embed_class": True}),
    ("vit_base_patch16_224_miil", {"qkv_bias": False}),
    ("eva_large_patch14_{196,336}", {"global_pool": "avg"}),
    ("vit_base_patch{16_plus_240,32_plus_256}", {"num_heads": 14, "init_values": 1e-5}),
    ("vit_small_patch16_36x1_224", {"init_values": 1e-5}),
    ("vit_intern300m_patch14_448", {"init_values": 0.1, "final_norm": False, "dynamic_img_size": True}),
    ("test_vit", {"num_heads": 2, "dynamic_img_size": True}),
    ("test_vit2", {**_GAP, "num_heads": 2, "reg_tokens": 1, "init_values": 1e-5, "dynamic_img_size": True}),
    ("test_vit3", {**_MAP, "num_heads": 3, "reg_tokens": 1, "init_values": 1e-5, "pool_include_prefix": True}),
    # CLIP
    ("vit_{xsmall_patch16,medium_patch16,medium_patch32,betwixt_patch32}_clip_224", _CLIP),
    ("vit_base_patch{16_clip_224,16_clip_384,32_clip_224,32_clip_256,32_clip_384,32_clip_448}", _CLIP),
    ("vit_large_patch14_clip_{224,336} vit_huge_patch14_clip_{224,336,378} vit_giant_patch14_clip_224", _CLIP),
    ("vit_gigantic_patch14_clip_{224,378}", _CLIP),
    ("vit_base_patch16_plus_clip_240", {**_CLIP, "num_heads": 14}),
    (
        "vit_base_patch{16,32}_clip_quickgelu_224 vit_large_patch14_clip_quickgelu_{224,336} "
        "vit_huge_patch14_clip_quickgelu_{224,378} vit_gigantic_patch14_clip_quickgelu_224",
        {**_CLIP, "act_layer": "quick_gelu"},
    ),
    # SigLIP
    ("vit_base_patch16_siglip_{224,256,384,512} vit_large_patch16_siglip_{256,384}", _MAP),
    ("vit_so400m_patch14_siglip_{224,378,384}", _MAP),
    ("vit_base_patch32_siglip_256 vit_large_patch16_siglip_512", {**_MAP, "act_layer": "gelu_tanh"}),
    (
        "vit_so400m_patch16_siglip_{256,384,512} vit_giantopt_patch16_siglip_{256,384}",
        {**_MAP, "act_layer": "gelu_tanh"},
    ),
    (
        "vit_base_patch16_siglip_gap_{224,256,384,512} vit_large_patch16_siglip_gap_{256,384} "
        "vit_so400m_patch14_siglip_gap_{224,378,384,448,896}",
        {**_GAP, "fc_norm": False},
    ),
    (
        "vit_base_patch32_siglip_gap_256 vit_large_patch16_siglip_gap_512 "
        "vit_so400m_patch16_siglip_gap_{256,384,512} vit_giantopt_patch16_siglip_gap_{256,384}",
        {**_GAP, "fc_norm": False, "act_layer": "gelu_tanh"},
    ),
    # without class token
    ("vit_base_patch16_gap_224", {**_GAP, "fc_norm": False, "num_heads": 16}),
    ("vit_huge_patch{14_gap_224,16_gap_448} vit_giant_patch16_gap_224", {**_GAP, "fc_norm": False}),
    (
        "vit_medium_patch16_gap_{240,256,384} vit_betwixt_patch16_gap_256",
        {**_GAP, "qkv_bias": False, "init_values": 1e-6, "fc_norm": False},
    ),
    ("vit_{little,medium,betwixt,wee}_patch16_reg1_gap_256", {**_REGISTER_GAP, "reg_tokens": 1}),
    (
        "vit_{little,medium}_patch16_reg4_gap_256 vit_{mediumd,betwixt}_patch16_reg4_gap_{256,384}",
        {**_REGISTER_GAP, "reg_tokens": 4},
    ),
    ("vit_base_patch16_reg4_gap_256", {**_GAP, "no_embed_class": True, "reg_tokens": 4}),
    ("vit_so150m_patch16_reg4_gap_{256,384}", {**_GAP, "fc_norm": False, "reg_tokens": 4}),
    ("vit_so150m_patch16_reg4_map_256", {**_MAP, "reg_tokens": 4}),
    (
        "vit_so150m2_patch16_reg1_gap_{256,384,448}",
        {**_GAP, "qkv_bias": False, "init_values": 1e-5, "reg_tokens": 1},
    ),
    # self-supervised and distilled backbones
    ("vit_{small,base,large}_patch14_dinov2", {"init_values": 1e-5}),
    ("vit_giant_patch14_dinov2", {**_GATED, "init_values": 1e-5}),
    ("vit_{small,base,large}_patch14_reg4_dinov2", {"init_values": 1e-5, "no_embed_class": True, "reg_tokens": 4}),
    ("vit_giant_patch14_reg4_dinov2", {**_GATED, "init_values": 1e-5, "no_embed_class": True, "reg_tokens": 4}),
    ("vit_{base,large,so400m}_patch14_reg1_tipsv2", {"init_values": 1.0, "no_embed_class": True, "reg_tokens": 1}),
    ("vit_giant_patch14_reg1_tipsv2", {**_GATED, "init_values": 1.0, "no_embed_class": True, "reg_tokens": 1}),
    ("vit_{base,large}_patch16_radio_v3", {**_RADIO, "init_values": 1e-5, "reg_tokens": 7}),
    ("vit_huge_patch16_radio_v3", {**_RADIO, "reg_tokens": 7}),
    ("vit_giant_patch16_radio_v3", {**_RADIO, "reg_tokens": 7, "num_heads": 24}),
    ("vit_{so400m,huge}_patch16_radio_v4", {**_RADIO, "reg_tokens": 9}),
    # EVA
    ("eva_giant_patch14_{224,336,560}", _EVA),
    ("eva_giant_patch14_clip_224", {**_EVA, "global_pool": "token"}),
    ("eva02_{tiny,small}_patch14_{224,336}", _EVA02),
    ("eva02_{base,large}_patch14_{224,448}", {**_EVA02, "qkv_fused": False, "scale_mlp": True}),
    ("eva02_base_patch16_clip_224 eva02_large_patch14_clip_{224,336}", _EVA02_CLIP),
    ("eva02_enormous_patch14_clip_224", {**_EVA, "use_post_norm": True, "global_pool": "token"}),
    # rotary positions
    ("vit_base_patch16_rope_224", {**_ROPE, "use_abs_pos_emb": False, "use_fc_norm": False}),
    ("vit_{small,large}_patch16_rope_224", {**_ROPE, "use_abs_pos_emb": False}),
    ("vit_{small,base,large}_patch16_rope_ape_224", {**_ROPE, "no_embed_class": True}),
    ("vit_{medium,base}_patch16_rope_reg1_gap_256", {**_ROPE_GAP, "num_reg_tokens": 1}),
    ("vit_mediumd_patch16_rope_reg1_gap_256", {**_ROPE_GAP, "num_reg_tokens": 1, "qkv_bias": False}),
    ("vit_betwixt_patch16_rope_reg4_gap_256", {**_ROPE_GAP, "num_reg_tokens": 4}),
    ("vit_pe_core_base_patch16_224", {**_PE_CORE, "ref_feat_shape": (14, 14)}),
    ("vit_pe_core_{tiny,small}_patch16_384 vit_pe_core_large_patch14_336", {**_PE_CORE, "ref_feat_shape": (24, 24)}),
    (
        "vit_pe_core_gigantic_patch14_448",
        {**_PE_CORE, "class_token": False, "ref_feat_shape": (32, 32), "rope_grid_offset": 0.0},
    ),
    ("vit_pe_spatial_{tiny,small,base}_patch16_512 vit_pe_spatial_large_patch14_448", _PE_TOKENS),
    ("vit_pe_lang_large_patch14_448", {**_PE_TOKENS, "init_values": 0.1}),
    ("vit_pe_{spatial,lang}_gigantic_patch14_448", _PE_GIGANTIC),
)


def expand(names: str) -> Iterator[str]:
    """The names that braces stand for."""
    for name in re.findall(r"(?:[^\s{]|\{[^}]*\})+", names):
        parts = [part.split(",") for part in re.split(r"[{}]", name)]
        yield from map("".join, itertools.product(*parts))


@functools.cache
def architectures() -> Mapping[str, Arguments]:
    """What is registered in timm under each name, where it is not the default of the class."""
    table: dict[str, Arguments] = {}
    for names, arguments in _GROUPS:
        for name in expand(names):
            heads = next((_HEADS[word] for word in re.split("[_]", name) if word in _HEADS), 12)
            table[name] = {"num_heads": heads, **arguments}
    return table
