"""The reader of published JSON files: every key is used, harmless or refused by name."""

import pytest
from omnax.hub.keys import Section, harmless, markdown, nested, only, repeats, required, used

INNER = Section({"factor": used("positive", 1.0)}, "scaling")
TABLE = Section(
    {
        "width": used("count", 8),
        "act": used("text", "gelu", choices=("gelu", "relu")),
        "groups": used("count", None),
        "depth": required("count"),
        "dropout": harmless("training"),
        "windows": only(False),
        "in_width": repeats("width"),
        "scaling": nested(INNER),
    }
)


def test_absent_keys_take_the_defaults_and_given_ones_stay_as_they_are():
    expected = {"width": 8, "act": "gelu", "groups": None, "depth": 2, "scaling": {"factor": 1.0}}
    assert TABLE.read({"depth": 2}) == expected
    document = {"depth": 2, "width": 4, "in_width": 4, "groups": 3, "dropout": "?", "scaling": {"factor": 2}}
    assert TABLE.read(document) == {"width": 4, "act": "gelu", "groups": 3, "depth": 2, "scaling": {"factor": 2}}
    assert TABLE.read({"depth": 2, "groups": None, "scaling": None, "windows": False}) == expected


@pytest.mark.parametrize(
    "document,words",
    [
        ({"depths": 2}, "config.json: 'depths' is unknown, got 2; nearest: 'depth', 'width'; has no 'depth', "),
        ({"depth": True}, "config.json: 'depth' is True, expected a positive integer"),
        ({"depth": 2**40}, "config.json: 'depth' is 1099511627776, expected a positive integer"),
        ({"depth": 1, "width": None}, "'width' is None, expected a positive integer"),
        ({"depth": 1, "width": 4.0}, "'width' is 4.0, expected a positive integer"),
        ({"depth": 1, "act": "tanh"}, "'act' is 'tanh', expected one of 'gelu', 'relu'"),
        ({"depth": 1, "windows": True}, "'windows' is True, expected False"),
        ({"depth": 1, "windows": 0}, "'windows' is 0, expected False"),
        ({"depth": 1, "in_width": 4}, "'in_width' is 4, expected 8 as 'width' has it"),
        ({"depth": 1, "scaling": [1]}, r"'scaling' is \[1\], expected an object or null"),
        ({"depth": 1, "scaling": {"factor": float("nan")}}, "config.json, scaling: 'factor' is nan, expected a finite"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(document, words):
    with pytest.raises(ValueError, match=words):
        TABLE.read(document)


def test_messages_are_bounded():
    with pytest.raises(ValueError, match="and 994 more") as error:
        TABLE.read({"depth": 1} | {f"{'x' * 500}{i}": "y" * 10**6 for i in range(1000)})
    assert len(str(error.value)) < 2000


def test_the_table_of_a_page():
    lines = markdown({"Tiny": TABLE}).splitlines()
    assert lines[:4] == ["### Tiny", "", "| key | fate | absent | remark |", "|---|---|---|---|"]
    assert '| `act` | used | `"gelu"` | `"gelu"`, `"relu"` |' in lines
    assert "| `depth` | used | refused | a positive integer |" in lines
    assert "| `windows` | refused | `false` | refused unless `false` |" in lines
    assert "| `dropout` | harmless |  | training |" in lines
