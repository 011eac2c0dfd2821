"""DINOv2 against transformers and timm, and the official files: outputs, files in both directions, published sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.hub.families import dinov2 as formats
from omnax.hub.files.tensors import rename
from omnax.hub.mapping import save_tensors
from omnax.models import dinov2
from oracles import timm, torch, transformers
from safetensors.numpy import load_file

TOLERANCE = 1e-5
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}

# (size, registers, parameters, tensors): spec 2.1; the tensors follow from depth and feed-forward
PUBLISHED = [
    ("S", 0, 22_056_576),
    ("B", 0, 86_580_480),
    ("L", 0, 304_368_640),
    ("g", 0, 1_136_480_768),
    ("S", 4, 22_058_112),
    ("B", 4, 86_583_552),
    ("L", 4, 304_372_736),
    ("g", 4, 1_136_486_912),
]
TRAINED = [
    (dinov2.config("L/16", image_size=224), 303_351_808),
    (dinov2.config("L/14", image_size=224, gated=True), 303_655_168),
    (dinov2.config("g/14", image_size=224), 1_134_771_200),
    (dinov2.config_v1("Ti/16"), 5_524_416),
    (dinov2.config_v1("S/16"), 21_665_664),
    (dinov2.config_v1("S/8"), 21_670_272),
    (dinov2.config_v1("B/16"), 85_798_656),
    (dinov2.config_v1("B/8"), 85_807_872),
    (dinov2.config_v1("L/16"), 303_301_632),
]
HEADS = [(65536, 256, 1024, 23_662_848), (65536, 256, 384, 22_352_128), (8192, 256, 768, 8_401_152)]
HEADS += [(131072, 384, 1024, 57_545_088), (131072, 256, 1536, 41_554_176)]


def published(kind, seed=0, **fields):
    """A transformers model with all parameters random: the default initialisation leaves many of them 0 or 1."""
    config_class = transformers.Dinov2WithRegistersConfig if "Registers" in kind else transformers.Dinov2Config
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(config_class(**(SHAPE | fields))).eval()
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    return model


def images(*shape):
    return np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)


def to_torch(image):
    return torch.from_numpy(image.transpose(0, 3, 1, 2))


def nhwc(x):
    return x.numpy().transpose(0, 2, 3, 1)


def close(got, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    "kind,fields,sizes",
    [
        ("Dinov2Model", {}, [(56, 56), (42, 70)]),
        ("Dinov2Model", {"use_swiglu_ffn": True, "layerscale_value": 0.5}, [(28, 56)]),
        ("Dinov2WithRegistersModel", {"num_register_tokens": 3}, [(56, 56), (84, 42)]),
    ],
)
def test_backbones_of_transformers(tmp_path, kind, fields, sizes):
    model = published(kind, **fields)
    model.save_pretrained(tmp_path / "published")
    bundle = hub.load(tmp_path / "published")
    for size in sizes:
        image = images(*size)
        grid = (size[0] // 14, size[1] // 14)
        masked = np.random.default_rng(1).random((2, *grid)) < 0.4
        flat = torch.from_numpy(masked.reshape(2, -1))
        expected = model(to_torch(image), bool_masked_pos=flat, output_hidden_states=True)
        got = bundle.model.apply({"params": bundle.params}, image, masked=masked, hidden_states=True)
        close(got["tokens"], expected.last_hidden_state)
        close(got["pooled"], expected.pooler_output)
        close(got["hidden_states"], torch.stack(expected.hidden_states))
        registers = fields.get("num_register_tokens", 0)
        assert got["registers"].shape == (2, registers, 32) and got["patches"].shape == (2, *grid, 32)
        np.testing.assert_array_equal(got["patches"].reshape(2, -1, 32), got["tokens"][:, 1 + registers :])
    hub.save(bundle, tmp_path / "exported")
    again = type(model).from_pretrained(tmp_path / "exported")
    configs = [{**x.config.to_dict(), "_name_or_path": "", "dtype": ""} for x in (model, again)]
    assert configs[0] == configs[1]
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], tensor, err_msg=name)


def test_classifier_of_transformers(tmp_path):
    model = published("Dinov2WithRegistersForImageClassification", num_labels=3)
    model.save_pretrained(tmp_path)
    bundle, image = hub.load(tmp_path, scan=True), images(56, 56)
    assert "blocks" in bundle.params["encoder"]
    close(bundle.model.apply({"params": bundle.params}, image)["logits"], model(to_torch(image)).logits)
    assert bundle.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def official_names(bundle):
    return {name: torch.from_numpy(tensor.read()) for name, tensor in official_tensors(bundle).items()}


def official_tensors(bundle):
    return save_tensors(bundle.params, formats.official(bundle.config))


@pytest.mark.parametrize("gated,registers", [(False, 0), (True, 4)])
def test_official_files(tmp_path, monkeypatch, gated, registers):
    """The same weights under the official names: equal outputs, and off-size with the 0.1 offset (no registers)."""
    kind = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    model = published(kind, use_swiglu_ffn=gated)
    model.save_pretrained(tmp_path / "hf")
    tensors = official_names(hub.load(tmp_path / "hf"))
    assert set(tensors) == official_keys(3, gated, registers)
    chunked = {name.replace("blocks.", "blocks.1."): tensor for name, tensor in tensors.items()}
    files = {"plain.pth": tensors, "run.pth": {"teacher": {f"backbone.{k}": v for k, v in chunked.items()}}}
    files["run.pth"]["teacher"]["dino_head.mlp.0.weight"] = torch.zeros(2, 2)

    def offset(embeddings, patches, height, width):
        table = embeddings.position_embeddings
        grid = table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
        factors = ((height // 14 + 0.1) / 4, (width // 14 + 0.1) / 4)
        grid = torch.nn.functional.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, 32)], dim=1)

    if not registers:
        monkeypatch.setattr(type(model.embeddings), "interpolate_pos_encoding", offset)
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        bundle = hub.load(tmp_path / name, num_heads=4)
        assert bundle.format == "official"
        image = images(42, 70)
        close(bundle.model.apply({"params": bundle.params}, image)["tokens"], model(to_torch(image))[0])
    hub.save(bundle, tmp_path / "exported.safetensors")
    exported = load_file(tmp_path / "exported.safetensors")
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor, err_msg=name)


@pytest.mark.parametrize("prefix", ["dino_head", "head"])
def test_heads_of_a_run(tmp_path, prefix):
    """DINOv2's teacher_checkpoint.pth with both heads, and DINO's with its one; saved again tensor for tensor."""
    model = published("Dinov2Model")
    model.save_pretrained(tmp_path / "hf")
    backbone = official_names(hub.load(tmp_path / "hf"))
    names = [prefix, "ibot_head"] if prefix == "dino_head" else [prefix]
    heads, expected, x = {}, {}, torch.randn(5, 32)
    for head, prototypes in zip(names, (10, 7), strict=False):
        layers = [torch.nn.Linear(*size) for size in ((32, 12), (12, 12), (12, 6))]
        direction, gain = torch.randn(prototypes, 6), torch.rand(prototypes, 1) + 0.5
        heads |= {f"{head}.mlp.{2 * i}.{k}": v for i, layer in enumerate(layers) for k, v in layer.state_dict().items()}
        heads |= {f"{head}.last_layer.weight_g": gain, f"{head}.last_layer.weight_v": direction}
        y = torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1], torch.nn.GELU(), layers[2])(x)
        weight = torch._weight_norm(direction, gain, 0)
        expected[head] = torch.nn.functional.normalize(y, eps=1e-12) @ weight.T
    named = {f"backbone.{k}": v for k, v in backbone.items()} | heads
    torch.save({"teacher": named, "epoch": 3}, tmp_path / "teacher_checkpoint.pth")
    bundle = hub.load(tmp_path / "teacher_checkpoint.pth", num_heads=4)
    assert bundle.format == "run" and len(bundle.variables["heads"]) == len(names)
    for (name, params), logits in zip(bundle.variables["heads"].items(), expected.values(), strict=True):
        config = dinov2.HeadConfig(prototypes=logits.shape[1], hidden=12, bottleneck=6)
        close(dinov2.Head(config).apply({"params": params}, x.numpy()), logits)
        assert name in ("dino_head", "ibot_head")
    hub.save(bundle, tmp_path / "run.safetensors")
    written = load_file(tmp_path / "run.safetensors")
    assert written.keys() == {name.replace("head.", "dino_head.", prefix == "head") for name in named}
    for name, tensor in named.items():
        np.testing.assert_array_equal(written[name.replace("head.", "dino_head.", prefix == "head")], tensor)
    hub.save(bundle, tmp_path / "plain.safetensors", "official")
    assert load_file(tmp_path / "plain.safetensors").keys() == backbone.keys()
    with pytest.raises(ValueError, match="format 'run' holds heads, and this bundle has none"):
        hub.save(hub.load(tmp_path / "plain.safetensors", num_heads=4), tmp_path / "x", "run")


@pytest.mark.parametrize("kind", ["dino", "ibot"])
def test_checkpoints_of_dino_and_ibot_runs(tmp_path, kind):
    """Whole training checkpoints of a plain ViT: the teacher is taken; iBOT's student has a mask token more."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, embed_dim=32, depth=2, num_heads=4)
    for parameter in model.eval().parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    state = model.state_dict()
    head = {f"head.mlp.{i}.{k}": v for i in (0, 2, 4) for k, v in torch.nn.Linear(32, 32).state_dict().items()}
    head |= {"head.last_layer.weight_g": torch.ones(6, 1), "head.last_layer.weight_v": torch.randn(6, 32)}
    named = {f"backbone.{name}": tensor for name, tensor in state.items()} | head
    student = {f"module.{name}": torch.zeros_like(tensor) for name, tensor in named.items()}
    loss = {"center": torch.zeros(1, 6)}
    if kind == "ibot":
        student["module.backbone.masked_embed"] = torch.zeros(1, 32)
        loss["center2"] = torch.zeros(1, 1, 6)
    whole = {"student": student, "teacher": named, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}, "epoch": 5}
    torch.save(whole | {f"{kind}_loss": loss}, tmp_path / "checkpoint.pth")
    bundle = hub.load(tmp_path / "checkpoint.pth", num_heads=4)
    image = images(32, 32)
    close(bundle.model.apply({"params": bundle.params}, image)["tokens"], model.forward_features(to_torch(image)))
    assert not bundle.config.mask_token and bundle.config.layer_scale is None
    assert bundle.variables["heads"]["dino_head"]["last_layer"]["direction"].shape == (32, 6)


