"""Stable Diffusion: the base UNet, a ControlNet beside it, an IP-Adapter within it (configs/stable_diffusion.py).

The parameters of a run are those of its networks by name. What a stage does not train is frozen: no gradient, no
optimiser slot. A ControlNet begins as a copy of the UNet's encoder, which a run takes from another run of this recipe,
or from a published directory, by `init_from.path`.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .... import hub
from ....data.lookup import lookup
from ....data.text.bpe import TextTokenizer
from ....hub.bundle import assemble
from ....hub.families.clip.family import CLIPProcessor
from ....hub.samplers import FILE, write_sampler
from ....kernels.diffusion import add_noise
from ....models.clip import ImageConfig, ImageTower, TextConfig, TextTower
from ....models.ranges import Count, NonNegative, Positive
from ....models.samplers import SamplerConfig, Schedule
from ....models.stable_diffusion.controlnet import ControlNet, config_from_unet, controlnet_from_unet
from ....models.stable_diffusion.ip_adapter import IPAdapter, IPAdapterConfig, check_base, place
from ....models.stable_diffusion.pipeline import ControlImage, Guidance, Pipeline, Prompt, TextEncoders
from ....models.stable_diffusion.unet import Images, UNet, UNetConfig
from ....models.stable_diffusion.vae import VAE, Posterior, VAEConfig
from ....objectives.diffusion import offset_noise, prediction_loss
from ...optimizer import OptimizerConfig
from ...recipe import Batch, Evaluator, Loss, Player, Recipe
from ...rules import Rules, Tree, flatten
from ...settings import RunConfig, dtype_of
from ...state import TrainState
from .data import PictureConfig, train_batches
from .evaluation import Evaluation, draw_pictures

STAGES = ("base", "control", "image_prompt")
# Network -> the folder of a published directory.
FOLDERS = {
    "unet": "unet",
    "vae": "vae",
    "text": "text_encoder",
    "text_2": "text_encoder_2",
    "controlnet": "controlnet",
    "image": "image_encoder",
    "adapter": "ip_adapter",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The networks."""

    unet: UNetConfig = dataclasses.field(default_factory=UNetConfig)
    text: TextConfig
    text_2: TextConfig | None = None  # SDXL's second
    penultimate: bool = False  # SDXL: the context is the input of the towers' last blocks
    vae: VAEConfig | None = None  # None: the UNet works on pixels
    hint_widths: tuple[Count, ...] = (16, 32, 96, 256)
    image: ImageConfig | None = None  # of image prompts
    adapter: IPAdapterConfig | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of the recipe `stable_diffusion`."""

    stage: str  # see STAGES
    model: ModelConfig
    dtype: str = "float32"  # of the matrix products
    image_size: Count  # rows and columns of the images
    data: PictureConfig
    sampler: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)  # its noise is that of training
    min_snr: Positive | None = None  # gamma of the weights over time steps (5); None: all count the same
    noise_offset: NonNegative = 0.0  # SDXL: 0.05
    input_perturbation: NonNegative = 0.0  # of noise that is added and not to be predicted (0.1)
    train_text: bool = False  # base: the text encoder learns too
    unlock_decoder: bool = False  # control: the UNet's decoder learns too (CompVis' sd_locked=False)
    optimizer: OptimizerConfig
    guidance: NonNegative = 3.0  # of evaluations
    sample_steps: Count = 20
    samples: Count = 32  # pictures of an evaluation
    evaluators: tuple[str, ...] = ("samples",)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage is {self.stage!r}, expected one of {STAGES}")
        misplaced = {"train_text": "base", "unlock_decoder": "control"}
        for name, stage in misplaced.items():
            if getattr(self, name) and self.stage != stage:
                raise ValueError(f"{name} is of stage {stage!r}, got stage {self.stage!r}")
        if (self.stage == "control") != bool(self.data.condition):
            raise ValueError(f"stage is {self.stage!r} and data.condition {self.data.condition!r}: they go together")
        parts = (self.stage == "image_prompt", bool(self.data.prompt), bool(self.model.image), bool(self.model.adapter))
        if len(set(parts)) > 1:
            raise ValueError(
                f"stage is {self.stage!r}, data.prompt {self.data.prompt!r}, model.image and model.adapter "
                f"{parts[2:]}: they go together"
            )
        if self.data.cached and (self.train_text or self.evaluators or not self.model.vae):
            raise ValueError(
                f"data.name 'latents' needs model.vae, and neither train_text nor evaluators, which draw pictures; got "
                f"train_text {self.train_text}, evaluators {self.evaluators}"
            )
        if self.model.adapter:
            check_base(self.model.unet, self.model.adapter)
        if self.image_size % self.factor:
            raise ValueError(f"image_size is {self.image_size}, expected a multiple of {self.factor}")

    @property
    def factor(self) -> int:
        """Pixels a latent."""
        return self.model.vae.factor if self.model.vae else 1

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks of this stage."""
        m = self.model
        optional = {"vae": m.vae, "text_2": m.text_2, "controlnet": self.stage == "control"}
        optional |= {"image": m.image, "adapter": m.adapter}
        if self.data.cached:
            optional |= dict.fromkeys(("vae", "text", "text_2"), False)
        return tuple(name for name in FOLDERS if optional.get(name, True))

    @property
    def trainable(self) -> Rules[bool]:
        """Which parameters learn."""
        texts = ("text", "text_2") if self.train_text else ()
        trained = {"base": {"unet", *texts}, "control": {"controlnet"}, "image_prompt": {"adapter"}}
        rules = [(f"{name}/.*", name in trained[self.stage]) for name in self.networks]
        return tuple([("unet/decoder/.*", True)] * self.unlock_decoder + rules)


