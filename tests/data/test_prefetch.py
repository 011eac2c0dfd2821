"""Batches on devices: what is handed out, in which sharding, and with which state."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from omnax.data import pipeline, prefetch


class Squares:
    """Examples 0, 1, 4, 9, ..."""

    class_names = ()

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return {"square": np.float32(index**2)}


def stream(preprocess=lambda example, rng: example):
    return pipeline.Stream(Squares(), preprocess)


def sharding(spec, **axes):
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    return NamedSharding(mesh, PartitionSpec(spec))


BATCH = sharding(("data", "fsdp"), data=2, fsdp=2, tensor=2)


def test_batches_arrive_sharded_and_in_order():
    expected = pipeline.train([stream()], batch_size=8, seed=0)
    batches = prefetch.Prefetch(pipeline.train([stream()], batch_size=8, seed=0), BATCH, depth=3)
    for _ in range(5):
        batch = next(batches)
        assert all(array.sharding == BATCH for array in batch.values())
        assert batch["square"].addressable_shards[0].data.shape == (2,)
        jax.tree.map(np.testing.assert_array_equal, batch, next(expected))
    batches.close()


def test_state_is_that_of_the_batch_handed_out():
    batches = prefetch.Prefetch(pipeline.train([stream()], batch_size=8, seed=0), BATCH, depth=4)
    assert batches.get_state()["step"] == 0
    states, indices = [], []
    for _ in range(6):
        indices.append(np.asarray(next(batches)["index"]))
        states.append(batches.get_state())
    assert [state["step"] for state in states] == [1, 2, 3, 4, 5, 6]
    batches.set_state(states[2])
    np.testing.assert_array_equal(next(batches)["index"], indices[3])
    batches.close()
    np.testing.assert_array_equal(next(batches)["index"], indices[4])
    batches.close()
    assert batches.get_state()["step"] == 5


def test_the_end_and_errors_come_in_their_turn():
    batches = prefetch.Prefetch(pipeline.evaluate(stream(), batch_size=8), BATCH, depth=4)
    assert [int(batch["mask"].sum()) for batch in batches] == [8, 8, 4]
    batches.close()

    def fails(example, rng):
        if example["square"] == 81:
            raise ValueError("no square root")
        return example

    failing = pipeline.Stream(Squares(), fails)
    batches = prefetch.Prefetch(pipeline.evaluate(failing, batch_size=4), sharding("data", data=2, rest=4), depth=4)
    next(batches), next(batches)
    with pytest.raises(ValueError, match="no square root"):
        next(batches)
    assert batches.get_state()["step"] == 2
    batches.close()


def test_wrong_depth():
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        prefetch.Prefetch(pipeline.evaluate(stream(), batch_size=8), BATCH, depth=0)


def test_one_process_holds_all_rows():
    assert prefetch.process_shard(BATCH, 8) == (0, 1)


@dataclasses.dataclass(frozen=True)
class Device:
    """Where a device is, as far as `process_shard` asks."""

    process_index: int
    number: int


@pytest.mark.parametrize(
    ("rows_of_process", "expected"),
    [
        ([[(0, 2), (2, 4)], [(4, 6), (6, 8)]], [(0, 2), (1, 2)]),
        ([[(0, 8), (0, 8)], [(0, 8), (0, 8)]], [(0, 1), (0, 1)]),  # a tensor axis across processes
        ([[(0, 2)], [(0, 2)], [(2, 4)], [(4, 8)]], [(0, 4), (0, 4), (1, 4), (1, 2)]),
        ([[(0, 2), (4, 6)]], ["not one even share"]),
        ([[(0, 6)]], ["not one even share"]),
    ],
)
def test_rows_of_many_processes(monkeypatch, rows_of_process, expected):
    layout = {
        Device(process, number): (slice(*rows),)
        for process, shards in enumerate(rows_of_process)
        for number, rows in enumerate(shards)
    }
    fake = types.SimpleNamespace(devices_indices_map=lambda shape: layout)
    for process, answer in enumerate(expected):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        if isinstance(answer, str):
            with pytest.raises(ValueError, match=answer):
                prefetch.process_shard(fake, 8)
        else:
            assert prefetch.process_shard(fake, 8) == answer
