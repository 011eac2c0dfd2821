"""The short form of `python -m omnax.benchmarks.damage`."""

from omnax.benchmarks import damage


def test_nothing_damaged_is_read_as_if_it_were_whole():
    counts = damage.run(64, seed=1, quiet=True)
    assert sum(outcomes.total() for outcomes in counts.values()) == 64
    assert damage.bad(counts) == 0
    assert counts["checkpoints"]["recovered from the older checkpoint"] >= 3
    assert counts["torch"]["refused by name"] >= 3
