"""A training step of DINOv2 beside the same step in torch: same weights, same crops and masks, taking turns.

    python -m omnax.benchmarks.vs_torch_dinov2

ViT-S/14 with two global and four local crops per image, float32: the teacher's pass, the student's passes, Sinkhorn-
Knopp, the DINO, iBOT and KoLeo losses, the backward pass, clipping network by network, AdamW and the teacher's average.
The torch step is transformers' Dinov2Model with heads and losses as facebookresearch/dinov2 writes them. Prints the
terms of both, the ratio of their times, and that of plain matrix products, which bounds it.
"""

import argparse
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import hub
from ..data.images.masking import MaskConfig, mask_crops
from ..data.images.multicrop import CropsConfig
from ..models.dinov2 import HeadConfig
from ..models.dinov2 import config as body
from ..train.inputs import DataConfig
from ..train.optimizer import OptimizerConfig
from ..train.program import make_program
from ..train.recipes.dinov2 import recipe as dinov2
from ..train.recipes.dinov2.self_distillation import LossConfig, TeacherConfig
from ..train.schedules import Schedule
from ..train.settings import EmaConfig
from ..train.sharding import MeshConfig, make_mesh
from .vs_torch import Comparison, Run, compare, oracles

GLOBAL, LOCAL, LOCAL_COUNT, PROTOTYPES = 112, 56, 4, 4096
LEARNING_RATE, WEIGHT_DECAY, MOMENTUM, CLIP = 1e-4, 0.04, 0.99, 3.0
TEACHER, STUDENT = 0.04, 0.1  # temperatures
HEADS = ("dino_head", "ibot_head")


def make_config(batch: int) -> dinov2.Config:
    """The recipe at this size; positions are resized as transformers does."""
    schedule = Schedule(kind="constant")
    return dinov2.Config(
        recipe="dinov2",
        batch_size=batch,
        total_steps=1,
        model=body("S/14", image_size=GLOBAL, layer_scale=1.0, pos_interpolation="bicubic"),
        dino_head=HeadConfig(prototypes=PROTOTYPES),
        ibot_head=HeadConfig(prototypes=PROTOTYPES),
        teacher=TeacherConfig(temperature=(TEACHER, TEACHER)),
        losses=LossConfig(temperature=STUDENT),
        ema=EmaConfig(decay=MOMENTUM),
        crops=CropsConfig(global_size=GLOBAL, local_size=LOCAL, local_count=LOCAL_COUNT),
        mask=MaskConfig(group=batch),
        data=DataConfig(name="", preprocess=(), preprocess_test=()),
        optimizer=OptimizerConfig(lr=LEARNING_RATE, schedule=schedule, weight_decay=WEIGHT_DECAY, clip_norm=CLIP),
        evaluators=(),
    )


def make_batch(config: dinov2.Config) -> dict[str, np.ndarray]:
    """Random crops, and masks as the recipe draws them."""
    rng = np.random.default_rng(0)
    shapes = dinov2.batch_shapes(config)
    batch = {name: rng.normal(size=shapes[name].shape).astype(np.float32) for name in ("global", "local")}
    hide = mask_crops(config.mask, config.grid, seed=0)
    masks = [hide({"position": i}, rng)["masked"] for i in range(config.batch_size)]
    return batch | {"masked": np.stack(masks)}


def omnax_step(config: dinov2.Config, arrays: dict[str, np.ndarray]) -> tuple[Run, Any, float]:
    """The update of `train`, which returns the terms before the step; the parameters it starts from; its FLOPs."""
    recipe = dinov2.make_recipe(config)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = make_program(recipe, config, mesh)
        state = program.init(jax.random.key(0))
    params, batch = jax.device_get(state.params), jax.tree.map(jnp.asarray, arrays)

    def run() -> Any:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = jax.block_until_ready(program.update(state, batch))
        return np.array([metrics[name] for name in ("dino", "ibot", "koleo")])

    return run, params, recipe.flops_per_step


