"""Rows of several conversations: packed batches of one static shape for training, and one pass over a source.

Conversations come in the shuffled, mixed order of data/pipeline.py. Each goes to the least filled row of its batch in
which it has room; one that has room in none begins the next batch. So rows are filled evenly, and what a batch holds
follows from seed and position alone, whatever the number of processes: all plan every row (texts are tokenised, images
measured by their headers), each process reads the pixels of its own rows only.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from ...models.ranges import Count, Whole
from ..files import printable
from ..images.decode import CorruptExample
from ..pipeline import Batch, Skipped, shuffled
from .qwen_vl import Buckets, Example, Processor, Windows, collate, mid_times, pack
from .turns import Conversation, Conversations

logger = logging.getLogger(__name__)

_ATTEMPTS = 100  # unusable conversations in a row before reading gives up


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShape:
    """What a row has room for; every batch has these shapes."""

    tokens: Count
    patches: Count
    segments: Count = 64  # conversations
    windows: Whole = 0  # of the vision encoder; 0: four times those of a square image, as ragged edges cut some
    frames: Count = 64  # temporal patches of all images and videos

    def limits(self, windows: Windows) -> Int[np.ndarray, " 5"]:
        """As the costs of conversations are counted: tokens, patches, conversations, windows, frames."""
        count = self.windows or (max(4 * self.patches // windows.side**2, 4) if windows.side else 0)
        return np.array([self.tokens, self.patches, self.segments, count, self.frames])


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A conversation as token ids, its pixels still to be read, and what it costs of a row."""

    conversation: Conversation
    ids: Int[np.ndarray, " T"]
    learnt: Bool[np.ndarray, " T"]
    cost: Int[np.ndarray, " 5"]


@dataclasses.dataclass(frozen=True)
class Packer:
    """Conversations -> rows -> batches of a fixed shape, for one model."""

    processor: Processor
    windows: Windows
    shape: RowShape

    def prepare(self, conversation: Conversation) -> Prepared:
        """Tokenises and measures; ValueError for what does not fit an empty row either."""
        if conversation.text:
            ids = np.append(self.processor.encode_text(conversation.text), self.processor.pad_token)  # <|endoftext|>
            learnt = np.ones(len(ids), bool)
        else:
            ids, learnt = self.processor.encode_turns(conversation.messages, self._times(conversation))
        grids = self.processor.grids(ids, [media.shape(self.processor.sampling) for media in conversation.media])
        patches = sum(map(math.prod, grids))
        tokens = len(ids) - self.processor.num_places(ids) + patches // self.windows.merge_size**2
        windows, frames = sum(map(self.windows.count, grids)), sum(grid[0] for grid in grids)
        cost = np.array([tokens, patches, 1, windows, frames])
        limits = self.shape.limits(self.windows)
        if (cost > limits).any():
            names = ("tokens", "patches", "conversations", "windows", "frames")
            over = [f"{c} {name} of {m}" for c, m, name in zip(cost, limits, names, strict=True) if c > m]
            raise ValueError(f"too large for a row: {', '.join(over)}")
        return Prepared(conversation, ids, learnt, cost)

    def _times(self, conversation: Conversation) -> Iterator[Sequence[float]]:
        processor = self.processor
        if not processor.timestamps:
            return iter(())
        videos = [media for media in conversation.media if media.is_video]
        return (mid_times(video.seconds(processor.sampling), processor.video.temporal_patch_size) for video in videos)

    def read(self, prepared: Prepared) -> Example:
        """Reads the pixels."""
        visuals = [media.read(self.processor.sampling) for media in prepared.conversation.media]
        return self.processor.assemble(prepared.ids, visuals, prepared.learnt)

    def batch(self, rows: Sequence[Sequence[Example]]) -> Batch:
        """Rows of examples as arrays of the declared shape; a row may be empty."""
        empty = self.processor.assemble(np.zeros(0, np.int64), ())
        buckets = Buckets((self.shape.tokens,), (self.shape.patches,), int(self.shape.limits(self.windows)[3]))
        packed = [pack(row) if row else (empty, np.zeros(0, np.int32)) for row in rows]
        batch = collate(packed, self.windows, buckets, self.processor.pad_token, with_visuals=True)
        return {name: value for name, value in batch.items() if name not in ("lengths", "rope_delta")}