def test_intermediate_layers_are_normed_block_outputs(tmp_path):
    model = published("Dinov2Model")
    model.save_pretrained(tmp_path)
    bundle, image = hub.load(tmp_path), images(56, 56)
    states = model(to_torch(image), output_hidden_states=True).hidden_states
    for layers, indices in ((2, (1, 2)), ((0, 2), (0, 2))):
        got = dinov2.intermediate_layers(bundle.model, bundle.params, image, layers)
        for output, index in zip(got, indices, strict=True):
            expected = model.layernorm(states[index + 1])
            close(output["cls"], expected[:, 0])
            close(output["patches"].reshape(2, -1, 32), expected[:, 1:])
    with pytest.raises(ValueError, match="intermediate layers 4 of a backbone with 3 blocks"):
        dinov2.intermediate_layers(bundle.model, bundle.params, image, 4)


@pytest.mark.parametrize("registers", [0, 4])
def test_timm(tmp_path, registers):
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    size = {"img_size": 56, "embed_dim": 32, "depth": 2, "num_heads": 4}
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, **size).eval()
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    timm.models.save_for_hf(model, tmp_path / "timm", model_args=size)
    bundle = hub.load(tmp_path / "timm")
    for shape in ((56, 56), (42, 70)):
        image = images(*shape)
        close(bundle.model.apply({"params": bundle.params}, image)["tokens"], model.forward_features(to_torch(image)))
    hub.save(bundle, tmp_path / "exported")
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    model.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()}, strict=True)