class TorchStep:
    """The step in torch, as dinov2:dinov2/train/ssl_meta_arch.py."""

    def __init__(self, config: dinov2.Config, params: Any, arrays: dict[str, np.ndarray]) -> None:
        self.torch, transformers = oracles()
        torch = self.torch
        with tempfile.TemporaryDirectory() as folder:
            hub.save(dinov2.make_bundle(config, params), folder, "transformers")
            backbones = [transformers.Dinov2Model.from_pretrained(folder) for _ in range(2)]
        self.student, self.teacher = (
            torch.nn.ModuleDict({"backbone": backbone} | {name: self.head(params[name]) for name in HEADS})
            for backbone in backbones
        )
        self.teacher.eval().requires_grad_(False)
        decayed = [p for name, p in self.student.named_parameters() if decays(name)]
        others = [p for name, p in self.student.named_parameters() if not decays(name)]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, LEARNING_RATE, fused=True)
        # Crops of all images one after another, as the reference's collate does.
        globals_, locals_ = (arrays[name].transpose(1, 0, 4, 2, 3) for name in ("global", "local"))
        self.globals, self.locals = (
            torch.from_numpy(np.ascontiguousarray(crops.reshape(-1, *crops.shape[2:]))) for crops in (globals_, locals_)
        )
        masked = np.moveaxis(arrays["masked"], 1, 0).reshape(len(self.globals), -1)
        self.masked = torch.from_numpy(masked)
        self.places = self.masked.flatten().nonzero().flatten()
        counts = masked.sum(1, keepdims=True)
        self.weights = torch.from_numpy((1 / np.maximum(counts, 1)).repeat(masked.shape[1], 1)[masked]).float()

    def head(self, params: Any) -> Any:
        """The MLP to the bottleneck, and the weight-normed last layer."""
        nn, layers = self.torch.nn, []
        for i in (1, 2, 3):
            kernel, bias = (self.torch.tensor(params[f"fc{i}"][leaf]) for leaf in ("kernel", "bias"))
            layers.append(nn.Linear(*kernel.shape))
            layers[-1].weight.data, layers[-1].bias.data = kernel.T.contiguous(), bias
        direction = self.torch.tensor(params["last_layer"]["direction"])
        last = nn.Linear(*direction.shape, bias=False)
        last.weight.data = direction.T.contiguous()
        last = nn.utils.parametrizations.weight_norm(last)
        last.parametrizations.weight.original0.data.fill_(1)
        mlp = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        return nn.ModuleDict({"mlp": mlp, "last": last})

    def logits(self, head: Any, tokens: Any) -> Any:
        """Prototypes' logits of normalised bottlenecks (dinov2:dinov2/layers/dino_head.py)."""
        return head["last"](self.torch.nn.functional.normalize(head["mlp"](tokens), eps=1e-12))

    def __call__(self) -> np.ndarray:
        """One step; the terms before it."""
        cls_targets, patch_targets = self.targets()
        self.optimizer.zero_grad()
        with self.torch.enable_grad():  # the tests' torch is without
            terms = self.terms(cls_targets, patch_targets)
            (terms * self.torch.tensor([1.0, 1.0, 0.1])).sum().backward()
        for network in self.student.values():
            self.torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        self.optimizer.step()
        with self.torch.no_grad():
            average, new = list(self.teacher.parameters()), list(self.student.parameters())
            self.torch._foreach_lerp_(average, new, 1 - MOMENTUM)
        return terms.detach().numpy()

    def terms(self, cls_targets: Any, patch_targets: Any) -> Any:
        """DINO, iBOT and KoLeo."""
        torch = self.torch
        out = self.student["backbone"](self.globals, bool_masked_pos=self.masked).last_hidden_state
        local = self.student["backbone"](self.locals).last_hidden_state[:, 0]
        cls, patches = out[:, 0], out[:, 1:].flatten(0, 1)[self.places]
        batch = len(cls) // 2
        log_probs = torch.log_softmax(self.logits(self.student["dino_head"], torch.cat([cls, local])) / STUDENT, -1)
        crops, targets = log_probs.split(batch), cls_targets.split(batch)
        pairs = [(q, s) for i, q in enumerate(targets) for j, s in enumerate(crops) if i != j]
        dino = -sum((q * s).sum(-1).mean() for q, s in pairs) / len(pairs)
        log_probs = torch.log_softmax(self.logits(self.student["ibot_head"], patches) / STUDENT, -1)
        ibot = -((patch_targets * log_probs).sum(-1) * self.weights).sum() / len(cls)
        koleo = sum(self.koleo(x) for x in cls.split(batch))
        return torch.stack([dino, ibot, koleo])

    def targets(self) -> tuple[Any, Any]:
        """The teacher's probabilities for class tokens and masked patches."""
        with self.torch.inference_mode():
            out = self.teacher["backbone"](self.globals).last_hidden_state
            cls, patches = out[:, 0], out[:, 1:].flatten(0, 1)[self.places]
            found = [
                self.sinkhorn(self.logits(self.teacher[name], x)) for name, x in zip(HEADS, (cls, patches), strict=True)
            ]
        return found[0].clone(), found[1].clone()  # no longer inference tensors

    def sinkhorn(self, logits: Any) -> Any:
        """dinov2:dinov2/loss/dino_clstoken_loss.py."""
        q = (logits / TEACHER).exp().t()
        prototypes, samples = q.shape
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdim=True)
            q /= prototypes
            q /= q.sum(0, keepdim=True)
            q /= samples
        return (q * samples).t()

    def koleo(self, features: Any) -> Any:
        """dinov2:dinov2/loss/koleo_loss.py."""
        x = self.torch.nn.functional.normalize(features, eps=1e-8)
        with self.torch.no_grad():
            similarity = x @ x.t()
            nearest = similarity.fill_diagonal_(-1).argmax(1)
        distance = self.torch.nn.functional.pairwise_distance(x, x[nearest], 2, 1e-8)
        return -(distance + 1e-8).log().mean()


def decays(name: str) -> bool:
    """Whether weight decay acts on a parameter of the torch networks (dinov2:dinov2/utils/param_groups.py)."""
    return not (name.endswith(".bias") or "norm" in name or "layer_scale" in name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = make_config(arguments.batch)
    arrays = make_batch(config)
    ours, params, flops = omnax_step(config, arrays)
    theirs = TorchStep(config, params, arrays)
    tokens = arguments.batch * 2 * ((GLOBAL // 14) ** 2 + 1)
    product = (tokens, config.model.width, config.model.mlp_dim)
    print(f"batch {arguments.batch}; products of [{product[0]}, {product[1]}] x [{product[1]}, {product[2]}]")
    compare(Comparison("training step", flops, {"omnax": ours, "torch": theirs}), product, arguments.rounds)


if __name__ == "__main__":
    main()
