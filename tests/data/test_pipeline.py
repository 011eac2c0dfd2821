"""The order of examples, their random numbers, batches, resuming, mixtures, evaluation, unreadable examples."""

import itertools
import json
import logging

import numpy as np
import pytest
from omnax.data import pipeline, preprocess, sources
from omnax.data.images.decode import CorruptExample, encode_png
from omnax.data.pipeline import Reading, Stream, evaluate, train


class Numbers:
    """The numbers from `first`, of which some cannot be read."""

    class_names = ()

    def __init__(self, length, first=0, corrupt=()):
        self.length, self.first, self.corrupt = length, first, corrupt

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.corrupt:
            raise CorruptExample(f"number {index}", "broken")
        return {"value": np.full(2, self.first + index, np.float32), "label": self.first + index, "name": "no array"}


def noisy(example, rng):
    return {"value": example["value"], "label": example["label"], "noise": rng.random()}


def stream(length, weight=1.0, **fields):
    return Stream(Numbers(length, **fields), noisy, weight)


def take(batches, number):
    return list(itertools.islice(batches, number))


def joined(parts):
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_hold_each_example_once_per_epoch():
    values = joined(take(train([stream(10)], batch_size=4, seed=0), 10))
    epochs = values["label"].reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    np.testing.assert_array_equal(values["value"], np.repeat(values["label"][:, None], 2, axis=1))
    np.testing.assert_array_equal(values["index"], values["label"])
    assert values["mask"].all()
    assert {key: (value.dtype, value.ndim) for key, value in values.items()} == {
        "value": (np.float32, 2),
        "label": (np.int32, 1),
        "noise": (np.float64, 1),
        "index": (np.int32, 1),
        "mask": (np.bool_, 1),
    }


def test_seed_decides_everything():
    first, again = (take(train([stream(10)], batch_size=4, seed=3), 5) for _ in range(2))
    assert_equal(first, again)
    other = take(train([stream(10)], batch_size=4, seed=4), 5)
    assert not np.array_equal(joined(first)["label"], joined(other)["label"])
    expected = [np.random.default_rng((3, position)).random() for position in range(20)]
    np.testing.assert_array_equal(joined(first)["noise"], expected)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(count):
    whole = take(train([stream(11, corrupt=[5])], batch_size=8, seed=1), 6)
    readings = [Reading(shard=(index, count), threads=2) for index in range(count)]
    parts = [take(train([stream(11, corrupt=[5])], batch_size=8, seed=1, reading=reading), 6) for reading in readings]
    assert_equal(whole, [joined(rows) for rows in zip(*parts, strict=True)])


def corrupt_folder(path):
    """Four images of 6 x 6 in two classes; the third is cut off in the middle."""
    for name, level in (("a/0.png", 0), ("a/1.png", 50), ("b/2.png", 100), ("b/3.png", 150)):
        (path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "train" / name).write_bytes(encode_png(np.full((6, 6, 3), level, np.uint8)))
    corrupt = path / "train" / "b" / "2.png"
    corrupt.write_bytes(corrupt.read_bytes()[:50])
    transform = preprocess.build(["decode", ("random_shift", {"pixels": 1}), ("keep", {"keys": ["image", "label"]})])
    return Stream(sources.source({"name": "folder", "path": path}, "train"), transform), str(corrupt)


def test_threads_and_workers_change_nothing(tmp_path):
    folder, corrupt = corrupt_folder(tmp_path)
    expected = take(train([folder], batch_size=4, seed=0, reading=Reading(threads=1)), 6)
    for reading in (Reading(threads=7), Reading(threads=2, workers=2)):
        batches = train([folder], batch_size=4, seed=0, reading=reading)
        assert_equal(expected, take(batches, 6))
        assert list(batches.skipped) == [corrupt]
        batches.close()


def test_resume_anywhere_on_any_number_of_processes():
    streams = [stream(10, 2.0, corrupt=[1]), stream(7, 1.0, first=100)]
    expected = take(train(streams, batch_size=4, seed=5), 9)
    for step in range(8):
        interrupted = train(streams, batch_size=4, seed=5)
        take(interrupted, step)
        state = json.loads(json.dumps(interrupted.get_state()))
        parts = []
        for index in range(2):
            batches = train(streams, batch_size=4, seed=5, reading=Reading(shard=(index, 2), threads=2))
            take(batches, 3)
            batches.set_state(state)
            parts.append(take(batches, 9 - step))
            assert batches.get_state()["step"] == 9
        assert_equal(expected[step:], [joined(rows) for rows in zip(*parts, strict=True)])


def test_closing_loses_nothing():
    batches = train([stream(10)], batch_size=4, seed=5)
    first = take(batches, 2)
    batches.close()
    assert_equal(take(train([stream(10)], batch_size=4, seed=5), 4), [*first, *take(batches, 2)])


def test_state_of_other_data_is_refused():
    state = train([stream(10)], batch_size=4, seed=5).get_state()
    for fields, message in (
        ({"seed": 6}, "seed = 5, this run 6"),
        ({"batch_size": 2}, "batch_size = 4, this run 2"),
        ({"streams": [stream(9)]}, r"examples = \[10\], this run \[9\]"),
    ):
        arguments = {"streams": [stream(10)], "batch_size": 4, "seed": 5, **fields}
        with pytest.raises(ValueError, match=message):
            train(**arguments).set_state(state)


