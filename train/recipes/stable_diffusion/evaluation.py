"""Pictures drawn from held-out captions, and what those of drawn shapes show: the right colour, in the right place?"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from scipy import ndimage

from ....data import pipeline
from ....data.drawn.control_shapes import COLORS, GROUNDS
from ....data.images.decode import decode_image
from ....data.text.bpe import TextTokenizer
from ....models.samplers import SamplerConfig, make_schedule
from ...evaluation.host import replicated
from ...evaluation.pictures import draw_curves
from ...metrics import read_metrics
from ...state import TrainState
from .data import PictureConfig, make_preprocess

Draw = Callable[..., Any]  # (params, schedule, batch, negative tokens) -> pictures
Results = dict[str, float | np.ndarray]
_FAR = 0.5  # of colours in [-1, 1] from the ground's: then a pixel is the shape's


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Draws the first `count` held-out examples by DDIM, from the same noise each time."""

    data: PictureConfig
    tokenizers: Callable[[], Sequence[TextTokenizer]]
    draw: Draw
    sampler: SamplerConfig
    steps: int
    count: int

    @functools.cached_property
    def batch(self) -> dict[str, np.ndarray]:
        """The examples as training has them, but whole: no text and no image prompt is dropped."""
        whole: Any = dict.fromkeys(("drop_text", "drop_image", "drop_both"), 0.0)
        # Words that training always leaves out, for the image prompt to tell, are left out here too.
        whole["drop_words_share"] = float(self.data.drop_words_share == 1)
        data = dataclasses.replace(self.data, preprocess=self.data.preprocess_test, **whole)
        stream = pipeline.Stream(data.open(data.test_split), make_preprocess(data, self.tokenizers()))
        return next(pipeline.evaluate(stream, batch_size=min(self.count, len(stream.source))))

    @functools.cached_property
    def program(self) -> Callable[..., Any]:
        """`program(params, batch, negative)`: one sampling run."""
        sampler = dataclasses.replace(self.sampler, kind="ddim", spacing="trailing", steps_offset=0)
        schedule = make_schedule(sampler, self.steps)
        return replicated(lambda params, batch, negative: self.draw(params, schedule, batch, negative))

    def pictures(self, state: TrainState, **changed: np.ndarray) -> np.ndarray:
        """Pictures [B, X, Y, 3] in [-1, 1] for the batch with other fields."""
        arrays = {key: value for key, value in (self.batch | changed).items() if key not in ("index", "mask")}
        negative = np.stack([np.asarray(tokenizer("")[0]) for tokenizer in self.tokenizers()])
        tokens = np.broadcast_to(negative, arrays["tokens"].shape)
        drawn = self.program(state.averaged_params, arrays, tokens)
        return np.clip(np.asarray(jax.device_get(drawn)), -1, 1)

    def samples(self, state: TrainState) -> Results:
        """The pictures, beside what they were drawn from."""
        shown = [self.batch[key] * 2 - 1 for key in ("condition",) if key in self.batch]
        return {"samples": np.stack([self.batch["image"], *shown, self.pictures(state)])}

    @functools.cached_property
    def shapes(self) -> list[dict[str, Any]]:
        """Of drawn shapes: the area, and the numbers of colour and ground. ValueError for other data."""
        if self.data.name != "control_shapes":
            raise ValueError(f"this measures drawn shapes, data.name is {self.data.name!r}")
        source = self.data.open(self.data.test_split, ("mask",))
        found = []
        for index in self.batch["index"]:
            example = source[int(index)]
            ground = example["captions"][0].split()[-1]
            area = decode_image(example["mask"], 1)[..., 0] > 0
            found.append({"area": area, "color": example["label"], "ground": list(GROUNDS).index(ground)})
        return found

    def text(self, state: TrainState) -> Results:
        """Share of pictures whose shape has the caption's colour."""
        drawn = self.pictures(state)
        return {"color_accuracy": self._colored(drawn)}

    def control(self, state: TrainState) -> Results:
        """Overlap of the drawn shapes with the hints' areas, with strange hints too; colours within the areas."""
        drawn = self.pictures(state)
        strange = self.pictures(state, condition=np.roll(self.batch["condition"], 1, 0))
        iou, other = (self._overlap(pictures) for pictures in (drawn, strange))
        right = [nearest_color(x, s["area"]) == s["color"] for x, s in zip(drawn, self.shapes, strict=True)]
        return {"iou": iou, "shuffled_iou": other, "gap": iou - other, "color_accuracy": float(np.mean(right))}

    def _overlap(self, pictures: np.ndarray) -> float:
        pairs = [(foreground(x, s["ground"]), s["area"]) for x, s in zip(pictures, self.shapes, strict=True)]
        return float(np.mean([(a & b).sum() / max((a | b).sum(), 1) for a, b in pairs]))

    def image_prompt(self, state: TrainState) -> Results:
        """Share of pictures whose shape has the image prompt's colour, also with the adapter at scale 0."""
        found: Results = {}
        for name, scale in (("match", 1.0), ("match_without", 0.0)):
            found[name] = self._colored(self.pictures(state, scale=np.full(len(self.shapes), scale, np.float32)))
        return found

    def _colored(self, pictures: np.ndarray) -> float:
        pairs = zip(pictures, self.shapes, strict=True)
        return float(np.mean([nearest_color(x, foreground(x, s["ground"])) == s["color"] for x, s in pairs]))


def foreground(picture: np.ndarray, ground: int) -> np.ndarray:
    """The pixels [X, Y] that are not of the ground's colour."""
    color = np.array(list(GROUNDS.values())[ground]) / 127.5 - 1
    return np.sqrt(np.square(picture - color).sum(-1)) > _FAR


def nearest_color(picture: np.ndarray, area: np.ndarray) -> int:
    """The shapes' colour that an area's mean is nearest to, without its rim if more is left; -1 of an empty area."""
    if not area.any():
        return -1
    inside: Any = ndimage.binary_erosion(area)
    mean = picture[inside if inside.any() else area].mean(0)
    palette = np.array(list(COLORS.values())) / 127.5 - 1
    return int(np.square(palette - mean).sum(-1).argmin())


def draw_pictures(workdir: Path, results: dict[str, Any]) -> list[Path]:
    """training.png: loss and evaluations; samples.png: held-out images, hints and what was drawn, in rows."""
    lines = read_metrics(workdir)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, lines, "loss")
    for name in ("iou", "shuffled_iou", "color_accuracy", "match", "match_without"):
        draw_curves(right, lines, name)
    paths = [workdir / "training.png"]
    figure.savefig(paths[0], dpi=120)
    sheet = next((result["samples"] for result in results.values() if "samples" in result), None)
    if sheet is not None:
        paths.append(workdir / "samples.png")
        draw_sheet(paths[1], sheet)
    return paths


def draw_sheet(path: Path, pictures: np.ndarray, most: int = 16) -> None:
    """Pictures [rows, columns, X, Y, 3] in [-1, 1], up to so many columns."""
    pictures = pictures[:, :most]
    figure = Figure(figsize=(pictures.shape[1], len(pictures)), layout="constrained")
    places = figure.subplots(*pictures.shape[:2], squeeze=False).flat
    for axes, picture in zip(places, pictures.reshape(-1, *pictures.shape[2:]), strict=True):
        axes.imshow(np.clip(picture / 2 + 0.5, 0, 1), interpolation="nearest")
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
