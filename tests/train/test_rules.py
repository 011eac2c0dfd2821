"""Parameter paths and the rules over them."""

import pytest
from omnax.train.rules import flatten, match_rules, merge, select, unflatten

TREE = {"encoder": {"kernel": 1, "bias": 2}, "head": {"kernel": 3}}


def test_paths_and_parts():
    assert flatten(TREE) == {"encoder/kernel": 1, "encoder/bias": 2, "head/kernel": 3}
    assert unflatten(flatten(TREE)) == TREE
    assert select(TREE, ["encoder/bias", "head/kernel"]) == {"encoder": {"bias": 2}, "head": {"kernel": 3}}
    assert merge(TREE, {"encoder": {"bias": 5}}) == {"encoder": {"kernel": 1, "bias": 5}, "head": {"kernel": 3}}


def test_first_match_wins_and_must_be_entire():
    rules = ((r".*/bias", 0.0), (r"head/.*", 2.0), (r".*", 1.0))
    assert match_rules(rules, flatten(TREE), "x") == {"encoder/kernel": 1.0, "encoder/bias": 0.0, "head/kernel": 2.0}
    with pytest.raises(ValueError, match="trainable: no rule matches parameter 'head/kernel'"):
        match_rules((("encoder/.*", True), ("head", True)), flatten(TREE), "trainable")


def test_values_may_refer_to_groups():
    assert match_rules(((r"([^/]*)/.*", r"\1"),), flatten(TREE), "x") == {
        "encoder/kernel": "encoder",
        "encoder/bias": "encoder",
        "head/kernel": "head",
    }


def test_a_rule_that_decides_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"rule 'head/kernl' decides no parameter \(nearest: 'head/kernel'\)"):
        match_rules((("head/kernl", 1), (".*", 2)), flatten(TREE), "x")
    with pytest.raises(ValueError, match=r"rule 'head/kernel' decides no parameter: earlier rules take all"):
        match_rules(((".*", 2), ("head/kernel", 1)), flatten(TREE), "x")