def test_mixture_follows_the_weights():
    streams = [stream(10, 3.0), stream(6, 1.0, first=100)]
    labels = joined(take(train(streams, batch_size=4, seed=0), 20))["label"].reshape(20, 4)
    np.testing.assert_array_equal((labels >= 100).sum(1), 1)
    np.testing.assert_array_equal(np.sort(labels[labels < 100].reshape(6, 10)), np.tile(np.arange(10), (6, 1)))
    np.testing.assert_array_equal(
        np.sort(labels[labels >= 100][:18].reshape(3, 6)), np.tile(np.arange(100, 106), (3, 1))
    )


def test_streams_of_a_mixture_are_shuffled_apart():
    streams = [stream(50), stream(50, first=100)]
    labels = joined(take(train(streams, batch_size=100, seed=0), 2))["label"]
    first, second = labels[labels < 100].reshape(2, 50), labels[labels >= 100].reshape(2, 50) - 100
    orders = [*first, *second]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(orders, 2))


def test_unreadable_examples_are_replaced_by_the_next_and_named(caplog):
    clean = joined(take(train([stream(10)], batch_size=4, seed=0), 10))["label"]
    batches = train([stream(10, corrupt=[3, 8])], batch_size=4, seed=0)
    with caplog.at_level(logging.WARNING):
        mended = joined(take(batches, 10))
    following = {position: position for position in range(40)}
    for position in reversed(range(39)):
        if clean[position] in (3, 8):
            following[position] = following[position + 1]
    expected = clean[[following[position] for position in range(40)]]
    last_is_readable = clean[39] not in (3, 8)
    np.testing.assert_array_equal(mended["label"][: 39 + last_is_readable], expected[: 39 + last_is_readable])
    np.testing.assert_array_equal(mended["noise"], [np.random.default_rng((0, p)).random() for p in range(40)])
    assert batches.skipped == {"number 3": "broken", "number 8": "broken"}
    assert len(caplog.records) == 2
    assert "skipped unreadable example 2, number" in caplog.messages[1]


def test_nothing_readable_ends_the_run():
    nothing = stream(5, corrupt=range(5))
    with pytest.raises(ValueError, match=r"100 examples in a row cannot be read, among them \[\('number"):
        next(train([nothing], batch_size=2, seed=0))
    with pytest.raises(ValueError, match="none of the 5 examples can be read"):
        evaluate(nothing, batch_size=2)


def test_evaluation_is_one_padded_pass():
    batches = evaluate(stream(10, corrupt=[0, 5]), batch_size=4)
    assert len(batches) == 3
    first, second, third = batches
    np.testing.assert_array_equal(first["mask"], [False, True, True, True])
    np.testing.assert_array_equal(first["label"], [0, 1, 2, 3])
    np.testing.assert_array_equal(second["mask"], [True, False, True, True])
    np.testing.assert_array_equal(second["label"], [4, 0, 6, 7])
    np.testing.assert_array_equal(second["index"], [4, 5, 6, 7])
    np.testing.assert_array_equal(third["mask"], [True, True, False, False])
    np.testing.assert_array_equal(third["index"], [8, 9, -1, -1])
    np.testing.assert_array_equal(third["value"], [[8, 8], [9, 9], [0, 0], [0, 0]])
    assert batches.skipped == {"number 0": "broken", "number 5": "broken"}
    assert next(batches, None) is None
    batches.set_state({**batches.get_state(), "step": 1})
    assert_equal(list(batches), [second, third])


@pytest.mark.parametrize("length", [1, 9, 16])
def test_evaluation_on_many_processes(length):
    whole = list(evaluate(stream(length), batch_size=8))
    parts = [list(evaluate(stream(length), batch_size=8, reading=Reading(shard=(i, 4), threads=2))) for i in range(4)]
    assert_equal(whole, [joined(rows) for rows in zip(*parts, strict=True)])
    assert sum(batch["mask"].sum() for batch in whole) == length


def test_corrupt_image_in_a_folder(tmp_path, caplog):
    folder, corrupt = corrupt_folder(tmp_path)
    training, evaluation = train([folder], batch_size=4, seed=0), evaluate(folder, batch_size=3)
    indices = joined(take(training, 6))["index"]
    assert {*indices.tolist()} == {0, 1, 3}
    masks = np.concatenate([batch["mask"] for batch in evaluation])
    np.testing.assert_array_equal(masks, [True, True, False, True, False, False])
    for batches in (training, evaluation):
        assert list(batches.skipped) == [corrupt]
        assert "not a readable image" in batches.skipped[corrupt]
    assert corrupt in caplog.text


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda example, rng: example, "cannot batch 'name' of type str; drop it with the transform 'keep'"),
        (lambda example, rng: {"x": np.zeros(1 + example["label"] % 2)}, r"cannot batch 'x': examples have shapes"),
        (lambda example, rng: {"xy"[example["label"] % 2]: 1}, "cannot batch examples with fields"),
    ],
)
def test_examples_that_do_not_stack(transform, message):
    with pytest.raises(ValueError, match=message):
        next(train([Stream(Numbers(10), transform)], batch_size=10, seed=0))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="batch size 6 cannot be divided into rows for process 0 of 4"):
        train([stream(5)], batch_size=6, seed=0, reading=Reading(shard=(0, 4)))
    with pytest.raises(ValueError, match=r"positive weights, got \[1.0, 0\]"):
        train([stream(5), stream(5, weight=0)], batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"positive weights, got \[\]"):
        train([], batch_size=2, seed=0)


def test_other_errors_are_not_taken_for_corrupt_examples():
    def wrong(example, rng):
        raise ValueError("a mistake in the config")

    with pytest.raises(ValueError, match="a mistake in the config"):
        next(train([Stream(Numbers(10), wrong)], batch_size=2, seed=0))
    assert pipeline.logger.name == "omnax.data.pipeline"
