"""Which patches a masked-image student does not see: block-wise and random masks (BEiT, iBOT, DINOv2).

Masks are bool [X, Y] over the patch grid, True = hidden. Source: facebookresearch/dinov2:dinov2/data/masking.py,
collate.py; bytedance/ibot:loader.py.
"""

import dataclasses
import math

import numpy as np

from ...models.ranges import Count, Fraction
from .transforms import Example, Transform

KINDS = ("block", "random", "ibot_block")
_STREAM = 1  # sets the draws of groups apart from those of examples, which are seeded by (seed, position)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How global crops are masked.

    `stratified` (DINOv2): of the crops of a group, exactly `int(share * crops)` are masked, their ratios spread evenly
    over `ratio`, in random order. Otherwise (iBOT): each crop is masked with probability `share`, with a ratio uniform
    in `ratio`.
    """

    kind: str = "block"
    ratio: tuple[Fraction, Fraction] = (0.1, 0.5)
    share: Fraction = 0.5
    stratified: bool = True
    group: Count = 32  # images among which the ratios are spread (the published recipe: one device's images)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mask kind is {self.kind!r}, expected one of {KINDS}")
        low, high = self.ratio
        if low > high:
            raise ValueError(f"mask ratio must be a range, got {tuple(self.ratio)}")


def block_mask(
    grid: tuple[int, int],
    target: int,
    rng: np.random.Generator,
    *,
    smallest: int = 4,
    largest: int | None = None,
    aspect: float = 0.3,
) -> np.ndarray:
    """Rectangles until `target` patches are hidden: never more, fewer where no further rectangle fits in ten tries.

    Args:
        grid: rows and columns of the mask.
        target: patches to hide.
        rng: source of randomness.
        smallest: area of the smallest rectangle drawn.
        largest: area of the largest, default `target`.
        aspect: log-uniform between this and its inverse.
    """
    rows, columns = grid
    mask = np.zeros(grid, bool)
    hidden = 0
    while hidden < target:
        budget = min(target - hidden, target if largest is None else largest)
        added = _add_block(mask, budget, rng, smallest, aspect, (rows, columns))
        if added == 0:
            break
        hidden += added
    return mask


def _add_block(
    mask: np.ndarray, budget: int, rng: np.random.Generator, smallest: int, aspect: float, grid: tuple[int, int]
) -> int:
    """Hides one rectangle that adds 1 … `budget` patches; the number added, 0 after ten failures."""
    for _ in range(10):
        area = rng.uniform(min(smallest, budget), max(smallest, budget))
        ratio = math.exp(rng.uniform(math.log(aspect), -math.log(aspect)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height >= grid[0] or width >= grid[1]:
            continue
        top, left = rng.integers(grid[0] - height + 1), rng.integers(grid[1] - width + 1)
        block = mask[top : top + height, left : left + width]
        added = int(block.size - block.sum())
        if 0 < added <= budget:
            block[:] = True
            return added
    return 0


def random_mask(grid: tuple[int, int], target: int, rng: np.random.Generator) -> np.ndarray:
    """Exactly `target` patches anywhere."""
    mask = np.zeros(grid[0] * grid[1], bool)
    mask[rng.permutation(mask.size)[:target]] = True
    return mask.reshape(grid)


def make_mask(config: MaskConfig, grid: tuple[int, int], target: int, rng: np.random.Generator) -> np.ndarray:
    """A mask of the config's kind. DINOv2 bounds a rectangle by half the grid, iBOT starts at (side / 3)^2."""
    if config.kind == "random":
        return random_mask(grid, target, rng)
    if config.kind == "ibot_block":
        return block_mask(grid, target, rng, smallest=(min(grid) // 3) ** 2)
    return block_mask(grid, target, rng, largest=grid[0] * grid[1] // 2)


def group_ratios(config: MaskConfig, crops: int, rng: np.random.Generator) -> np.ndarray:
    """The ranges [crops, 2] out of which each crop of a group draws its ratio; (0, 0): no mask."""
    masked = int(crops * config.share)
    edges = np.linspace(*config.ratio, masked + 1)
    ranges = np.zeros((crops, 2))
    ranges[:masked] = np.stack([edges[:-1], edges[1:]], axis=1)
    return rng.permutation(ranges)


def masked_bound(config: MaskConfig, grid: tuple[int, int], crops: int = 2) -> int:
    """The most patches that can be hidden in one group of images with `crops` global crops each."""
    patches, total = grid[0] * grid[1], crops * config.group
    if not config.stratified:
        return total * int(patches * config.ratio[1])
    edges = np.linspace(*config.ratio, int(total * config.share) + 1)
    return sum(int(patches * edge) for edge in edges[1:])


def mask_crops(config: MaskConfig, grid: tuple[int, int], seed: int, crops: int = 2) -> Transform:
    """Adds "masked" [crops, X, Y], the masks of an example's global crops.

    Stratified masks use the example's "position" in the endless stream: examples with the same position // group belong
    together, and their common draw depends on (seed, that number) alone, whatever process loads them.
    """

    def ranges(example: Example, rng: np.random.Generator) -> np.ndarray:
        if not config.stratified:
            return np.where(rng.random((crops, 1)) < config.share, np.array(config.ratio), 0.0)
        group, place = divmod(int(example["position"]), config.group)
        shared = np.random.default_rng((seed, group, _STREAM))
        drawn = group_ratios(config, crops * config.group, shared)
        return drawn.reshape(config.group, crops, 2)[place]

    def apply(example: Example, rng: np.random.Generator) -> Example:
        targets = [int(grid[0] * grid[1] * rng.uniform(low, high)) for low, high in ranges(example, rng)]
        return {**example, "masked": np.stack([make_mask(config, grid, target, rng) for target in targets])}

    return apply