@pytest.mark.parametrize("registers", [0, 4])
def test_transformers_to_timm_and_back(tmp_path, registers):
    """The mask token is left behind; beside registers the class token takes its position with it."""
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    config = getattr(transformers, f"{kind}Config")(**sizes, **({"num_register_tokens": 4} if registers else {}))
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "a")
    hub.save(hub.load(tmp_path / "a"), tmp_path / "b", format="timm")
    hub.save(hub.load(tmp_path / "b"), tmp_path / "c", format="transformers")
    image = to_torch(images(28, 28))
    expected = model(image).last_hidden_state
    again = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    close(again.forward_features(image).numpy(), expected)
    close(getattr(transformers, f"{kind}Model").from_pretrained(tmp_path / "c")(image).last_hidden_state, expected)


def official_keys(depth, gated, registers):
    inner = ["w12", "w3"] if gated else ["fc1", "fc2"]
    layers = ["norm1", "norm2", "attn.qkv", "attn.proj", *(f"mlp.{name}" for name in inner)]
    leaves = [f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")] + ["ls1.gamma", "ls2.gamma"]
    outer = ["cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    outer += ["norm.weight", "norm.bias"] + ["register_tokens"] * (registers > 0)
    return {*outer, *(f"blocks.{i}.{leaf}" for i in range(depth) for leaf in leaves)}


@pytest.mark.parametrize("size,registers,parameters", PUBLISHED)
def test_published_backbones_have_the_published_tensors(size, registers, parameters):
    config = dinov2.config(f"{size}/14", num_registers=registers)
    shapes = formats.abstract(config)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters
    tensors = save_tensors(shapes, formats.official(config))
    assert set(tensors) == official_keys(config.depth, config.gated, registers)
    width, hidden = config.width, config.mlp_dim
    expected = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1370, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "blocks.0.attn.qkv.weight": (3 * width, width),
        "blocks.0.attn.proj.weight": (width, width),
        "blocks.0.mlp." + ("w12.weight" if config.gated else "fc1.weight"): (hidden * (1 + config.gated), width),
        "blocks.0.mlp." + ("w3.weight" if config.gated else "fc2.weight"): (width, hidden),
    } | ({"register_tokens": (1, registers, width)} if registers else {})
    assert {name: tensors[name].shape for name in expected} == expected
    with torch.device("meta"):
        kind = "Dinov2WithRegisters" if registers else "Dinov2"
        fields = {"hidden_size": width, "num_hidden_layers": config.depth, "num_attention_heads": config.num_heads}
        settings = getattr(transformers, f"{kind}Config")(
            image_size=518, patch_size=14, use_swiglu_ffn=config.gated, **fields
        )
        model = getattr(transformers, f"{kind}Model")(settings)
    table = formats.transformers(config)
    renamed = {rename(name, table.renames): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    own = {name: tensor.shape for name, tensor in save_tensors(shapes, table).items()}
    packed = {name for name in renamed.keys() ^ own.keys() if ".mlp." in name}  # gate and up, apart in transformers 5
    assert renamed.keys() - packed == own.keys() - packed and bool(packed) == config.gated
    common = renamed.keys() & own.keys()
    assert {name: renamed[name] for name in common} == {name: own[name] for name in common}


@pytest.mark.parametrize("config,parameters", TRAINED, ids=str)
def test_parameter_counts_of_the_training_configs(config, parameters):
    leaves = jax.tree.leaves(formats.abstract(config))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters


@pytest.mark.parametrize("prototypes,bottleneck,width,parameters", HEADS)
def test_head_parameter_counts(prototypes, bottleneck, width, parameters):
    head = dinov2.Head(dinov2.HeadConfig(prototypes=prototypes, bottleneck=bottleneck))
    params = jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((1, width)))["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == parameters


def test_head_equals_torch():
    """The reference's Linear, GELU, normalise, weight_norm(dim=0), written out."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(*size) for size in ((8, 12), (12, 12), (12, 6))]
    direction, gain, x = torch.randn(10, 6), torch.rand(10) + 0.5, torch.randn(5, 8)
    y = layers[2](torch.nn.functional.gelu(layers[1](torch.nn.functional.gelu(layers[0](x)))))
    weight = torch._weight_norm(direction, gain[:, None], 0)
    expected = torch.nn.functional.normalize(y, eps=1e-12) @ weight.T
    params = {f"fc{i}": {"kernel": x.weight.numpy().T, "bias": x.bias.numpy()} for i, x in enumerate(layers, 1)}
    params["last_layer"] = {"direction": direction.numpy().T, "gain": gain.numpy()}
    head = dinov2.Head(dinov2.HeadConfig(prototypes=10, hidden=12, bottleneck=6))
    np.testing.assert_allclose(head.apply({"params": params}, x.numpy()), expected, atol=1e-6)


def test_misfits_are_named(tmp_path):
    model = published("Dinov2Model")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit the model asked for: it has patch_size=14, not 7"):
        hub.load(tmp_path, patch_size=7)
    with pytest.raises(ValueError, match=r"unknown field 'patchsize' of Dinov2Config.*patch_size"):
        hub.load(tmp_path, patchsize=7)
    resized = hub.load(tmp_path, image_size=84)
    assert resized.params["embed"]["pos_embed"].shape == (1, 37, 32)
    torch.save({"cls_token": torch.zeros(1, 1, 32), "blocks.0.ls1.gamma": torch.zeros(32)}, tmp_path / "a.pth")
    with pytest.raises(ValueError):
        hub.load(tmp_path / "a.pth")
