"""Wav2Lip: lip-sync expert, generator and GAN; smoke runs on drawn talking faces, and the published settings.

Smoke runs (the default) on drawn faces, one after the other; each begins from the one before it:
    from=; for stage in expert warmup generator gan; do
    python -m omnax.train --config configs/wav2lip.py:stage=$stage --workdir runs/wav2lip/$stage \\
        --config.init_from.path=$from; from=runs/wav2lip/$stage; done
Figures are in docs/wav2lip.md.

The argument chooses stage, data and size:
    stage=warmup           the generator's first steps, on one drawn person (see `smoke`); only for data=many
    data=one               one drawn person all along, half the width (the quickest), without a warm-up: expert accuracy
                           0.81 on unseen clips after 100 steps, r of mouth and strange sound 0.77 after 300
    data=FOLDER            real clips that `python -m omnax.infer prepare-faces` made of videos
    size=published         full width and the published hyper-parameters (batch 64 or 16 clips, Adam 1e-4, no schedule);
                           the default with a folder. stage=generator is the published model without a GAN
                           (sync weight 0.01), stage=gan the one with it (0.03, discriminator 0.07)
Weights of Rudrabha/Wav2Lip start a run too: --config.init_from.path=FOLDER with lipsync_expert.pth and others.
"""

from typing import Any

from ml_collections import ConfigDict

from .common import parse_arg

Settings = dict[str, Any]
STAGES = ("expert", "warmup", "generator", "gan")


def get_config(arg: str | None = None) -> ConfigDict:
    """See the head of this file."""
    chosen = parse_arg(
        arg, stage=tuple(dict.fromkeys(("expert", *STAGES))), data="many", size=("", "smoke", "published")
    )
    drawn = chosen.data in ("many", "one")
    size = chosen.size or ("smoke" if drawn else "published")
    warmed = (size, chosen.data) == ("smoke", "many")
    if chosen.stage == "warmup" and not warmed:
        raise ValueError(f"stage=warmup is for size=smoke and data=many, got {size!r} and {chosen.data!r}")
    data = {"identities": chosen.data} if drawn else {"name": "folder", "path": chosen.data}
    settings = published(chosen.stage) if size == "published" else smoke(chosen.stage, chosen.data)
    own = {"recipe": "wav2lip", "stage": "expert" if chosen.stage == "expert" else "generator"}
    settings["data"] = data | settings.get("data", {})
    required = () if chosen.stage == "expert" else ("expert/.*",)
    return ConfigDict(own | {"init_from": {"skip": fresh(chosen.stage, warmed), "required": required}} | settings)


def fresh(stage: str, warmed: bool) -> tuple[str, ...]:
    """Networks that a stage does not take from the run before it."""
    if stage == "gan":
        return ("discriminator/.*",)
    return ("generator/.*",) if stage == ("warmup" if warmed else "generator") else ()


def smoke(stage: str, data: str) -> Settings:
    """A quarter of the width, an eighth for one person; learns in minutes.

    Why a warm-up on one person: where every clip has colours of its own, a generator begins by copying them out of the
    reference through its finest skip connections, and the reference's mouth with them. A copied mouth moves, out of
    step, and there the expert gives no direction: the gradient of its loss has the right sign for 44 % of such windows,
    for 91 % where the mouth stays half open. Some runs left that state after 150 steps, some not within 300. One
    person's colours need no reference, so the mouth has only the sound to go by, and it goes on listening afterwards.
    """
    many = data == "many"
    settings: Settings = {
        "model": {"width_mult": 0.25 if many else 0.125},
        "data": {"threads": 2, "windows_per_clip": 16 if many and stage == "expert" else 4},
        "optimizer": adam(1e-3, kind="cosine" if many else "constant"),
        "log_every": 10,
        "evaluate_every": 50,
        "save_every": 50,
    }
    if stage == "expert":
        settings["batch_size"] = 32
        if not many:
            return settings | {"total_steps": 100}
        settings["data"]["train_clips"] = 96
        return settings | {"total_steps": 300, "evaluate_every": 100}
    settings |= {"batch_size": 4, "sync_weight": 0.03, "evaluators": ("sync", "cross_audio")}
    if many:
        settings["mel_offset"] = 0  # unlike published: sounds begin with their frame, as in inference
    if stage == "warmup":
        settings["data"]["identities"] = "one"
        return settings | {"optimizer": adam(1e-3), "total_steps": 175, "evaluate_every": 100}
    if many:
        # Unlike published: the sync term joins at the first evaluation, as its gradient is of use after the warm-up.
        settings["sync_below"] = 4.0
    if stage == "generator":
        return settings | ({"total_steps": 120, "evaluate_every": 40} if many else {"total_steps": 300})
    gan = {"adversarial_weight": 0.07, "optimizer": adam(1e-4, b1=0.5), "total_steps": 40}
    return settings | gan | {"evaluate_every": 20, "save_every": 20, "evaluators": ("sync", "cross_audio", "lse")}


def published(stage: str) -> Settings:
    """color_syncnet_train.py, wav2lip_train.py and hq_wav2lip_train.py of Rudrabha/Wav2Lip; stopped by hand there."""
    if stage == "expert":
        long = {"total_steps": 200_000, "evaluate_every": 10_000, "save_every": 10_000}
        return {"batch_size": 64, "optimizer": adam(1e-4)} | long
    settings: Settings = {"batch_size": 16, "total_steps": 300_000, "evaluate_every": 3000, "save_every": 3000}
    if stage == "generator":
        return settings | {"sync_weight": 0.01, "optimizer": adam(1e-4)}
    return settings | {"sync_weight": 0.03, "adversarial_weight": 0.07, "optimizer": adam(1e-4, b1=0.5)}


def adam(lr: float, b1: float = 0.9, kind: str = "constant") -> Settings:
    """torch.optim.Adam; the published rate is constant."""
    return {"name": "adam", "lr": lr, "b1": b1, "schedule": {"kind": kind}}
