"""What DINO, iBOT and DINOv2 compute in a step: teacher's targets, student's outputs, and the terms of the loss.

The teacher is the average of the student that the train state keeps (`state.ema`), or a frozen network under `teacher/`
of the parameters. Masked patches are gathered into buffers of a fixed size, one for each group of images, before they
reach a head: heads and prototypes never see the rest. Source: facebookresearch/dinov2:dinov2/train/ssl_meta_arch.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from ....data.lookup import lookup
from ....kernels.constraints import constrain
from ....models.dinov2 import Dinov2, Head
from ....models.ranges import BelowOne, Count, NonNegative, Positive, Whole
from ....objectives import self_distillation as objectives
from ....objectives.prototypes import Factors, blockwise_dino_loss, blockwise_ibot_loss
from ...recipe import Batch, Terms
from ...rules import Tree
from ...state import TrainState

CENTERINGS = ("centering", "sinkhorn_knopp", "softmax_centering", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """How the teacher's logits become targets."""

    # "centering" (DINO, iBOT, DINOv2's short recipe), "sinkhorn_knopp" (DINOv2), "softmax_centering" (centred after the
    # softmax), "none" (the plain softmax)
    centering: str = "sinkhorn_knopp"
    temperature: tuple[Positive, Positive] = (0.04, 0.07)  # linear over the warm-up, then the second
    warmup: Whole = 0  # steps
    iterations: Count = 3  # rounds of Sinkhorn-Knopp
    center_momentum: BelowOne = 0.9
    center_all_patches: bool = False  # iBOT: the patches' centre is the mean over all of them, not the masked ones
    frozen: bool = False  # distillation: the teacher is given and stays (arXiv 2304.07193, section 5)

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(CENTERINGS), self.centering, "teacher.centering")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the terms; a term of weight 0 is not computed."""

    dino: NonNegative = 1.0
    ibot: NonNegative = 1.0
    koleo: NonNegative = 0.1
    koleo_crops: Count = 2  # the code regularises both global crops, the paper's appendix B.1 the first
    temperature: Positive = 0.1  # the student's
    # Rows of each group of images whose logits exist at a time, in the teacher's balancing, the losses and the backward
    # pass (objectives/prototypes.py: the same values in less memory, for more FLOPs); 0: all at once. Sinkhorn only.
    block: Whole = 0

    def __post_init__(self) -> None:
        if self.block < 0:
            raise ValueError(f"losses.block must not be negative, got {self.block}")


@dataclasses.dataclass(frozen=True)
class Networks:
    """A backbone and its heads; without an `ibot_head`, patches share `dino_head`."""

    backbone: Dinov2
    dino_head: Head
    ibot_head: Head | None = None

    def init(self, rng: Array, image: Float[Array, "B X Y C"]) -> Tree:
        """Random parameters: {"backbone", "dino_head"} and {"ibot_head"} where it is separate."""
        keys = jax.random.split(rng, 3)
        out, variables = self.backbone.init_with_output(keys[0], image)
        heads = {"dino_head": self.dino_head, "ibot_head": self.ibot_head}
        params: Any = {
            name: head.init(key, out["cls"])["params"]  # type: ignore[index]
            for (name, head), key in zip(heads.items(), keys[1:], strict=True)
            if head is not None
        }
        return {"backbone": variables["params"]} | params

    def tokens(self, params: Tree, images: Float[Array, "B G X Y C"], **options: Any) -> tuple[Array, Array]:
        """Class tokens [B, G, D] and patches [B, G, P, D] of G crops per image; `options` go to the backbone."""
        batch = images.shape[0]
        out: Any = self.backbone.apply(
            {"params": params["backbone"]}, rearrange(images, "b g x y c -> (b g) x y c"), **options
        )
        cls = rearrange(out["cls"], "(b g) d -> b g d", b=batch)
        return cls, rearrange(out["patches"], "(b g) x y d -> b g (x y) d", b=batch)

    def cls_logits(self, params: Tree, cls: Float[Array, "B G D"]) -> Float[Array, "B G V"]:
        logits: Any = self.dino_head.apply({"params": params["dino_head"]}, cls)
        return constrain(logits, "batch", None, "vocab")

    def patch_logits(self, params: Tree, patches: Float[Array, "G M D"]) -> Float[Array, "G M V"]:
        head, name = self.patch_head
        logits: Any = head.apply({"params": params[name]}, patches)
        return constrain(logits, "batch", None, "vocab")

    @property
    def patch_head(self) -> tuple[Head, str]:
        return (self.ibot_head, "ibot_head") if self.ibot_head else (self.dino_head, "dino_head")

    def cls_factors(self, params: Tree, cls: Float[Array, "N M S D"]) -> Factors:
        """Class tokens of N groups of images, for logits in blocks."""
        return factors(self.dino_head, params["dino_head"], cls)

    def patch_factors(self, params: Tree, patches: Float[Array, "N M D"]) -> Factors:
        """Gathered patches of N groups of images, for logits in blocks."""
        head, name = self.patch_head
        return factors(head, params[name], patches[:, :, None])


@dataclasses.dataclass(frozen=True)
class Step:
    """The loss of a training step; `networks` of the student, `teacher` of the teacher (mostly the same)."""

    networks: Networks
    teacher_networks: Networks
    teacher: TeacherConfig
    losses: LossConfig
    groups: int  # of images: masked patches are gathered, and neighbours for KoLeo searched, within each
    bound: int  # the most masked patches in a group

    def loss(self, params: Tree, state: TrainState, batch: Batch, rng: Array) -> tuple[Array, tuple[Terms, Tree]]:
        """Total, terms and new centres; see `Recipe`."""
        teacher = jax.lax.stop_gradient(params["teacher"] if self.teacher.frozen else state.averaged_params)
        temperature = objectives.teacher_temperature(state.step, *self.teacher.temperature, self.teacher.warmup)
        global_rng, local_rng = jax.random.split(rng)
        masked = batch.get("masked")
        flat_mask = None if masked is None else rearrange(masked, "b g x y -> (b g) x y")
        cls_t, patches_t = self.teacher_networks.tokens(teacher, batch["global"])
        cls_s, patches_s = self.networks.tokens(
            params, batch["global"], masked=flat_mask, train=True, rngs={"dropout": global_rng}
        )
        total, terms, centers = jnp.float32(0), {"teacher_temperature": temperature}, {}
        if self.losses.dino:
            cls_all = cls_s
            if "local" in batch:
                cls_l, _ = self.networks.tokens(params, batch["local"], train=True, rngs={"dropout": local_rng})
                cls_all = jnp.concatenate([cls_s, cls_l], axis=1)
            loss, own, centers["dino"] = self.cls_loss(params, teacher, cls_all, cls_t, state, temperature)
            total += self.losses.dino * loss
            terms |= own
        if self.losses.ibot:
            count = batch["masked_count"][0] if "masked_count" in batch else None
            loss, own, centers["ibot"] = self.patch_loss(
                params, teacher, patches_s, patches_t, masked, state, temperature, count
            )
            total += self.losses.ibot * loss
            terms |= own
        if self.losses.koleo:
            crops = jnp.moveaxis(cls_s[:, : self.losses.koleo_crops], 1, 0)
            terms["koleo"] = jax.vmap(lambda x: objectives.koleo_loss(x, groups=self.groups)[0])(crops).sum()
            total += self.losses.koleo * terms["koleo"]
        return total, (terms, {"center": {name: center for name, center in centers.items() if center is not None}})

    def cls_loss(
        self,
        params: Tree,
        teacher: Tree,
        cls_s: Float[Array, "B S D"],
        cls_t: Float[Array, "B G D"],
        state: TrainState,
        temperature: Float[Array, ""],
    ) -> tuple[Array, Terms, Array | None]:
        """The DINO terms."""
        if self.losses.block:
            grouped = [rearrange(x, "(n b) s d -> n b s d", n=self.groups) for x in (cls_s, cls_t)]
            student = self.networks.cls_factors(params, grouped[0])
            target = self.teacher_networks.cls_factors(teacher, grouped[1])
            images = max(1, self.losses.block // cls_s.shape[1])
            loss, terms = blockwise_dino_loss(student, target, temperature, images, **self.block_options)
            return loss, {"dino": loss} | terms, None
        logits = self.teacher_networks.cls_logits(teacher, cls_t)
        targets, center = self.targets(rearrange(logits, "b g v -> (b g) v"), state, "dino", temperature)
        student = self.networks.cls_logits(params, cls_s)
        loss, terms = objectives.dino_loss(student, targets.reshape(logits.shape), temperature=self.losses.temperature)
        return loss, {"dino": loss} | terms | objectives.target_statistics(targets), center

    def patch_loss(
        self,
        params: Tree,
        teacher: Tree,
        patches_s: Float[Array, "B G P D"],
        patches_t: Float[Array, "B G P D"],
        masked: Bool[Array, "B G X Y"] | None,
        state: TrainState,
        temperature: Float[Array, ""],
        count: Float[Array, ""] | None = None,
    ) -> tuple[Array, Terms, Array | None]:
        """The iBOT term, on masked patches; on all of them where nothing is masked (distillation).

        `count`: masked patches of an average micro-batch, see `count_masked`.
        """
        flags = jnp.ones(patches_s.shape[:3], bool) if masked is None else rearrange(masked, "b g x y -> b g (x y)")
        places, weights = compact(flags, self.groups, self.bound)
        crops, share = flags.shape[0] * flags.shape[1], {"masked_share": flags.mean()}
        if self.losses.block:
            student = self.networks.patch_factors(params, gather(patches_s, places))
            target = self.teacher_networks.patch_factors(teacher, gather(patches_t, places))
            loss, terms = blockwise_ibot_loss(
                student, target, weights, crops, temperature, self.losses.block, **self.block_options
            )
            return loss, patch_terms(terms) | share, None
        logits_t = self.teacher_networks.patch_logits(teacher, gather(patches_t, places))
        valid = weights.reshape(-1) > 0
        targets, center = self.targets(
            rearrange(logits_t, "g m v -> (g m) v"), state, "ibot", temperature, valid, count
        )
        if self.teacher.center_all_patches:
            everything = self.teacher_networks.patch_logits(teacher, rearrange(patches_t, "b g p d -> b (g p) d"))
            center = self.center(everything, state, "ibot", temperature)
        logits_s = self.networks.patch_logits(params, gather(patches_s, places))
        loss, terms = objectives.ibot_loss(
            rearrange(logits_s, "g m v -> (g m) v"),
            targets,
            weights.reshape(-1),
            crops,
            temperature=self.losses.temperature,
        )
        return loss, patch_terms(terms | objectives.target_statistics(targets, valid)) | share, center

    @property
    def block_options(self) -> dict[str, Any]:
        """What both blockwise losses take."""
        return {"temperature": self.losses.temperature, "iterations": self.teacher.iterations}

    def targets(
        self,
        logits: Float[Array, "B V"],
        state: TrainState,
        name: str,
        temperature: Float[Array, ""],
        mask: Bool[Array, " B"] | None = None,
        count: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B V"], Array | None]:
        """Targets by the config's centring, and the new centre where there is one (in use from the next step on)."""
        if self.teacher.centering == "sinkhorn_knopp":
            rounds = self.teacher.iterations
            return objectives.sinkhorn_targets(logits, temperature, iterations=rounds, mask=mask), None
        if self.teacher.centering == "none":
            return objectives.centred_targets(logits, jnp.zeros(logits.shape[-1]), temperature), None
        old = state.variables["center"][name]
        by = objectives.centred_targets if self.teacher.centering == "centering" else objectives.prior_targets
        return by(logits, old, temperature), self.center(logits, state, name, temperature, mask, count)

    def center(
        self,
        logits: Float[Array, "*B V"],
        state: TrainState,
        name: str,
        temperature: Float[Array, ""],
        mask: Bool[Array, "*B"] | None = None,
        count: Float[Array, ""] | None = None,
    ) -> Float[Array, " V"] | None:
        """The moved centre: of logits, or with "softmax_centering" of probabilities."""
        if name not in state.variables["center"]:
            return None
        values = logits
        if self.teacher.centering == "softmax_centering":
            values = jax.nn.softmax(logits.astype(jnp.float32) / temperature)
        old = state.variables["center"][name]
        return objectives.update_center(old, values, momentum=self.teacher.center_momentum, mask=mask, count=count)

    def initial_centers(self) -> dict[str, Array]:
        """Zero logits, or uniform probabilities; none where the centring needs none."""
        if self.teacher.centering in ("sinkhorn_knopp", "none"):
            return {}
        heads = {"dino": self.networks.dino_head} if self.losses.dino else {}
        if self.losses.ibot:
            heads["ibot"] = self.networks.ibot_head or self.networks.dino_head
        counts = {name: head.config.prototypes for name, head in heads.items()}
        uniform = self.teacher.centering == "softmax_centering"
        return {name: jnp.full(count, 1 / count if uniform else 0.0) for name, count in counts.items()}