class Networks:
    """The modules of a config, and what they do together."""

    def __init__(self, config: Config):
        m, dtype = config.model, dtype_of(config.dtype)
        self.config = config
        self.unet = UNet(m.unet, dtype)
        self.vae = VAE(m.vae, dtype) if m.vae else None
        self.towers = tuple(TextTower(text, dtype) for text in (m.text, m.text_2) if text)
        self.encode_text = TextEncoders(self.towers, m.penultimate)
        self.controlnet = ControlNet(config_from_unet(m.unet, hint_widths=m.hint_widths), dtype)
        self.image = ImageTower(m.image, dtype) if m.image else None
        self.adapter = IPAdapter(m.adapter, dtype) if m.adapter else None
        controlnets = (self.controlnet,) if config.stage == "control" else ()
        self.pipeline = Pipeline(self.unet, self.vae, controlnets)

    @property
    def modules(self) -> dict[str, Any]:
        """By name, those of this stage."""
        every = {"unet": self.unet, "vae": self.vae, "controlnet": self.controlnet}
        every |= dict(zip(("text", "text_2"), self.towers, strict=False)) | {
            "image": self.image,
            "adapter": self.adapter,
        }
        return {name: every[name] for name in self.config.networks}

    def init(self, rng: Array) -> Tree:
        """Initial values of all networks; a ControlNet's encoder is the UNet's, an adapter's layers are its own."""
        params = self._fresh(rng, self.modules)
        if "controlnet" in params:
            params["controlnet"] = controlnet_from_unet(params["unet"], params["controlnet"])
        if "adapter" in params:
            params["adapter"] = adapter_from_unet(self.config.model.unet, params["unet"], params["adapter"])
        return params

    def _fresh(self, rng: Array, names: Collection[str]) -> Tree:
        c = self.config
        side = c.image_size // c.factor
        latents = jnp.zeros((1, side, side, c.model.unet.in_channels))
        tokens = jnp.zeros((1, 1), jnp.int32)
        context = jnp.zeros((1, 1, c.model.unet.context_dim))
        added = self.sizes(1) | {"pooled": jnp.zeros((1, self.towers[-1].config.projection_dim))}
        added = added if c.model.unet.added_dim else {}
        inputs: dict[str, tuple[Any, ...]] = {
            "unet": (latents, 0.0, context),
            "vae": (jnp.zeros((1, c.image_size, c.image_size, 3)),),
            "text": (tokens,),
            "text_2": (tokens,),
            "controlnet": (latents, 0.0, context, jnp.zeros((1, c.image_size, c.image_size, 3))),
        }
        if self.image is not None:
            trunk = self.image.config.trunk
            inputs["image"] = (jnp.zeros((1, *trunk.image_size, trunk.num_channels)),)
        if self.adapter is not None:
            patches = () if self.adapter.config.projection == "linear" else (1,)
            inputs["adapter"] = (jnp.zeros((1, 1, *patches, self.adapter.config.features)),)
        params: Tree = {}
        for number, name in enumerate(FOLDERS):
            if name in names:
                more = added if name in ("unet", "controlnet") else {}
                key = jax.random.fold_in(rng, number)
                params[name] = self.modules[name].init(key, *inputs[name], **more)["params"]
        return params

    def complete(self, params: Tree) -> Tree:
        """Parameters of a base model with those that training of this stage begins with; what no stage reads is left
        out."""
        params = {name: tree for name, tree in params.items() if name in self.config.networks}
        missing = [name for name in ("controlnet", "image", "adapter") if name in self.config.networks]
        missing = [name for name in missing if name not in params]
        if not missing or "unet" not in params:
            return params
        fresh: Any = jax.jit(functools.partial(self._fresh, names=tuple(missing)))
        params |= fresh(jax.random.key(self.config.seed))
        if "controlnet" in missing:
            params["controlnet"] = controlnet_from_unet(params["unet"], params["controlnet"])
        if "adapter" in missing:
            params["adapter"] = adapter_from_unet(self.config.model.unet, params["unet"], params["adapter"])
        return params

    def sizes(self, batch: int) -> dict[str, Array]:
        """SDXL's sizes for images that nothing was cut from; {} for others."""
        side = self.config.image_size
        sizes = jnp.tile(jnp.array([[side, side, 0, 0, side, side]], jnp.float32), (batch, 1))
        return {"sizes": sizes} if self.config.model.unet.added_dim else {}

    def prompt(self, params: Tree, tokens: Array) -> Prompt:
        """Of tokens [B, E, T], a row for each text encoder."""
        own = [params[name] for name in ("text", "text_2") if name in params]
        context, pooled = self.encode_text(own, [tokens[:, e] for e in range(len(own))])
        return Prompt(context, pooled, **self.sizes(len(tokens)))

    def draw(self, params: Tree, schedule: Schedule, batch: Batch, negative: Array) -> Array:
        """Pictures for a batch's captions and conditions, each from noise of its own number."""
        c, count = self.config, len(batch["tokens"])
        keys = jax.random.split(jax.random.key(c.seed + 1), count)
        shape = (count, *(c.image_size // c.factor,) * 2, c.model.unet.in_channels)
        controls = []
        if "controlnet" in params:
            controls = [ControlImage(params["controlnet"], batch["condition"], jnp.ones(len(schedule.timesteps)))]
        images = None
        if "prompt" in batch:
            nothing, whole = jnp.zeros(count), jnp.ones(count)
            both, keep = jnp.tile(batch["prompt"], (2, 1, 1, 1)), jnp.concatenate([nothing, whole])
            images = self.images(params, both, keep, batch.get("scale", 1.0))
        return self.pipeline.draw(
            params,
            schedule,
            self.prompt(params, batch["tokens"]),
            keys,
            noise=jax.random.normal(jax.random.key(c.seed + 2), shape),
            guidance=Guidance(self.prompt(params, negative), c.guidance),
            controls=controls,
            images=images,
        )

    def images(self, params: Tree, prompt: Array, keep: Array, scale: Array | float = 1.0) -> Images | None:
        """Image prompts [B, P, P, 3] for the UNet; None in other stages. Where `keep` is 0 there is none.

        As published: of a dropped image the first adapters see an embedding of zeros, the others zero pixels.
        """
        if self.image is None or self.adapter is None:
            return None
        pooled, keep = self.adapter.config.projection == "linear", jnp.asarray(keep)
        pixels = prompt if pooled else prompt * keep[:, None, None, None]
        out: Any = self.image.apply({"params": params["image"]}, pixels, hidden_states=not pooled)
        features = out["projected"] * keep[:, None] if pooled else out["hidden_states"][-2]
        output: Any = self.adapter.apply({"params": params["adapter"]}, features[:, None])
        return place(self.config.model.unet, self.adapter.config, output, scale)

    def inputs(self, params: Tree, batch: Batch, rng: Array) -> tuple[Array, Prompt]:
        """What is noised, drawn from the posterior or the pixels themselves, and what the UNet is told; of images and
        captions, or of what was computed of them before."""
        if self.config.data.cached:
            posterior = Posterior(*jnp.split(batch["moments"], 2, -1))
            assert self.vae is not None
            sizes = self.sizes(len(batch["context"]))
            prompt = Prompt(batch["context"], batch.get("pooled"), **sizes)
            return self.vae.config.scaling_factor * posterior.sample(rng), prompt
        prompt = self.prompt(params, batch["tokens"])
        if self.vae is None:
            return batch["image"], prompt
        encode: Any = VAE.encode_scaled
        latents: Any = self.vae.apply({"params": params["vae"]}, batch["image"], rng, method=encode)
        return latents, prompt


def make_recipe(config: Config) -> Recipe:
    """The recipe of a config; reads no data yet."""
    networks = Networks(config)
    tokenizers = functools.cache(
        lambda: config.data.make_tokenizers([t.config.context_length for t in networks.towers])
    )
    optimizer = dataclasses.replace(config.optimizer, trainable=config.trainable)
    return Recipe(
        init=lambda rng: (networks.init(rng), {}),
        players=(Player(make_loss(config, networks), optimizer),),
        sharding=SHARDING,
        batch=batch_shapes(config),
        data=train_batches(config.data, config.batch_size, config.seed, tokenizers),
        evaluators=make_evaluators(config, networks, tokenizers),
        inspect=lambda: config.data.open(config.data.test_split),
        load=lambda path: networks.complete(load(path)),
        adapt=networks.complete,
        bundle=lambda params: make_bundle(config, networks, tokenizers(), params),
        pictures=draw_pictures,
    )


def adapter_from_unet(config: UNetConfig, unet: Tree, fresh: Tree) -> Tree:
    """The parameters at the start of training: each layer's keys and values are those that the UNet has for text."""
    adapter, flat = dict(fresh), flatten(unet)
    layers = [(name, layer) for name, depth, _ in config.transformers for layer in range(depth)]
    for i, (name, layer) in enumerate(layers):
        part = "decoder" if name.startswith("up") else "encoder"
        block = f"{part}/{name}/attention/transformer/blocks{'' if config.scan else f'_{layer}'}"
        for kind in ("key", "value") if f"layers_{i}_key" in fresh else ():
            kernel = flat[f"{block}/attn2/{kind}/kernel"]  # D N H
            kernel = kernel[layer] if config.scan else kernel
            adapter[f"layers_{i}_{kind}"] = {"kernel": jnp.copy(kernel.reshape(len(kernel), -1))}
    return adapter


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """One global batch."""
    c, shape = config, jax.ShapeDtypeStruct
    image = shape((c.batch_size, c.image_size, c.image_size, 3), jnp.float32)
    texts = [text for text in (c.model.text, c.model.text_2) if text]
    if c.data.cached and c.model.vae:
        side, length = c.image_size // c.factor, texts[0].context_length
        batch = {
            "moments": shape((c.batch_size, side, side, 2 * c.model.vae.latent_channels), jnp.float32),
            "context": shape((c.batch_size, length, c.model.unet.context_dim), jnp.float32),
        }
        if c.model.unet.added_dim:
            batch["pooled"] = shape((c.batch_size, texts[-1].projection_dim), jnp.float32)
    else:
        batch = {"image": image, "tokens": shape((c.batch_size, len(texts), texts[0].context_length), jnp.int32)}
    if c.data.condition:
        batch["condition"] = image
    if c.model.image:
        trunk = c.model.image.trunk
        batch["prompt"] = shape((c.batch_size, *trunk.image_size, trunk.num_channels), jnp.float32)
        batch["keep_prompt"] = shape((c.batch_size,), jnp.float32)
    return batch


def make_loss(config: Config, networks: Networks) -> Loss:
    """The error of the predicted noise (or velocity) at a random time step of each example."""
    alphas, c = config.sampler.alphas, config

    def loss(params: Tree, state: TrainState, batch: Batch, rng: Array) -> tuple[Array, tuple[dict[str, Array], Tree]]:
        rngs = dict(zip(("posterior", "step", "noise", "offset", "perturb"), jax.random.split(rng, 5), strict=True))
        latents, prompt = networks.inputs(params, batch, rngs["posterior"])
        step = jax.random.randint(rngs["step"], (len(latents),), 0, len(alphas))
        noise = jax.random.normal(rngs["noise"], latents.shape)
        if c.noise_offset:
            noise = offset_noise(noise, rngs["offset"], c.noise_offset)
        added_noise = noise
        if c.input_perturbation:
            added_noise += c.input_perturbation * jax.random.normal(rngs["perturb"], latents.shape)
        noisy = add_noise(latents, added_noise, alphas, step)
        output = predict(networks, params, noisy, step, prompt, batch)
        weighting: Any = {"prediction": c.sampler.prediction, "min_snr": c.min_snr}
        total, terms = prediction_loss(output, latents, noise, alphas, step, **weighting)
        return total, (terms, {})

    return loss


def predict(networks: Networks, params: Tree, noisy: Array, step: Array, prompt: Prompt, batch: Batch) -> Array:
    """The UNet's output for noised latents, controlled where the stage has a ControlNet."""
    added: dict[str, Any] = dict(prompt.added)
    more = dict(added)
    if "controlnet" in params:
        inputs: tuple[Any, ...] = (noisy, step, prompt.context, batch["condition"])
        more["control"] = networks.controlnet.apply({"params": params["controlnet"]}, *inputs, **added)
    inputs = (noisy, step, prompt.context)
    if "adapter" in params:
        more["images"] = networks.images(params, batch["prompt"], batch["keep_prompt"])
    return networks.unet.apply({"params": params["unet"]}, *inputs, **more)  # type: ignore[return-value]


def make_evaluators(config: Config, networks: Networks, tokenizers: Callable[[], Any]) -> tuple[Evaluator, ...]:
    """The evaluators that the config names."""
    evaluation = Evaluation(config.data, tokenizers, networks.draw, config.sampler, config.sample_steps, config.samples)
    makers = {
        "samples": evaluation.samples,
        "text": evaluation.text,
        "control": evaluation.control,
        "image_prompt": evaluation.image_prompt,
    }
    return tuple(Evaluator(name, lookup(makers, name, "evaluator")) for name in config.evaluators)


def load(path: str) -> Tree:
    """The networks of a published directory by their names here; further ones keep the names of their folders."""
    bundle = hub.load(path)
    if not bundle.components:
        raise ValueError(f"{path} holds one model, expected a directory of components with a model_index.json")
    names = {folder: name for name, folder in FOLDERS.items()}
    return {names.get(folder, folder): component.params for folder, component in bundle.components.items()}


_CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "controlnet": ["diffusers", "ControlNetModel"],
}


def make_bundle(config: Config, networks: Networks, tokenizers: Sequence[TextTokenizer], params: Tree) -> hub.Bundle:
    """An adapter's file; else a directory of components: the networks, the tokenisers and the sampler."""
    m = config.model
    if networks.adapter is not None:
        return hub.Bundle(networks.adapter, params["adapter"], m.adapter, format="safetensors")
    configs = {"unet": m.unet, "vae": m.vae, "text": m.text, "text_2": m.text_2}
    configs["controlnet"] = networks.controlnet.config
    components = {
        FOLDERS[name]: hub.Bundle(
            module,
            params[name],
            configs[name],
            processor=CLIPProcessor(None, {}, configs[name].context_length) if name.startswith("text") else None,
            format="transformers" if name.startswith("text") else "diffusers",
        )
        for name, module in networks.modules.items()
    }
    files = {f"tokenizer{'_2' * i}": tokenizer.files() for i, tokenizer in enumerate(tokenizers)}
    sampler = write_sampler(config.sampler)
    index = {"_class_name": f"StableDiffusion{'XL' * m.penultimate}{'ControlNet' * ('controlnet' in params)}Pipeline"}
    index |= {name: _CLASSES[name] for name in components}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in files}
    index |= {"scheduler": ["diffusers", sampler["_class_name"]]}
    documents = files | {"scheduler": {FILE: json.dumps(sampler, indent=2).encode()}}
    return assemble(components, "diffusers", index, documents)


# Heads and MLP columns over `tensor`, widths over `fsdp`, where they divide; dimensions are those of one layer.
SHARDING: Rules[str] = (
    (r".*/attn\d?/(query|key|value)/kernel", "fsdp tensor -|fsdp - -|-"),
    (r".*/attn\d?/out/kernel", "tensor - fsdp|- - fsdp|-"),
    (r".*/ff/(fc1|gate)/kernel", "fsdp tensor|fsdp -|-"),
    (r".*/ff/fc2/kernel", "tensor fsdp|- fsdp|-"),
    (r".*", "auto"),
)
