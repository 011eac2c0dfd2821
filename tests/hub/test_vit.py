"""`hub.load` and `hub.save` of ViTs: published sizes, adaptation, devices, dtypes, and everything that can be wrong."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from omnax import hub
from omnax.data.preprocess import build
from omnax.hub.families.vit import family as vit
from omnax.hub.families.vit import formats as vit_formats
from omnax.hub.files.tensors import LazyTensor, rename
from omnax.hub.files.writers import write_safetensors
from omnax.hub.mapping import save_tensors
from omnax.models.layers import stack_layers
from omnax.models.vit import ViT, ViTConfig, config
from oracles import timm, torch, transformers

TINY = ViTConfig(
    width=32,
    depth=2,
    num_heads=4,
    mlp_dim=48,
    patch_size=(8, 8),
    image_size=(32, 32),
    num_classes=5,
    activation="gelu",
    eps=1e-12,
    pos_interpolation="bicubic",
    init="hf",
)


def bundle_of(config, format="transformers", seed=0):
    """Random parameters without compiling an initialiser."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype), vit.abstract(config))
    return hub.Bundle(ViT(config), params, config, format=format)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    hub.save(bundle_of(TINY), path)
    return path


@pytest.fixture(scope="module")
def bundle(directory):
    return hub.load(directory)


def read_all(path):
    from omnax.hub.files.readers import open_tensors

    file = open_tensors(path)
    return {key: file.read(key) for key in file}


def write_changed(source, target, **changes):
    """A copy of a directory whose tensors are changed: None deletes, a dict entry replaces or adds."""
    tensors = read_all(source)
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    target.mkdir()
    for file in source.glob("*.json"):
        (target / file.name).write_text(file.read_text())
    lazy = {name: LazyTensor(x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()}
    write_safetensors(target / "model.safetensors", lazy)
    return target


# model@resolution -> parameters without a head, with 1000 and with 21843 classes (the ViT specification, part A2).
SIZES = {
    ("Ti/16", 224): (5524416, 5717416, 9740115),
    ("S/32", 224): (22493952, 22878952, 30903507),
    ("S/16", 224): (21665664, 22050664, 30075219),
    ("B/32", 224): (87455232, 88224232, 104252499),
    ("B/16", 224): (85798656, 86567656, 102595923),
    ("B/16", 384): (86090496, 86859496, 102887763),
    ("B/8", 224): (85807872, 86576872, 102605139),
    ("L/32", 224): (305510400, 306535400, 327899475),
    ("L/16", 224): (303301632, 304326632, 325690707),
    ("L/16", 384): (303690752, 304715752, 326079827),
    ("H/14", 224): (630764800, 632045800, 658745683),
    ("g/14", 224): (1011202432, 1012611432, 1041979219),
    ("G/14", 224): (1842775680, 1844440680, 1879144275),
}


def published(table, config):
    """Name -> shape of what we would write; nothing is computed."""
    return {name: tensor.shape for name, tensor in save_tensors(vit.abstract(config), table).items()}


@pytest.mark.parametrize("size, counts", SIZES.items(), ids=lambda x: "@".join(map(str, x)) if len(x) == 2 else "")
def test_published_sizes(size, counts):
    """Exact parameter counts, and the exact names and shapes of transformers' and timm's models of that size."""
    variant, resolution = size
    for classes, count in zip((0, 1000, 21843), counts, strict=True):
        model = config(variant, image_size=resolution, num_classes=classes, scan=True)  # one block to trace, not 56
        leaves = jax.tree.leaves(vit.abstract(model))
        assert sum(math.prod(leaf.shape) for leaf in leaves) == count
    ours = config(variant, image_size=resolution, scan=True)
    with torch.device("meta"):
        hf = transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=ours.width,
                num_hidden_layers=ours.depth,
                num_attention_heads=ours.num_heads,
                intermediate_size=ours.mlp_dim,
                image_size=resolution,
                patch_size=ours.patch_size[0],
                num_labels=1000,
            )
        )
        theirs = timm.create_model(
            "vit_base_patch16_224",
            img_size=resolution,
            patch_size=ours.patch_size[0],
            embed_dim=ours.width,
            depth=ours.depth,
            num_heads=ours.num_heads,
            mlp_ratio=(ours.mlp_dim + 0.5) / ours.width,
        )
    table = vit_formats.transformers_table(ours)
    expected = {rename(name, table.renames): tuple(x.shape) for name, x in hf.state_dict().items()}
    assert published(table, ours) == expected
    assert published(vit_formats.timm_table(ours), ours) == {k: tuple(v.shape) for k, v in theirs.state_dict().items()}


