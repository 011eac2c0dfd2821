"""BLIP-2 (arXiv 2301.12597): learned queries read a frozen image encoder and speak to a frozen language model.

Stage 1 trains the Q-Former (see models/bert.py) on three tasks that differ in which token sees which: contrast of
images and texts, matching of pairs, and captioning. Stage 2 projects its queries into the width of a language model,
OPT or Flan-T5, before the text. Reference: transformers models/blip_2, LAVIS models/blip2_models.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ...kernels.normalization import l2_normalize
from .. import eva, opt, t5
from ..bert import Bert, BertConfig
from ..cache import Cache, LayerCache
from ..clip import image_trunk, trunk_module
from ..layers import LayerNorm, torch_bias
from ..opt import OPT, OPTConfig
from ..published import Published, floats, integers
from ..ranges import Count, Positive, Whole
from ..t5 import T5, DecoderCache, T5Config
from ..vit import ViTConfig

Task = Literal["contrast", "match", "caption"]
LanguageCache = Cache | DecoderCache


@dataclasses.dataclass(frozen=True)
class Blip2Config:
    """Everything that fixes the function; parts that a checkpoint has not are None, or 0."""

    qformer: BertConfig
    vision: ViTConfig | None = None  # None: images come as the tokens of an encoder that lies elsewhere
    num_queries: Count = 32
    vision_eps: Positive = 1e-6  # of the norm on the image's tokens: transformers 1e-6, LAVIS 1e-5
    embed_dim: Whole = 0  # of the space in which images and texts are compared; with it comes the matching head
    temperature: bool = False  # a learned one, which cosines are divided by
    language_width: Whole = 0  # of the projection into a language model, which may lie elsewhere
    opt: OPTConfig | None = None
    t5: T5Config | None = None
    image_token: Whole | None = None  # id in whose places queries stand; None: they stand before the text

    def __post_init__(self) -> None:
        if self.opt is not None and self.t5 is not None:
            raise ValueError("a BLIP-2 has one language model, got opt and t5")
        width = self.opt.embed_dim or self.opt.width if self.opt else self.t5.width if self.t5 else self.language_width
        if width != self.language_width:
            raise ValueError(f"language_width is {self.language_width}, that of the language model {width}")
        if self.vision is not None and self.vision.width != self.qformer.context_width:
            raise ValueError(
                f"qformer.context_width is {self.qformer.context_width}, the image encoder has {self.vision.width}"
            )
        if self.embed_dim and not (self.qformer.vocab_size and self.qformer.text_mlp):
            raise ValueError("embed_dim needs a Q-Former that reads text: vocab_size and text_mlp")


def task_mask(task: Task, num_queries: int, text: Bool[Array, "B T"]) -> Bool[Array, "B S S"]:
    """Which of queries and text, S = Q + T of them, sees which (BLIP-2, figure 2); padding is seen by nobody.

    "contrast": queries and text see their own kind. "match": all see all. "caption": queries see queries, a token the
    queries and the text up to itself.
    """
    length = num_queries + text.shape[1]
    query = jnp.arange(length) < num_queries
    row, column = query[:, None], query[None, :]
    causal = jnp.tril(jnp.ones((length, length), bool))
    seen = {"contrast": row == column, "match": jnp.ones_like(causal), "caption": column | (~row & causal)}[task]
    kept = jnp.pad(text, ((0, 0), (num_queries, 0)), constant_values=True)
    return seen & kept[:, None]


def cosines(image: Float[Array, "B Q E"], text: Float[Array, "K E"]) -> Float[Array, "B K"]:
    """Of every image's nearest query with every text."""
    return jnp.einsum("bqe,ke->bqk", image, text, precision="highest").max(1)


