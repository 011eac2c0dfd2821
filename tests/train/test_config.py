"""Config files, overrides, typed settings."""

import dataclasses
import importlib
import pkgutil
import re
import types
import typing

import jax
import pytest
from ml_collections import ConfigDict, FieldReference
from omnax.configs import vit as vit_config
from omnax.configs.common import parse_arg
from omnax.models.ranges import range_of
from omnax.train import recipes
from omnax.train.config import build, run_config_file, typed
from omnax.train.main import make_recipe, parse_overrides
from omnax.train.program import make_program
from omnax.train.settings import EmaConfig, RunConfig
from omnax.train.sharding import make_mesh


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
        ("configs/vit.py:data=i2k", "unknown value of config argument 'data': 'i2k'"),
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


ARGUMENTS = [
    ("clip.py:loss=x", "unknown value of config argument 'loss': 'x'"),
    ("clip.py:form=rings", "'rings', did you mean 'ring'"),
    ("clip.py:hyper=eva", "'hyper' is read with a published size only"),
    ("clip.py:size=b32,hyper=siglip,loss=info_nce", "hyper=siglip trains with the sigmoid loss"),
    ("vit.py:hyper=original", "'hyper' is read with a published data set"),
    ("vit.py:hyper=origin,data=i1k", "did you mean 'original'"),
    ("dinov2.py:recipe=ful", "did you mean 'full'"),
    ("dinov2.py:recipe=full,objective=dino", "'objective' is read with recipe=smoke only"),
    ("dinov2.py:teacher=l/14", "'teacher' is read with recipe=distill only"),
    ("dinov2.py:size=S/14", "'size' is read with a published recipe only"),
    ("qwen_vl.py:recipe=publishd", "did you mean 'published'"),
    ("wav2lip.py:stage=expart", "did you mean 'expert'"),
    ("wav2lip.py:size=smok", "did you mean 'smoke'"),
]


@pytest.mark.parametrize(("spec", "message"), ARGUMENTS, ids=[spec for spec, _ in ARGUMENTS])
def test_an_argument_that_means_nothing_is_refused(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run_config_file(f"configs/{spec}")


NONSENSE = [
    ("vit", "optimizer.eps", "0.0", "above 0"),
    ("vit", "optimizer.b1", "1.0", "at least 0 and below 1"),
    ("clip", "optimizer.b2", "1.0", "at least 0 and below 1"),
    ("vit", "optimizer.lr", "-0.1", "at least 0"),
    ("vit", "optimizer.lr", "1e999", "at least 0"),
    ("vit", "optimizer.clip_norm", "-1.0", "above 0"),
    ("vit", "model.dropout", "1.0", "at least 0 and below 1"),
    ("dinov2", "model.drop_path", "1.5", "at least 0 and below 1"),
    ("vit", "label_smoothing", "-0.1", "at least 0 and below 1"),
    ("vit", "batch_size", "0", "at least 1"),
    ("vit", "total_steps", "0", "at least 1"),
    ("vit", "log_every", "0", "at least 1"),
    ("vit", "keep_checkpoints", "0", "at least 1"),
    ("vit", "accumulation", "-1", "at least 1"),
    ("vit", "mesh.fsdp", "0", "at least 1, or -1"),
    ("vit", "data.threads", "0", "at least 1"),
    ("vit", "model.num_heads", "0", "at least 1"),
    ("dinov2", "teacher.center_momentum", "1.0", "below 1"),
    ("dinov2", "losses.temperature", "0.0", "above 0"),
    ("dinov2", "mask.ratio", "(0.1, 1.5)", "at most 1"),
    ("dinov2", "mask.share", "-0.1", "at least 0"),
    ("dinov2", "mask.group", "0", "at least 1"),
    ("dinov2", "crops.local_scale", "(0.0, 0.3)", "above 0"),
    ("dinov2", "crops.local_count", "-2", "at least 0"),
    ("qwen_vl", "data.fps", "0.0", "above 0"),
    ("qwen_vl", "data.row.tokens", "0", "at least 1"),
    ("wav2lip", "sync_weight", "1.5", "at most 1"),
    ("wav2lip", "data.windows_per_clip", "0", "at least 1"),
]


@pytest.mark.parametrize(("name", "key", "text", "expected"), NONSENSE)
def test_a_number_out_of_its_range_is_refused_by_name(name, key, text, expected):
    with pytest.raises(
        ValueError, match=rf"config key '{re.escape(key)}' is .*, expected a number.*{expected}"
    ) as error:
        make_recipe(f"configs/{name}.py", {key: text})
    assert "\n" not in str(error.value) and len(str(error.value)) < 2000


def test_ema_and_not_a_number():
    section = {"ema": {"decay": 1.01}}
    with pytest.raises(ValueError, match=r"'ema\.decay' is 1\.01, expected a number at least 0 and at most 1"):
        build(RunConfig, {"recipe": "vit", "total_steps": 1, "batch_size": 1} | section)
    with pytest.raises(ValueError, match=r"'model\.head_bias_init' is inf, expected a finite number"):
        make_recipe("configs/vit.py", {"model.head_bias_init": "1e999"})
    assert build(EmaConfig, {"decay": 1.0}).decay == 1.0


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(recipes.__path__) if module.ispkg])
def test_every_number_of_every_recipe_has_a_range(name):
    """A new setting says its own: `models/ranges.py`."""
    config = importlib.import_module(f"{recipes.__name__}.{name}.recipe").Config

    def bare(cls, prefix):
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            hint = hints[field.name]
            options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            for option in options:
                if dataclasses.is_dataclass(option):
                    yield from bare(option, f"{prefix}{field.name}.")
                elif option in (int, float) and range_of(hint) is None:
                    yield f"{prefix}{field.name}"

    assert not list(bare(config, ""))


def test_broken_regular_expressions_are_named():
    rules = "[('(', True), ('.*', True)]"
    with pytest.raises(ValueError, match=r"init_from\.skip: '\(' is no regular expression"):
        make_recipe("configs/vit.py", {"init_from.skip": "('(',)"})
    config, recipe = make_recipe("configs/vit.py", {"optimizer.trainable": rules})
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"optimizer\.trainable: '\(' is no regular expression"):
        make_program(recipe, config, mesh)


@pytest.mark.parametrize("name", ["vit", "clip", "dinov2", "qwen_vl", "wav2lip"])
def test_unknown_dtypes_are_named(name):
    with pytest.raises(ValueError, match="unknown dtype 'fp16x'"):
        make_recipe(f"configs/{name}.py", {"dtype": "fp16x"})


def test_a_switch_without_its_evaluator_is_refused_at_the_start():
    with pytest.raises(ValueError, match=r"sync_weight 0\.03 waits for the evaluator 'sync'"):
        make_recipe("configs/wav2lip.py:stage=gan", {"evaluators": "('lse',)"})