class PackedBatches(Iterator[Batch]):
    """This process's rows of each global batch; `skipped` names the conversations that could not be used.

    Like `pipeline.Batches`, with a state that is the position in the order and the number of batches given.
    """

    def __init__(
        self,
        prepare: Callable[[int], Prepared],
        packer: Packer,
        *,
        batch_size: int,
        shard: tuple[int, int] = (0, 1),
        end: int | None = None,
        identity: dict[str, Any] | None = None,
        threads: int = 4,
    ):
        index, count = shard
        if batch_size < 1 or batch_size % count:
            raise ValueError(f"batch size {batch_size} cannot be divided into rows for {count} processes")
        self.skipped: Skipped = {}
        self._prepare, self._packer, self._end = prepare, packer, end
        self._batch_size, self._threads = batch_size, threads
        self._own = slice(index * batch_size // count, (index + 1) * batch_size // count)
        self._identity = {**(identity or {}), "batch_size": batch_size}
        self._step = self._position = 0

    def __next__(self) -> Batch:
        rows = self._plan()
        if not any(rows):
            raise StopIteration
        self._step += 1
        own = rows[self._own]
        with ThreadPoolExecutor(self._threads, "omnax-read") as pool:
            examples = iter(list(pool.map(self._read, [prepared for row in own for prepared in row])))
        return self._packer.batch([[x for _ in row if (x := next(examples)) is not None] for row in own])

    def get_state(self) -> dict[str, Any]:
        """Where reading stands, and what the data are known by."""
        return {"step": self._step, "position": self._position, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from there; ValueError if the state is that of other data."""
        for key, expected in self._identity.items():
            if state.get(key) != expected:
                raise ValueError(f"data iterator: the state has {key} = {state.get(key)}, this run {expected}")
        self._step, self._position = state["step"], state["position"]

    def _plan(self) -> list[list[Prepared]]:
        """The conversations of the next batch's rows, of all processes."""
        limits = self._packer.shape.limits(self._packer.windows)
        rows: list[list[Prepared]] = [[] for _ in range(self._batch_size)]
        filled = np.zeros((self._batch_size, len(limits)), np.int64)
        failures = 0
        while self._end is None or self._position < self._end:
            try:
                prepared = self._prepare(self._position)
            except ValueError as error:
                self._skip(error, f"conversation {self._position}")
                failures, self._position = failures + 1, self._position + 1
                if failures == _ATTEMPTS:
                    named = [(printable(k), printable(v)) for k, v in list(self.skipped.items())[:3]]
                    raise ValueError(
                        f"{_ATTEMPTS} conversations in a row cannot be used, among them {named}"
                    ) from error
                continue
            failures = 0
            fits = np.flatnonzero((filled + prepared.cost <= limits).all(1))
            if not len(fits):
                break
            row = fits[np.argmin(filled[fits, 0])]
            rows[row].append(prepared)
            filled[row] += prepared.cost
            self._position += 1
        return rows

    def _read(self, prepared: Prepared) -> Example | None:
        try:
            return self._packer.read(prepared)
        except ValueError as error:
            self._skip(error, prepared.conversation.name)
            return None

    def _skip(self, error: ValueError, name: str) -> None:
        name, reason = (error.name, error.reason) if isinstance(error, CorruptExample) else (name, str(error))
        if name not in self.skipped:
            self.skipped[name] = reason
            logger.warning(
                "skipped unusable conversation %d, %s: %s", len(self.skipped), printable(name), printable(reason)
            )


def train(
    streams: Sequence[tuple[Conversations, float]],
    packer: Packer,
    *,
    batch_size: int,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    threads: int = 4,
) -> PackedBatches:
    """Endless packed batches of a mixture of (source, weight); weights are of conversations."""
    sources, weights = zip(*streams, strict=True)
    if any(not weight > 0 for weight in weights):
        raise ValueError(f"need streams with positive weights, got {weights}")
    sizes = [len(source) for source in sources]
    order = shuffled(sizes, weights, seed)

    def prepare(position: int) -> Prepared:
        number, index = order(position)
        return _prepare(packer, sources[number][index])

    identity = {"seed": seed, "examples": sizes}
    return PackedBatches(prepare, packer, batch_size=batch_size, shard=shard, identity=identity, threads=threads)


def evaluate(
    source: Conversations, packer: Packer, *, batch_size: int, shard: tuple[int, int] = (0, 1), threads: int = 4
) -> PackedBatches:
    """One pass over a source in order; the last batch may have empty rows."""
    return PackedBatches(
        lambda index: _prepare(packer, source[index]),
        packer,
        batch_size=batch_size,
        shard=shard,
        end=len(source),
        threads=threads,
    )


def _prepare(packer: Packer, conversation: Conversation) -> Prepared:
    try:
        return packer.prepare(conversation)
    except CorruptExample:
        raise
    except ValueError as error:
        raise CorruptExample(conversation.name, str(error)) from error