class Blip2(nn.Module):
    """Both stages' networks. `__call__` is stage 2's; stage 1 is made of the methods."""

    config: Blip2Config
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, width = self.config, self.config.qformer.width
        if c.vision is not None:
            self.vision = trunk_module(c.vision, self.dtype)
        self.vision_norm = LayerNorm(c.vision_eps)
        self.queries = self.param("queries", nn.initializers.normal(0.02), (1, c.num_queries, width))
        self.qformer = Bert(c.qformer, self.dtype)
        # torch's Linear, as in LAVIS: U(±1/sqrt(fan_in))
        options: Any = {"kernel_init": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")}
        options |= {"bias_init": torch_bias(width), "dtype": self.dtype}
        if c.embed_dim:
            self.image_proj, self.text_proj = (nn.Dense(c.embed_dim, **options) for _ in range(2))
            self.match_head = nn.Dense(2, **options)
        if c.temperature:
            self.temperature = self.param("temperature", nn.initializers.constant(0.07), ())
        if c.language_width:
            self.language_proj = nn.Dense(c.language_width, **options)
        if c.opt is not None:
            self.language = OPT(c.opt, self.dtype)
        elif c.t5 is not None:
            self.language = T5(c.t5, self.dtype)

    def encode_image(self, image: Float[Array, "B X Y C"] | Float[Array, "B P W"]) -> Float[Array, "B P W"]:
        """The image's tokens, normed: of pixels, or of an encoder that lies elsewhere."""
        if self.config.vision is not None:
            image = self.vision(image)["tokens"]
        return self.vision_norm(image.astype(self.dtype))

    def query(self, tokens: Float[Array, "B P W"], *, train: bool = False) -> tuple[Float[Array, "B Q D"], LayerCache]:
        """What the queries read off an image's tokens, and their keys and values in all layers [L, B, N, Q, H]."""
        queries = self._queries(len(tokens))
        return self.qformer.encode(queries, num_queries=queries.shape[1], context=tokens, train=train)

    def _queries(self, batch: int) -> Float[Array, "B Q D"]:
        return jnp.broadcast_to(self.queries, (batch, *self.queries.shape[1:]))

    def encode_text(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], *, train: bool = False
    ) -> Float[Array, "B T D"]:
        """The hidden states of a text without an image."""
        return self.qformer.encode(self.qformer.embed(tokens), mask=mask[:, None], train=train)[0]

    def embed_image(self, queries: Float[Array, "B Q D"]) -> Float[Array, "B Q E"]:
        """What `query` gave, normalised in the common space: the image is its nearest query."""
        return l2_normalize(self.image_proj(queries).astype(jnp.float32))

    def embed_text(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B E"]:
        """What `encode_text` gave, normalised in the common space: the text is its first token."""
        return l2_normalize(self.text_proj(hidden[:, 0]).astype(jnp.float32))

    def match(
        self,
        image: Float[Array, "B P W"],
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        *,
        train: bool = False,
    ) -> Float[Array, "B 2"]:
        """Scores (no pair, pair) of the tokens of an image with a text: the mean over the queries."""
        x = jnp.concatenate([self._queries(len(image)), self.qformer.embed(tokens)], 1)
        count = self.config.num_queries
        options = {"mask": task_mask("match", count, mask), "num_queries": count, "context": image, "train": train}
        hidden, _ = self.qformer.encode(x, **options)
        return self.match_head(hidden[:, :count]).astype(jnp.float32).mean(1)

    def start_caption(self, kept: LayerCache, capacity: int) -> Cache:
        """A cache that holds the keys and values of `query`, with room for so many tokens of text."""
        layers, batch, heads, count, channels = kept[0].shape
        return Cache.empty((layers, batch, heads, count + capacity, channels), kept[0].dtype).write(*kept)

    def extend_caption(
        self, tokens: Int[Array, "B T"], cache: Cache, mask: Bool[Array, "B T"] | None = None, *, train: bool = False
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Scores behind each of some more tokens, which see the queries and all text before, and the cache."""
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        cache = cache.append(mask)
        rows, columns = cache.end + jnp.arange(tokens.shape[1]), jnp.arange(cache.used.shape[1])
        seen = (columns <= rows[:, None]) & cache.used[:, None]  # B T S
        x = self.qformer.embed(tokens, start=cache.end - self.config.num_queries)
        hidden, new = self.qformer.encode(x, mask=seen, cache=cache, train=train)
        return self.qformer.logits(hidden), cache.write(*new)

    def caption_in_one_pass(
        self,
        image: Float[Array, "B P W"],
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        *,
        train: bool = False,
    ) -> Float[Array, "B T V"]:
        """What `extend_caption` gives behind `query`, with queries and text computed together under one mask."""
        count = self.config.num_queries
        x = jnp.concatenate([self._queries(len(image)), self.qformer.embed(tokens)], 1)
        options = {"mask": task_mask("caption", count, mask), "num_queries": count, "context": image, "train": train}
        hidden, _ = self.qformer.encode(x, **options)
        return self.qformer.logits(hidden[:, count:])

    def prompt(self, image: Float[Array, "B X Y C"], *, train: bool = False) -> Float[Array, "B Q L"]:
        """An image as vectors of the language model."""
        queries, _ = self.query(self.encode_image(image), train=train)
        return self.language_proj(queries)

    def language_inputs(
        self, prompt: Float[Array, "B Q L"], tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B S L"], Bool[Array, "B S"]]:
        """Vectors of text with those of the image: in the places of `image_token`, or without such a token in front."""
        x, token = self.language.embed(tokens), self.config.image_token
        if token is None:
            mask = jnp.pad(mask, ((0, 0), (prompt.shape[1], 0)), constant_values=True)
            return jnp.concatenate([prompt.astype(x.dtype), x], 1), mask
        here = tokens == token
        number = jnp.clip(jnp.cumsum(here, 1) - 1, 0, prompt.shape[1] - 1)
        chosen = jnp.take_along_axis(prompt, number[..., None], 1)
        return jnp.where(here[..., None], chosen.astype(x.dtype), x), mask

    def start_answer(
        self, image: Float[Array, "B X Y C"], tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], capacity: int
    ) -> tuple[Float[Array, "B V"], LanguageCache]:
        """Scores of the first token of an answer to image and text, and a cache with room for so many tokens."""
        x, mask = self.language_inputs(self.prompt(image), tokens, mask)
        if isinstance(self.language, T5):
            cache = self.language.start(self.language.encode(x, mask), mask, capacity + 1)
            return self.extend_answer(jnp.zeros((len(x),), jnp.int32), cache)  # a decoder begins with padding
        cache = self.language.start(len(x), x.shape[1] + capacity)
        hidden, cache = self.language.decode(x, mask, cache)
        assert cache is not None
        last = (mask * jnp.arange(1, x.shape[1] + 1)).max(1) - 1
        chosen = jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0]
        return self.language.logits(chosen), cache

    def extend_answer(
        self, tokens: Int[Array, " B"], cache: LanguageCache
    ) -> tuple[Float[Array, "B V"], LanguageCache]:
        """Scores [B, V] behind one more token of each answer."""
        if isinstance(self.language, T5):
            assert isinstance(cache, DecoderCache)
            logits, cache = self.language.extend(tokens[:, None], cache)
            return logits[:, -1], cache
        assert isinstance(cache, Cache)
        hidden, new = self.language.decode(tokens[:, None], None, cache)
        assert new is not None
        return self.language.logits(hidden[:, -1]), new

    def __call__(
        self,
        image: Float[Array, "B X Y C"],
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        decoder_tokens: Int[Array, "B U"] | None = None,
        *,
        train: bool = False,
        language_train: bool = False,
    ) -> dict[str, Array]:
        """What the parts that are there say of images and texts; `mask` is True on what is no padding of `tokens`.

        With a projection {"prompt" [B, Q, L]}, with a language model "logits" [B, S, V] (of T5 [B, U, V]) beside it;
        in stage 1 {"match" [B, 2], "image_embeds" [B, Q, E], "text_embeds" [B, E]} and the cosines of every image's
        nearest query with every text, "cosines" [B, B]. `train` is for the Q-Former's dropout, `language_train` for
        that of the language model.
        """
        if self.is_initializing():
            self.initialize()
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        features = self.encode_image(image)
        queries, _ = self.query(features, train=train)
        out: dict[str, Array] = {}
        if self.config.embed_dim:
            hidden = self.encode_text(tokens, mask, train=train)
            out = {"image_embeds": self.embed_image(queries), "text_embeds": self.embed_text(hidden)}
            out["match"] = self.match(features, tokens, mask, train=train)
            out["cosines"] = cosines(out["image_embeds"], out["text_embeds"])
        if self.config.language_width:
            out["prompt"] = self.language_proj(queries)
        if self.config.opt is None and self.config.t5 is None:
            return out
        x, mask = self.language_inputs(out["prompt"], tokens, mask)
        texts: Any = (x, mask) if isinstance(self.language, OPT) else (x, decoder_tokens, mask)
        return out | {"logits": self.language(*texts, train=language_train)["logits"]}

    def initialize(self) -> None:
        """Runs every part once, for `init`."""
        c = self.config
        size = (*c.vision.image_size, c.vision.num_channels) if c.vision else (1, c.qformer.context_width)
        image = self.encode_image(jnp.zeros((1, *size)))
        self.qformer.initialize(self.queries, image)
        if c.embed_dim:
            self.embed_image(self.queries)
            self.embed_text(self.queries)
            self.match_head(self.queries)
        if c.language_width:
            self.language_proj(self.queries)
        if c.opt is not None:
            self.language(jnp.zeros((1, 1), jnp.int32))
        elif c.t5 is not None:
            self.language(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32))


def apply(model: Blip2, params: Any, *args: Any, method: str = "__call__", **options: Any) -> Any:
    """A method of the model with these parameters."""
    return model.apply({"params": params}, *args, method=method, **options)


def init_params(model: Blip2, rng: Array) -> dict[str, Any]:
    """Initial values of all parts."""
    variables: Any = model.init(rng, method="initialize")
    return variables["params"]


# The image encoders without their last block and norm: those of the publication, and as the user's notes name them.
_EVA = {"pool": "none", "final_norm": False}
VISIONS: dict[str, ViTConfig] = {
    # EVA-CLIP's ViT-g, whose keys have no bias; transformers gives them one, which softmax takes out again.
    "eva_clip_g": ViTConfig(
        1408, 39, 16, 6144, (14, 14), num_classes=0, activation="gelu", pos_interpolation="bicubic", init="timm", **_EVA
    ),
    "clip_L": image_trunk(
        224, 14, 1024, 23, 16, 4096, activation="quick_gelu", pos_interpolation="bicubic_align_corners", **_EVA
    ),
    "openclip_g": image_trunk(224, 14, 1408, 39, 16, 6144, **_EVA),
    "eva02_clip_E": eva.config("EVA02-E/14", depth=63, **_EVA),
}


def qformer(vision: ViTConfig | None = None, *, text: bool, lm_head: bool = False, **fields: Any) -> BertConfig:
    """The published Q-Former that reads this encoder: with a text side, of which the head of captions may be absent."""
    reading: dict[str, Any] = {"num_types": 0, "query_mlp": True, "cross_every": 2, "text_mlp": text}
    reading |= {"vocab_size": 30523 if text else 0, "lm_head": lm_head}
    reading |= {"context_width": vision.width} if vision else {}
    return BertConfig(**reading | fields)


# Language models of the publication; the hub's files have vocabularies padded to a multiple of 64, with room for
# <image>. Flan-T5 runs with the exact GELU here (LAVIS blip2_t5.py).
LANGUAGES: dict[str, tuple[OPTConfig | T5Config, int]] = {
    "opt2.7b": (opt.config("2.7b", vocab_size=50304), 50265),
    "opt6.7b": (opt.config("6.7b", vocab_size=50304), 50265),
    "flant5xl": (t5.config("flan-t5-xl", activation="gelu"), 32100),
    "flant5xxl": (t5.config("flan-t5-xxl", activation="gelu"), 32100),
}


def config(vision: str = "eva_clip_g", language: str = "", **fields: Any) -> Blip2Config:
    """A published model: stage 1 with all its heads, or with a `language` model stage 2; `fields` override.

    ValueError names the choices.
    """
    if vision not in VISIONS or language not in {"", *LANGUAGES}:
        raise ValueError(f"unknown BLIP-2 {vision!r} with {language!r}, expected {[*VISIONS]} with {['', *LANGUAGES]}")
    trunk = VISIONS[vision]
    settings: dict[str, Any] = {"vision": trunk}
    if language:
        body, token = LANGUAGES[language]
        settings |= {"qformer": qformer(trunk, text=False), "language_width": body.width, "image_token": token}
        settings |= {"opt": body} if isinstance(body, OPTConfig) else {"t5": body}
    else:
        settings |= {"qformer": qformer(trunk, text=True, lm_head=True), "embed_dim": 256, "temperature": True}
    return Blip2Config(**settings | fields)


def scanned(c: Blip2Config, scan: bool = True, remat: str = "none") -> Blip2Config:
    """With the layers of image encoder and language model in scans, and this rematerialisation everywhere."""
    parts: dict[str, Any] = {name: getattr(c, name) for name in ("vision", "opt", "t5")}
    parts = {k: v and dataclasses.replace(v, scan=scan, remat=remat) for k, v in parts.items()}
    return dataclasses.replace(c, qformer=dataclasses.replace(c.qformer, remat=remat), **parts)


def published(checkpoint: str, vision: str = "eva_clip_g", language: str = "", **fields: Any) -> Published:
    """A published model; a forward pass is of one image and 32 tokens."""
    shape = config(vision, language, **fields)
    inputs = {"image": floats(1, *VISIONS[vision].image_size, 3), "tokens": integers(1, 32)}
    inputs |= {"decoder_tokens": integers(1, 32)} if shape.t5 else {}
    return Published(lambda scan: Blip2(scanned(shape, scan)), inputs, checkpoint)


PUBLISHED = {
    "stage1-g": published("blip2_pretrained.pth"),
    "stage1-L": published("blip2_pretrained_vitL.pth", "clip_L"),
    "stage1-openclip-g": published("", "openclip_g"),
    "stage1-eva02-E": published("", "eva02_clip_E"),
    "itm-g": published(
        "Salesforce/blip2-itm-vit-g", qformer=qformer(VISIONS["eva_clip_g"], text=True), temperature=False
    ),
    "opt2.7b": published("Salesforce/blip2-opt-2.7b", language="opt2.7b"),
    "opt6.7b": published("Salesforce/blip2-opt-6.7b", language="opt6.7b"),
    "flant5xl": published("Salesforce/blip2-flan-t5-xl", language="flant5xl"),
    "flant5xxl": published("Salesforce/blip2-flan-t5-xxl", language="flant5xxl"),
    "flant5xl-L": published("blip2_pretrained_flant5xl_vitL.pth", "clip_L", "flant5xl"),
}
