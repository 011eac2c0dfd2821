"""Held-out parts: seeded, stratified, and independent of how the rows lie."""

import numpy as np
import pytest
from omnax.data.media.face_crops import find_videos
from omnax.data.splits import held_out


@pytest.mark.parametrize(
    "labels",
    [
        np.arange(4000) % 10,  # as the textures lie: each tenth row is one class
        np.repeat(np.arange(10), 400),  # as folders do
        np.random.default_rng(0).integers(0, 10, 4000),
    ],
)
def test_every_class_gives_the_same_share(labels):
    chosen = held_out(labels)
    assert chosen.sum() == 400
    counts, sizes = np.bincount(labels[chosen], minlength=10), np.bincount(labels)
    assert (np.abs(counts - sizes / 10) <= 1).all()
    np.testing.assert_array_equal(chosen, held_out(labels))
    assert (chosen != held_out(labels, seed=1)).any()
    rows = np.flatnonzero(chosen[labels == 3])  # shuffled, not evenly spaced
    assert len(set(np.diff(rows))) > 5


def test_small_classes_take_turns():
    chosen = held_out(np.arange(200) // 2)  # two rows a class, a tenth of all
    assert chosen.sum() == 20 and np.bincount(np.arange(200)[chosen] // 2).max() == 1
    assert held_out([0, 0]).sum() == 1 and held_out([5, 7, 9], 0.9).sum() == 2
    with pytest.raises(ValueError, match=r"cannot hold out 0.1 of 1 rows"):
        held_out([3])
    with pytest.raises(ValueError, match=r"cannot hold out 1.5 of 4 rows"):
        held_out([3] * 4, 1.5)


def test_videos_are_held_out_whatever_their_numbers(tmp_path):
    """Twenty clips a speaker: each twentieth would be the same sentence of everyone."""
    for speaker in range(10):
        (tmp_path / f"s{speaker}").mkdir()
        for clip in range(20):
            (tmp_path / f"s{speaker}" / f"{clip:02d}.mp4").write_bytes(b"")
    found = find_videos(tmp_path)
    assert len(found["test"]) == 10 and len(found["train"]) == 190
    assert {path.parent.name for path in found["test"]} == {f"s{speaker}" for speaker in range(10)}
    assert len({path.name for path in found["test"]}) > 4
    assert found == find_videos(tmp_path)
