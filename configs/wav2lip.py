"""Wav2Lip: lip-sync expert, generator and GAN; smoke runs on drawn talking faces, and the published settings.

Smoke runs (the default), one after the other; each begins from the one before it. Measured on one CPU core: expert
accuracy 0.85 on unseen clips in 184 s, then r 0.84 of mouth and strange sound on unseen faces in 409 s:
    python -m omnax.train --config configs/wav2lip.py:stage=expert --workdir runs/expert
    python -m omnax.train --config configs/wav2lip.py:stage=generator --workdir runs/generator \\
        --config.init_from.path=runs/expert
    python -m omnax.train --config configs/wav2lip.py:stage=gan --workdir runs/gan \\
        --config.init_from.path=runs/generator

The argument chooses stage, data and size:
    data=one               one drawn person instead of many, half the width (the quickest): expert accuracy 0.81 on
                           unseen clips after 100 steps, r of mouth and strange sound 0.77 after 300 (6 CPU minutes)
    data=FOLDER            real clips that `python -m omnax.data.prepare_faces` made of videos
    size=published         full width and the published hyper-parameters (batch 64 or 16 clips, Adam 1e-4, no schedule);
                           the default with a folder. stage=generator is the published model without a GAN
                           (sync weight 0.01), stage=gan the one with it (0.03, discriminator 0.07)
Weights of Rudrabha/Wav2Lip start a run too: --config.init_from.path=FOLDER with lipsync_expert.pth and others.
"""

from typing import Any

from ml_collections import ConfigDict

from .common import parse_arg

Settings = dict[str, Any]
STAGES = ("expert", "generator", "gan")
# Networks that a stage does not take from the run before it.
FRESH = {"expert": (), "generator": ("generator/.*",), "gan": ("discriminator/.*",)}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the head of this file."""
    chosen = parse_arg(arg, stage="expert", data="many", size="")
    drawn = chosen.data in ("many", "one")
    size = chosen.size or ("smoke" if drawn else "published")
    if chosen.stage not in STAGES or size not in ("smoke", "published"):
        raise ValueError(f"expected a stage of {STAGES} and size smoke or published, got {chosen.stage!r}, {size!r}")
    data = {"identities": chosen.data} if drawn else {"name": "folder", "path": chosen.data}
    settings = published(chosen.stage) if size == "published" else smoke(chosen.stage, chosen.data)
    own = {"recipe": "wav2lip", "stage": "expert" if chosen.stage == "expert" else "generator"}
    settings["data"] = settings.get("data", {}) | data
    return ConfigDict(own | {"init_from": {"skip": FRESH[chosen.stage]}} | settings)


def smoke(stage: str, data: str) -> Settings:
    """A quarter of the width, an eighth for one person; learns in minutes."""
    many = data == "many"
    settings: Settings = {
        "model": {"width_mult": 0.25 if many else 0.125},
        "optimizer": adam(1e-3, kind="cosine" if many else "constant"),
        "data": {"threads": 2, "windows_per_clip": 16 if many and stage == "expert" else 4},
        "log_every": 10,
        "evaluate_every": 50,
        "save_every": 50,
    }
    if stage == "expert":
        return settings | {"batch_size": 32, "total_steps": 250 if many else 100}
    settings |= {"batch_size": 4, "sync_weight": 0.03, "evaluators": ("sync", "cross_audio")}
    if many:
        # Unlike published: a generator that spends its first steps on many skin colours ignores the sound, and at this
        # length may never come back to it, so the sync term joins at the first evaluation; and sounds begin with their
        # frame, as in inference.
        settings |= {"sync_below": 4.0, "mel_offset": 0}
    if stage == "generator":
        return settings | {"total_steps": 300}
    gan = {"adversarial_weight": 0.07, "optimizer": adam(1e-4, b1=0.5), "total_steps": 60}
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
