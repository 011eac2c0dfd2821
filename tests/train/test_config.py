"""Config files, overrides, typed settings."""

import dataclasses

import pytest
from ml_collections import ConfigDict, FieldReference
from omnax.configs import vit as vit_config
from omnax.configs.common import parse_arg
from omnax.train.config import run_config_file, typed
from omnax.train.main import make_recipe, parse_overrides


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float
    names: tuple[str, ...] = ("a",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int
    inner: Inner
    other: Inner | None = None
    path: str = ""
    limit: float | None = None


def settings() -> ConfigDict:
    batch = FieldReference(8)
    return ConfigDict({"batch": batch, "steps": 80 // batch, "inner": {"rate": 0.5}})


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithBatch(Outer):
    batch: int


def test_typed_completes_overrides_and_freezes():
    overrides = {"inner.rate": "1", "inner.names": "['b', 'c']", "path": "123", "limit": "1e-3", "batch": "16"}
    config = typed(WithBatch, settings(), overrides)
    assert config == WithBatch(batch=16, steps=5, inner=Inner(rate=1.0, names=("b", "c")), path="123", limit=1e-3)
    assert typed(WithBatch, settings(), {}).steps == 10
    nested = ConfigDict(settings().to_dict() | {"other": {"rate": 2.0}})
    assert typed(WithBatch, nested, {}).other == Inner(rate=2.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"inner.rat": "1"}, "unknown config key 'inner.rat', did you mean 'inner.rate'"),
        ({"stepz": "1"}, "unknown config key 'stepz', did you mean 'steps'"),
        ({"steps.x": "1"}, "unknown config key 'steps.x'"),
        ({"steps": "many"}, "config key 'steps' is of type int, got 'many'"),
        ({"inner.rate": "(1, 2)"}, "config key 'inner.rate' is of type float"),
    ],
)
def test_wrong_overrides(overrides, message):
    with pytest.raises(ValueError, match=message):
        typed(WithBatch, settings(), overrides)


def test_keys_that_nothing_reads_and_missing_ones():
    with pytest.raises(ValueError, match=r"unknown config key 'inner\.rte', did you mean 'inner\.rate'"):
        typed(Outer, ConfigDict({"steps": 1, "inner": {"rate": 1.0, "rte": 2.0}}), {})
    with pytest.raises(ValueError, match=r"config keys without a value: inner\.rate"):
        typed(Outer, ConfigDict({"steps": 1, "inner": {}}), {})


def test_config_files_are_found_in_the_working_directory_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_config_file("configs/vit.py").batch_size == 64  # the installed one
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "vit.py").write_text(
        "from ml_collections import ConfigDict\nfrom .common import parse_arg\n"
        "def get_config(arg):\n    return ConfigDict(vars(parse_arg(arg, size='x', wide=False)))\n"
    )
    assert run_config_file("configs/vit.py:size=y,wide").to_dict() == {"size": "y", "wide": True}
    with pytest.raises(ValueError, match=r"config file 'nowhere\.py' exists neither in"):
        run_config_file("nowhere.py")


def test_arguments_of_config_files():
    assert vars(parse_arg("a=3,b", a=1, b=False, c="x")) == {"a": 3, "b": True, "c": "x"}
    for wrong, message in (("d=1", "unknown config argument 'd'"), ("a=x", "'a' is int"), ("b=no", "True or False")):
        with pytest.raises(ValueError, match=message):
            parse_arg(wrong, a=1, b=False)


def test_command_line_overrides():
    assert parse_overrides(["--config.a.b=1=2", "--config.c", "x"]) == {"a.b": "1=2", "c": "x"}
    with pytest.raises(ValueError, match="unknown argument '--workdi'"):
        parse_overrides(["--workdi=x"])
    with pytest.raises(ValueError, match=r"'--config\.c' has no value"):
        parse_overrides(["--config.c"])


@pytest.mark.parametrize("size", ["b16", "B/16", "So400m14", "so400m14", "g14", "G14", "g-opt16"])
def test_size_names(size):
    expected = {"b16": "B/16", "so400m14": "So400m/14", "So400m14": "So400m/14", "g14": "g/14", "G14": "G/14"}
    assert vit_config.variant(size) == expected.get(size, {"g-opt16": "g-opt/16"}.get(size, size))


@pytest.mark.parametrize("data", ["i1k", "i21k"])
@pytest.mark.parametrize("hyper", vit_config.HYPERS)
@pytest.mark.parametrize("size", ["ti16", "g14"])
def test_published_recipes_build(data, hyper, size):
    config, recipe = make_recipe(f"configs/vit.py:size={size},data={data},hyper={hyper}", {})
    assert config.model.num_classes == recipe.players[0].optimizer.trainable[0][1] * {"i1k": 1000, "i21k": 21843}[data]
    if hyper == "big_vision":  # the pre-training tables of the spec: 300 epochs, decay not times the rate
        assert (config.batch_size, config.optimizer.weight_decay, config.optimizer.decay_times_lr) == (
            4096,
            1e-4,
            False,
        )
        assert config.total_steps == {"i1k": 300 * 1268355 // 4096, "i21k": 300 * 14145997 // 4096}[data]


def test_wrong_names_in_configs():
    for spec, message in (
        ("configs/vit.py:size=q16", "unknown ViT variant 'q/16'"),
        ("configs/vit.py:data=i2k", "expected data of"),
        ("configs/vit.py:sise=b16", "unknown config argument 'sise', did you mean 'size'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_recipe(spec, {})
    with pytest.raises(ValueError, match="unknown evaluator 'acuracy'"):
        make_recipe("configs/vit.py", {"evaluators": "('acuracy',)"})
    with pytest.raises(ValueError, match="unknown loss 'softmx'"):
        make_recipe("configs/vit.py", {"loss": "softmx"})
    with pytest.raises(ValueError, match="unknown recipe 'vitt'"):
        make_recipe("configs/vit.py", {"recipe": "vitt"})
