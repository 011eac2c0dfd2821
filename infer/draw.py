"""Draw pictures from text with Stable Diffusion, guided by control images (ControlNet) and image prompts (IP-Adapter).

Every picture has a seed of its own, so it is the same in any batch. What it was drawn from stands in its PNG file.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL.PngImagePlugin import PngInfo
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..data.files import printable
from ..data.images.decode import to_pil
from ..data.images.edges import canny_edges
from ..data.images.resize import RESIZE
from ..data.text.tokens import Overflow
from ..models.samplers import SAMPLERS, make_schedule
from ..models.stable_diffusion.pipeline import control_scales
from ..storage.paths import as_path
from ..storage.writing import staged
from .diffusion import Diffusion, load_diffusion
from .images import read_pixels

RESIZING = ("notice", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", required=True, help="directory of components, as diffusers writes Stable Diffusion"
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw")
    parser.add_argument("--out", type=as_path, default=Path("drawn"), help="folder for the pictures, or one .png file")
    parser.add_argument("--negative", help="what not to draw")
    parser.add_argument("--count", type=int, default=1, help="pictures a prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; each further one has the next")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="default: as it was trained")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), default="", help="default: the checkpoint's own")
    parser.add_argument("--eta", type=float, default=0.0, help="share of DDPM's noise in sampler ddim")
    parser.add_argument("--guidance", type=float, default=7.5, help="1 or less: none")
    parser.add_argument("--rescale", type=float, default=0.0, help="of the guidance; 0.7 with zero-terminal SNR")
    parser.add_argument("--clip-skip", type=int, default=0, help="blocks of the text encoder that are left out")
    parser.add_argument("--long-prompt", choices=("cut", "error"), default="cut", help="what a prompt of too many is")
    parser.add_argument("--control", nargs="+", default=(), metavar="IMAGE", help="an image for each ControlNet")
    parser.add_argument("--controlnet", nargs="+", default=(), metavar="DIR", help="default: that of the weights")
    parser.add_argument("--control-scale", type=float, nargs="+", default=(1.0,), help="one for all, or one for each")
    parser.add_argument("--control-range", type=float, nargs=2, default=(0.0, 1.0), metavar=("START", "END"))
    parser.add_argument("--canny", type=float, nargs=2, metavar=("LOW", "HIGH"), help="control by an image's edges")
    parser.add_argument("--guess-mode", action="store_true", help="control without the prompt's help")
    parser.add_argument("--resize-control", choices=RESIZING, default="notice", help="for an image of another size")
    parser.add_argument("--ip-image", nargs="+", default=(), metavar="IMAGE", help="image prompts")
    parser.add_argument("--adapter", default="", help="IP-Adapter file")
    parser.add_argument("--image-encoder", default="", help="directory; default: the component of the weights")
    parser.add_argument("--ip-scale", type=float, default=1.0)
    parser.add_argument("--image", default="", help="picture to draw on from")
    parser.add_argument("--strength", type=float, default=0.8, help="how much of --image is drawn anew, up to 1")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures drawn at once")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16")


def run(arguments: argparse.Namespace) -> None:
    options = Options(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Options)})
    begin = time.perf_counter()
    drawn = draw(options, load(options, bfloat16=arguments.bfloat16))
    seconds = time.perf_counter() - begin
    paths = save(drawn, arguments.out)
    print(f"{len(paths)} pictures in {seconds:.1f} s: {', '.join(map(str, paths[:4]))}{', …' * (len(paths) > 4)}")


# diffusers' load_image shows the colours beneath what is transparent.
ALPHA = "drop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The settings of `add_arguments`; ValueError for senseless ones."""

    prompts: Sequence[str]
    weights: str = ""
    negative: str | None = None
    count: int = 1
    seed: int = 0
    size: Sequence[int] | None = None
    steps: int = 50
    sampler: str = ""
    eta: float = 0.0
    guidance: float = 7.5
    rescale: float = 0.0
    clip_skip: int = 0
    long_prompt: str = "cut"
    control: Sequence[str] = ()
    controlnet: Sequence[str] = ()
    control_scale: Sequence[float] = (1.0,)
    control_range: Sequence[float] = (0.0, 1.0)
    canny: Sequence[float] | None = None
    guess_mode: bool = False
    resize_control: str = "notice"
    ip_image: Sequence[str] = ()
    adapter: str = ""
    image_encoder: str = ""
    ip_scale: float = 1.0
    image: str = ""
    strength: float = 0.8
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name, least in {"count": 1, "seed": 0, "batch_size": 1, "steps": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {least} or more")
        if not 0 < self.strength <= 1 or int(self.steps * self.strength) < 1:
            raise ValueError(f"strength {self.strength} of {self.steps} steps, expected up to 1 and at least one step")
        if bool(self.ip_image) != bool(self.adapter):
            raise ValueError("image prompts go with an adapter: give both --ip-image and --adapter")
        if self.control and len(self.control_scale) not in (1, len(self.control)):
            raise ValueError(f"{len(self.control_scale)} control scales for {len(self.control)} control images")

    @property
    def scales(self) -> list[float]:
        """A scale for each control image."""
        return list(self.control_scale) * (len(self.control) if len(self.control_scale) == 1 else 1)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A picture, uint8 [X, Y, 3], and what it was drawn from."""

    pixels: np.ndarray
    settings: dict[str, Any]


def load(options: Options, *, bfloat16: bool = False) -> Diffusion:
    """The networks that the options ask for."""
    return load_diffusion(
        options.weights,
        dtype=jnp.bfloat16 if bfloat16 else None,
        controlnets=options.controlnet,
        adapter=options.adapter,
        image_encoder=options.image_encoder,
        num_controls=len(options.control),
    )


def draw(options: Options, diffusion: Diffusion) -> list[Drawn]:
    """Draws every prompt `count` times, `batch_size` at once; all batches run one program."""
    size, skip = diffusion.size(options.size), options.clip_skip
    start = options.steps - int(options.steps * options.strength) if options.image else 0
    schedule = make_schedule(diffusion.sampler(options.sampler, eta=options.eta), options.steps, start)
    prompts = [prompt for prompt in options.prompts for _ in range(options.count)]
    overflow = check_prompts(options, diffusion)
    scales = [control_scales(scale, len(schedule.timesteps), *options.control_range) for scale in options.scales]
    hints = [read_hint(path, options, size) for path in options.control]
    shown = [read_pixels(path, 3, ALPHA) for path in options.ip_image]
    more: dict[str, Any] = {
        "guidance": options.guidance,
        "rescale": options.rescale,
        "guess_mode": options.guess_mode,
        "hints": list(zip(hints, scales, strict=True)),
        "image_tokens": diffusion.tokens_of(shown) if shown else None,
        "image_scale": options.ip_scale,
        "picture": resized(options.image, size) / np.float32(127.5) - 1 if options.image else None,
    }
    negative = diffusion.negative(options.negative, size, skip) if options.guidance > 1 else None
    batch = min(options.batch_size, len(prompts))
    drawn: list[Drawn] = []
    with _progress() as progress:
        rounds = -(-len(prompts) // batch)
        task = progress.add_task("steps", total=rounds * len(schedule.timesteps))
        with TICKER.on(progress, task):
            for first in range(0, len(prompts), batch):
                chosen = [min(first + i, len(prompts) - 1) for i in range(batch)]  # the last batch is filled up
                keys = jnp.stack([jax.random.key(options.seed + i) for i in chosen])
                text = diffusion.prompt([prompts[i] for i in chosen], size, skip, overflow)
                noise = diffusion.noise(keys, size)
                found = to_pixels(diffusion.draw(schedule, text, negative, keys, noise, progress=TICKER, **more))
                for pixels, i in zip(found, range(first, min(first + batch, len(prompts))), strict=False):
                    drawn.append(Drawn(pixels, describe(options, prompts[i], options.seed + i, size)))
    return drawn


class Ticker:
    """Moves the progress bar that is shown now by one a call. There is one, so that none makes a new program."""

    def __init__(self) -> None:
        self._advance: Callable[[], None] = lambda: None

    def __call__(self, step: Any) -> None:
        self._advance()

    @contextlib.contextmanager
    def on(self, progress: Progress, task: TaskID) -> Iterator[None]:
        """Calls move this bar."""
        self._advance = functools.partial(progress.advance, task)
        try:
            yield
            jax.effects_barrier()
        finally:
            self._advance = lambda: None


TICKER = Ticker()


def check_prompts(options: Options, diffusion: Diffusion) -> Overflow:
    """Says which end of a long prompt is not read; ValueError where the options make that an error."""
    for prompt in options.prompts:
        if lost := diffusion.cut(prompt):
            if options.long_prompt == "error":
                most = diffusion.tokenizers[0].context_length
                raise ValueError(f"prompt of more than {most} tokens, of which {printable(lost)!r} would be cut off")
            print(f"prompt too long: {printable(lost)!r} is not read")
    return "truncate"


def read_hint(path: str, options: Options, size: tuple[int, int]) -> np.ndarray:
    """A control image [X, Y, 3] in [0, 1] of the picture's size; ValueError for another where the options say so."""
    pixels = read_pixels(path, 3, ALPHA)
    if pixels.shape[:2] != size:
        said = (
            f"control image {path} has {pixels.shape[0]} x {pixels.shape[1]} pixels, the picture {size[0]} x {size[1]}"
        )
        if options.resize_control == "error":
            raise ValueError(f"{said}; expected the same")
        print(f"{said}: resized")
        pixels = RESIZE["pil_lanczos"](pixels, size)
    if options.canny:
        pixels = np.repeat(canny_edges(pixels, *options.canny)[..., None], 3, -1)
    return pixels.astype(np.float32) / 255


def resized(path: str, size: tuple[int, int]) -> np.ndarray:
    """A picture's pixels in another size, as diffusers resizes what it draws on from."""
    pixels = read_pixels(path, 3, ALPHA)
    return pixels if pixels.shape[:2] == size else RESIZE["pil_lanczos"](pixels, size)


def to_pixels(pictures: Any) -> np.ndarray:
    """[-1, 1] to uint8."""
    return np.asarray(jnp.rint(jnp.clip(pictures * 127.5 + 127.5, 0, 255)).astype(jnp.uint8))


def describe(options: Options, prompt: str, seed: int, size: tuple[int, int]) -> dict[str, Any]:
    """All options that differ from their defaults, for one picture."""
    given = {
        f.name: getattr(options, f.name)
        for f in dataclasses.fields(Options)
        if f.name not in ("prompts", "seed", "count", "batch_size", "size")
        and getattr(options, f.name) != (None if f.default is dataclasses.MISSING else f.default)
    }
    return {"prompt": prompt, "seed": seed, "size": list(size), "steps": options.steps} | given


def save(drawn: Sequence[Drawn], out: Path) -> list[Path]:
    """PNG files with what they were drawn from in the texts "prompt" and "parameters" (JSON)."""
    single = out.suffix.lower() == ".png"
    if single and len(drawn) > 1:
        raise ValueError(f"out is {out}, expected a folder for {len(drawn)} pictures")
    paths = [out] if single else [out / f"{i:04d}.png" for i in range(len(drawn))]
    for path, one in zip(paths, drawn, strict=True):
        info = PngInfo()
        info.add_itxt("prompt", one.settings["prompt"])
        info.add_itxt("parameters", json.dumps(one.settings, ensure_ascii=False))
        with staged(path) as file:
            to_pil(one.pixels).save(file, "png", pnginfo=info)
    return paths


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