def test_representation_layer_counts():
    """imagenet21k/*.npz of the original paper."""
    for variant, count in (("B/16", 103186515), ("H/14", 660385363)):
        size = config(variant, num_classes=21843, pre_logits_dim=config(variant).width)
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(vit.abstract(size))) == count


def test_config_and_params_come_back(directory, bundle):
    original = bundle_of(TINY)
    assert bundle.config == TINY and bundle.format == "transformers"
    jax.tree.map(np.testing.assert_array_equal, bundle.params, original.params)


@pytest.mark.parametrize("format", ["transformers", "timm", "npz"])
def test_saved_twice_is_the_same_bytes(tmp_path, format):
    style = {"eps": 1e-6} if format == "timm" else {"activation": "gelu_tanh", "eps": 1e-6} if format == "npz" else {}
    first = bundle_of(dataclasses.replace(TINY, **style), format)
    hub.save(first, tmp_path / "a")
    hub.save(hub.load(tmp_path / "a", **({"num_heads": 4} if format == "timm" else {})), tmp_path / "b")
    one, two = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert one.keys() == two.keys() and all(one[key].tobytes() == two[key].tobytes() for key in one)


def test_scanned_and_unrolled_layouts(directory, bundle, tmp_path):
    scanned = hub.load(directory, scan=True)
    assert scanned.params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"].shape == (2, 32, 48)
    jax.tree.map(np.testing.assert_array_equal, scanned.params, stack_layers(bundle.params))
    hub.save(scanned, tmp_path / "out")
    one, two = read_all(directory), read_all(tmp_path / "out")
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)


def test_mesh(directory, bundle, tmp_path):
    """Eight devices: sharded as asked for, equal to one device, and saved from there."""
    mesh = jax.make_mesh((1, 8), ("data", "fsdp"), (AxisType.Auto,) * 2)
    for options in ({}, {"scan": True}, {"num_classes": 16, "image_size": 48}):
        sharded, whole = hub.load(directory, mesh=mesh, **options), hub.load(directory, **options)
        jax.tree.map(np.testing.assert_array_equal, sharded.params, whole.params)
        for leaf in jax.tree.leaves(sharded.params):
            assert leaf.sharding.mesh == mesh
    kernel = hub.load(directory, mesh=mesh).params["encoder"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp")
    assert kernel.addressable_shards[0].data.shape == (32, 6)
    hub.save(hub.load(directory, mesh=mesh), tmp_path / "out")
    one, two = read_all(directory), read_all(tmp_path / "out")
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)


def test_mesh_with_rules(directory):
    def rules(params, mesh):
        flat = jax.tree_util.tree_leaves_with_path(params)
        names = ["/".join(key.key for key in path) for path, _ in flat]
        return {
            name: PartitionSpec(None, "tensor") if name.endswith("query/kernel") else PartitionSpec() for name in names
        }

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), (AxisType.Auto,) * 2)
    attn = hub.load(directory, mesh=mesh, rules=rules).params["encoder"]["blocks_1"]["attn"]
    assert attn["query"]["kernel"].addressable_shards[0].data.shape == (32, 1, 8)
    assert attn["key"]["kernel"].sharding.is_fully_replicated