def factors(head: Head, params: Tree, tokens: Float[Array, "N M S D"]) -> Factors:
    """The factors of a head's logits."""
    features: Any = head.apply({"params": params}, tokens, method="features")
    prototypes: Any = head.apply({"params": params}, method="prototypes")
    return Factors(constrain(features, "batch", None, None, None), prototypes)


def patch_terms(terms: Terms) -> Terms:
    """Names that set the patches' terms apart from those of class tokens."""
    return {name if name == "ibot" else f"ibot_{name}": value for name, value in terms.items()}


def count_masked(batch: Batch, accumulation: int) -> Batch:
    """Adds "masked_count" [B], the masked patches of the whole batch over the number of micro-batches.

    The mean over micro-batches of centres that divide by it is the centre of the whole batch, however unequally the
    masked patches fall into micro-batches.
    """
    masked = batch["masked"]
    return {**batch, "masked_count": jnp.full(len(masked), masked.sum() / accumulation)}


def compact(
    masked: Bool[Array, "B G P"], groups: int, bound: int
) -> tuple[Int[Array, "groups M"], Float[Array, "groups M"]]:
    """The places of each group's masked patches, first to last, in a buffer of `bound` rows, and their loss weights.

    Surplus rows point anywhere and weigh 0. Places count within the group.
    """
    flags = rearrange(masked, "(n b) g p -> n (b g p)", n=groups)
    weights = rearrange(objectives.masked_weights(masked), "(n b) g p -> n (b g p)", n=groups)
    places = jnp.argsort(~flags, axis=-1, stable=True)[:, :bound]
    return places, jnp.take_along_axis(weights, places, axis=-1)


def gather(patches: Float[Array, "B G P D"], places: Int[Array, "groups M"]) -> Float[Array, "groups M D"]:
    """The patches at the places of `compact`; each group's stay on its device."""
    rows = rearrange(patches, "(n b) g p d -> n (b g p) d", n=places.shape[0])
    return jnp.take_along_axis(rows, places[..., None], axis=1)