def test_dtype(directory, bundle, tmp_path):
    half = hub.load(directory, dtype=jnp.bfloat16)
    assert half.model.dtype == jnp.bfloat16
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), bundle.params)
    jax.tree.map(np.testing.assert_array_equal, half.params, expected)
    image = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    got = jax.jit(half.model.apply)({"params": half.params}, image)["logits"]
    full = jax.jit(bundle.model.apply)({"params": bundle.params}, image)["logits"]
    np.testing.assert_allclose(got, full, atol=0.05)  # logits of order 1 at 8 bits of mantissa
    hub.save(half, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = hub.load(tmp_path / "out")  # stored as bfloat16, computed in float32
    assert again.model.dtype == jnp.float32 and again.params["head"]["kernel"].dtype == jnp.bfloat16


def test_new_classes_and_sizes(directory, bundle):
    adapted = hub.load(directory, num_classes=7, image_size=48, head_bias_init=-3.0, drop_path=0.1)
    assert adapted.config == dataclasses.replace(
        TINY, num_classes=7, image_size=(48, 48), head_bias_init=-3.0, drop_path=0.1
    )
    np.testing.assert_array_equal(adapted.params["head"]["kernel"], np.zeros((32, 7)))
    np.testing.assert_array_equal(adapted.params["head"]["bias"], np.full(7, -3.0))
    assert adapted.params["embed"]["pos_embed"].shape == (1, 37, 32)
    jax.tree.map(np.testing.assert_array_equal, adapted.params["encoder"], bundle.params["encoder"])
    assert "head" not in hub.load(directory, num_classes=0).params
    kept = hub.load(directory, num_classes=5).params["head"]
    jax.tree.map(np.testing.assert_array_equal, kept, bundle.params["head"])


def test_new_head_goes_without_the_old_representation_layer(tmp_path):
    base = bundle_of(dataclasses.replace(TINY, num_classes=0, pre_logits_dim=32))
    hub.save(base, tmp_path / "a")
    assert hub.load(tmp_path / "a").config.pre_logits_dim == 32
    assert "pre_logits" not in hub.load(tmp_path / "a", num_classes=3).params
    kept = hub.load(tmp_path / "a", num_classes=3, pre_logits_dim=32).params
    jax.tree.map(np.testing.assert_array_equal, kept["pre_logits"], base.params["pre_logits"])


def test_positions_without_parameters_are_written_as_a_table(tmp_path):
    """sin-cos, row-and-column and patch-only positions become the learned table of the other libraries."""
    image = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    for fields in ({"pos_embed": "sincos2d"}, {"pos_embed": "learn2d"}, {"class_position": False}):
        original = bundle_of(dataclasses.replace(TINY, **fields))
        hub.save(original, tmp_path / "a")
        again = hub.load(tmp_path / "a")
        assert again.config == TINY
        got = jax.jit(again.model.apply)({"params": again.params}, image)["logits"]
        expected = jax.jit(original.model.apply)({"params": original.params}, image)["logits"]
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_labels_and_further_config_entries_stay(directory, tmp_path):
    published = json.loads((directory / "config.json").read_text())
    names = ["cat", "dog", "fish", "owl", "bee"]
    published |= {"id2label": {str(i): name for i, name in enumerate(names)}, "hidden_dropout_prob": 0.25}
    source = write_changed(directory, tmp_path / "in")
    (source / "config.json").write_text(json.dumps(published))
    bundle = hub.load(source)
    assert bundle.labels == tuple(names)
    assert hub.load(source, num_classes=2).labels is None
    hub.save(bundle, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["label2id"] == {name: i for i, name in enumerate(names)}
    assert written["hidden_dropout_prob"] == 0.25


def test_processor_settings(directory, tmp_path):
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.1], "resample": 3, "size": 32}
    source = write_changed(directory, tmp_path / "in")
    (source / "preprocessor_config.json").write_text(json.dumps(settings))
    bundle = hub.load(source)
    processor = bundle.processor
    assert (processor.crop, processor.method, processor.shortest_edge) == ((32, 32), "pil_bicubic", None)
    assert hub.load(source, image_size=48).processor.crop == (48, 48)

    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    hub.save(bundle, tmp_path / "out")
    reference = transformers.ViTImageProcessorPil.from_pretrained(tmp_path / "out")
    expected = reference(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    got = build(processor.steps)({"image": image}, np.random.default_rng(0))["image"]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_timm_processor_settings(tmp_path):
    model = timm.create_model("vit_base_patch16_224", img_size=224, embed_dim=64, depth=1, num_heads=1, num_classes=3)
    timm.models.save_for_hf(model, tmp_path)
    processor = hub.load(tmp_path).processor
    assert (processor.crop, processor.shortest_edge, processor.method) == ((224, 224), 248, "pil_bicubic")
    assert (processor.mean, processor.std) == ((0.5,) * 3, (0.5,) * 3)
    larger = processor.resized((384, 384))
    assert (larger.crop, larger.shortest_edge) == ((384, 384), 425)
    assert processor.resized((64, 32)).steps[0] == ("resize", {"size": (64, 32), "method": "pil_bicubic"})


def test_nothing_half_written_stays(directory, bundle, tmp_path):
    """A failing save leaves the earlier one as it was; a good one replaces all of its weights."""
    target = tmp_path / "out"
    hub.save(bundle, target, max_shard_size=10_000)
    (target / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    broken = dataclasses.replace(bundle, params={**bundle.params, "extra": {"kernel": jnp.ones(1)}})
    with pytest.raises(ValueError, match="no tensor for parameter 'extra/kernel'"):
        hub.save(broken, target)

    class Unreadable:
        shape, dtype = (5,), np.dtype(np.float32)

        def __array__(self, *_, **__):
            raise OSError("lost device")

    broken = dataclasses.replace(
        bundle, params={**bundle.params, "head": {**bundle.params["head"], "bias": Unreadable()}}
    )
    with pytest.raises(OSError, match="lost device"):
        hub.save(broken, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    hub.save(bundle, target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors", "notes.txt"] + (
        ["preprocessor_config.json"] if bundle.processor else []
    )


def test_save_refuses_what_a_format_cannot_say(tmp_path, bundle):
    with pytest.raises(ValueError, match=r"unknown format 'onnx', expected one of \('transformers', 'timm', 'npz'\)"):
        hub.save(bundle, tmp_path / "a", format="onnx")
    gap = bundle_of(dataclasses.replace(TINY, pool="gap"))
    with pytest.raises(ValueError, match="transformers has no ViT with pool='gap'"):
        hub.save(gap, tmp_path / "a")
    rep = bundle_of(dataclasses.replace(TINY, pre_logits_dim=8))
    with pytest.raises(ValueError, match=r"pre_logits_dim=8 with a classifier"):
        hub.save(rep, tmp_path / "a")
    with pytest.raises(ValueError, match="timm has no ViT with pre_logits_dim=8"):
        hub.save(rep, tmp_path / "a", format="timm")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is an existing file, expected a directory to save to"):
        hub.save(bundle, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "format,words",
    [("timm", "eps=1e-12"), ("npz", "'npz' cannot say activation='gelu', .*; eps=1e-12, reads as 1e-06")],
)
def test_what_a_format_cannot_say_is_refused_and_nothing_is_written(tmp_path, bundle, format, words):
    with pytest.raises(ValueError, match=words):
        hub.save(bundle, tmp_path / "a", format=format)
    assert not list(tmp_path.iterdir())


def test_missing_unexpected_and_misshapen_tensors(directory, tmp_path):
    name = "vit.encoder.layer.1.output.dense.weight"
    cases = {
        "missing": ({name: None}, rf"missing '{name}', expected \(32, 48\) for encoder/blocks_1/mlp/fc2/kernel"),
        "shape": (
            {name: np.zeros((32, 47), np.float32)},
            rf"unfit '{name}', got shape \(32, 47\), expected \(32, 48\)",
        ),
        "extra": ({name + "s": np.zeros(3, np.float32)}, rf"unexpected '{name}s', got \(3,\); nearest: .*'{name}'"),
        "classes": (
            {"classifier.bias": np.zeros(4, np.float32)},
            r"unfit 'classifier.bias', got shape \(4,\), expected",
        ),
    }
    for case, (changes, message) in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            hub.load(write_changed(directory, tmp_path / case, **changes))
        assert str(tmp_path / case) in str(caught.value)


@pytest.mark.parametrize(
    "name", ["cls_token", "pos_embed", "patch_embed.proj.bias", "blocks.0.attn.qkv.bias", "norm.weight", "head.weight"]
)
def test_bare_files_do_not_hide_a_missing_tensor(tmp_path, name):
    """Where the config is read off the tensors, an absent one must not pass for another kind of model."""
    hub.save(bundle_of(dataclasses.replace(TINY, depth=1, eps=1e-6, width=64), "timm"), tmp_path / "whole")
    tensors = read_all(tmp_path / "whole")
    del tensors[name]
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=name):
        hub.load(tmp_path / "a.pth", num_heads=4)


def test_grids_that_cannot_be_told_from_shapes(tmp_path):
    """2 x 5 patches without a class token are as many rows as 3 x 3 with one: the config, or the caller, decides."""
    shape = {"patch_size": (8, 8), "image_size": (16, 40), "class_token": False, "class_position": False, "pool": "gap"}
    odd = dataclasses.replace(TINY, **shape, eps=1e-6, pos_interpolation="bicubic_antialias", init="timm")
    hub.save(bundle_of(odd, "timm"), tmp_path / "a")
    assert hub.load(tmp_path / "a").config == odd
    (tmp_path / "a" / "config.json").unlink()
    assert hub.load(tmp_path / "a", image_size=(16, 40), num_heads=4).config == odd
    with pytest.raises(ValueError, match="missing 'cls_token'"):
        hub.load(tmp_path / "a", num_heads=4)
    longer = dataclasses.replace(odd, image_size=(16, 56))
    hub.save(bundle_of(longer, "timm"), tmp_path / "b")
    (tmp_path / "b" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"the 14 rows of 'pos_embed' are no square grid; give the image_size="):
        hub.load(tmp_path / "b", num_heads=4)


def test_paths_that_are_not_checkpoints(directory, tmp_path):
    with pytest.raises(ValueError, match=rf"no such file or directory: '{directory}x/y/z'"):
        hub.load(f"{directory}x/y/z")
    with pytest.raises(ValueError, match=rf"no such file or directory: '{directory}s'; nearest: '{directory}'"):
        hub.load(f"{directory}s")
    with pytest.raises(ValueError, match=r"there is no path 'nobody/nothing', and no such repository could be fetched"):
        hub.load("nobody/nothing")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        hub.load(tmp_path)
    np.savez(tmp_path / "a.npz", x=np.ones(1))
    with pytest.raises(ValueError, match=r"a\.npz is none of the known models .*'x'"):
        hub.load(tmp_path / "a.npz")


def test_files_of_several_formats_in_one_directory(directory, bundle, tmp_path):
    """The config.json beside a file counts only if it is of the file's format."""
    mixed = write_changed(directory, tmp_path / "in")
    hub.save(dataclasses.replace(bundle, config=dataclasses.replace(TINY, eps=1e-6)), tmp_path / "timm", format="timm")
    tensors = read_all(tmp_path / "timm")
    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, mixed / "timm.pth")
    google = dataclasses.replace(TINY, eps=1e-6, activation="gelu_tanh")
    hub.save(dataclasses.replace(bundle, config=google), mixed / "google.npz", format="npz")
    assert hub.load(mixed).format == hub.load(mixed / "model.safetensors").format == "transformers"
    assert hub.load(mixed / "timm.pth", num_heads=4).format == "timm"
    assert hub.load(mixed / "google.npz").format == "npz"


@pytest.mark.parametrize("available", ["safetensors", "bin"])
def test_repository_of_the_hub(directory, monkeypatch, tmp_path, available):
    """One request where there are safetensors, a second one for other weights where there are none."""
    snapshot = write_changed(directory, tmp_path / "snapshot")
    tensors = {key: torch.from_numpy(value) for key, value in read_all(directory).items()}
    if available == "bin":
        (snapshot / "model.safetensors").unlink()
    asked = []

    def download(repo_id, allow_patterns):
        asked.append(repo_id)
        if "*.bin" in allow_patterns:
            torch.save(tensors, snapshot / "pytorch_model.bin")
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hub.load("someone/vit-tiny").config == TINY
    assert asked == ["someone/vit-tiny"] * (1 if available == "safetensors" else 2)
    with pytest.raises(ValueError, match=r"no such file or directory: 'someone/vit\.safetensors'"):
        hub.load("someone/vit.safetensors")


def test_wrong_configs(directory, tmp_path):
    source = write_changed(directory, tmp_path / "in")
    published = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(published | {"model_type": "swin"}))
    with pytest.raises(ValueError, match=r"none of the known models .* config names 'swin'"):
        hub.load(source)
    (source / "config.json").write_text(json.dumps(published | {"hidden_act": "gleu"}))
    with pytest.raises(ValueError, match="'hidden_act' is 'gleu', expected one of 'gelu', "):
        hub.load(source)
    for wrong in ({"hidden_size": "wide"}, {"num_hidden_layers": "2"}, {"patch_size": 0}, {"image_size": None}):
        (source / "config.json").write_text(json.dumps(published | wrong))
        with pytest.raises(ValueError, match=r"config\.json: .(hidden_size|num_hidden|patch_size|image_size)"):
            hub.load(source)
    (source / "config.json").write_text(json.dumps(published | {"num_hidden_layers": 3_000_000}))
    with pytest.raises(ValueError, match=r"its config has 3000000 layers, expected at most its \d+ tensors"):
        hub.load(source)
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        hub.load(source)


def test_wrong_overrides(directory):
    with pytest.raises(ValueError, match="unknown field 'num_clases' of ViTConfig; nearest: 'num_classes'"):
        hub.load(directory, num_clases=3)
    with pytest.raises(
        ValueError, match=r"wants parameter 'embed/cls_token' of shape \(1, 1, 64\), the checkpoint has shape"
    ):
        hub.load(directory, width=64)
    with pytest.raises(ValueError, match=r"leaves out the checkpoint's parameters \['encoder/blocks_1/"):
        hub.load(directory, depth=1)
    with pytest.raises(ValueError, match="image_size"):
        hub.load(directory, image_size=3)
