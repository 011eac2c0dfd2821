"""`infer zero-shot` and `infer embed`: equal to transformers on the same files, resumable, clear about bad input."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.data.images.decode import encode_png
from omnax.data.text.bpe import tokenizer_of
from omnax.hub import load, save
from omnax.infer import embed, zero_shot
from omnax.infer.__main__ import main
from omnax.models.clip import CLIP
from omnax.train.evaluation.zero_shot import prompt_tokens
from omnax.train.evaluation.zero_shot import zero_shot as evaluate_zero_shot
from omnax.train.sharding import MeshConfig, make_mesh
from omnax.train.state import TrainState
from oracles import torch, transformers
from PIL import Image

LABELS = ["cat", "dog", "fish"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random tiny CLIPModel with a vocabulary of its own, and five images of different shapes."""
    from omnax.data.text.bpe import train_tokenizer

    path = tmp_path_factory.mktemp("clip")
    tokenizer = train_tokenizer(["a photo of a cat.", "a photo of a dog.", "fish"], 30, context_length=12)
    tokenizer.save(path)
    text = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 12, "eos_token_id": tokenizer.end_id}
    text |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    image = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    image |= {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=16))
    model.save_pretrained(path)
    size = {"height": 32, "width": 32}
    preprocessor = {"size": {"shortest_edge": 32}, "crop_size": size, "resample": 3, "do_center_crop": True}
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    folder = path / "images"
    folder.mkdir()
    for i, shape in enumerate([(40, 50), (50, 40), (32, 32), (64, 64), (33, 70)]):
        pixels = np.random.default_rng(i).integers(0, 256, (*shape, 3)).astype(np.uint8)
        (folder / f"{i}.png").write_bytes(encode_png(pixels))
    return path, model.eval(), tokenizer


def oracle_images(path, model):
    """transformers' Pillow preprocessing and its normalised image embeddings."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(path)
    images = [Image.open(file) for file in sorted((path / "images").glob("*.png"))]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return torch.nn.functional.normalize(model.get_image_features(pixels).pooler_output).numpy()


def oracle_weights(model, tokenizer, templates, labels=LABELS):
    columns = []
    for label in labels:
        tokens = torch.from_numpy(tokenizer([t.format(label) for t in templates])).long()
        embeds = torch.nn.functional.normalize(model.get_text_features(tokens).pooler_output)
        columns.append(torch.nn.functional.normalize(embeds.mean(0), dim=0))
    return torch.stack(columns, 1).numpy()


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_zero_shot_equals_the_reference_computation(checkpoint, tmp_path, capsys):
    path, model, tokenizer = checkpoint
    output = tmp_path / "scores.json"
    options = ["--templates", "7", "--json", output, "--picture", tmp_path / "bars.png", "--batch-size", 2]
    assert run("zero-shot", "--weights", path, "--labels", "cat, dog,fish", *options, path / "images") == 0
    weights = oracle_weights(model, tokenizer, zero_shot.TEMPLATES["7"])
    bundle = zero_shot.load_clip(str(path))
    np.testing.assert_allclose(zero_shot.label_weights(bundle, LABELS, zero_shot.TEMPLATES["7"]), weights, atol=1e-5)
    logits = model.logit_scale.exp().item() * oracle_images(path, model) @ weights
    expected = torch.softmax(torch.from_numpy(logits), -1).numpy()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for line, row in zip(lines, expected, strict=True):
        assert list(line["top"]) == [LABELS[i] for i in np.argsort(-row)]
        np.testing.assert_allclose([line["top"][label] for label in LABELS], row, atol=1e-5)
    assert (tmp_path / "bars.png").stat().st_size > 1000
    assert "picture:" in capsys.readouterr().out


def test_zero_shot_evaluator_equals_the_reference_computation(checkpoint):
    """Top 1 and top 5 of eight classes on nine images, in batches of six; a masked image 0 fills both."""
    path, model, tokenizer = checkpoint
    labels, templates = [*LABELS, "a cat", "a dog", "do", "go", "fog"], ("a photo of a {}.", "{}")
    rng = np.random.default_rng(3)
    images, own = rng.normal(size=(10, 32, 32, 3)).astype(np.float32), rng.integers(0, 8, 10)
    features = model.get_image_features(torch.from_numpy(images).permute(0, 3, 1, 2)).pooler_output
    cosines = torch.nn.functional.normalize(features).numpy() @ oracle_weights(model, tokenizer, templates, labels)
    logits = torch.from_numpy(model.logit_scale.exp().item() * cosines)
    best = logits.topk(5).indices.numpy()

    def batches():
        for rows in (np.arange(6), np.array([6, 7, 8, 9, 0, 0])):
            yield {"image": images[rows], "label": own[rows].astype(np.int32), "mask": rows > 0}

    bundle = zero_shot.load_clip(str(path))
    encode = {
        method: lambda params, x, method=method: bundle.model.apply({"params": params}, x, method=method)["embeds"]
        for method in (CLIP.encode_image, CLIP.encode_text)
    }
    prompts = prompt_tokens(tokenizer, labels, templates, 12)
    evaluator = evaluate_zero_shot("zero_shot", *encode.values(), lambda: prompts, batches)
    state = TrainState(jnp.int32(0), bundle.params, {}, {}, {}, jax.random.key_data(jax.random.key(0)))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        metrics = evaluator.run(state)
    assert metrics["accuracy"] == pytest.approx((best[1:, 0] == own[1:]).mean())
    assert metrics["top_5_accuracy"] == pytest.approx((best[1:] == own[1:, None]).any(1).mean())
    losses = torch.nn.functional.cross_entropy(logits[1:], torch.from_numpy(own[1:]))
    assert metrics["loss"] == pytest.approx(losses.item(), abs=1e-5)


def test_embeddings_equal_transformers_and_skip_what_is_damaged(checkpoint, tmp_path, capsys):
    path, model, tokenizer = checkpoint
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((path / "images" / "0.png").read_bytes()[:60])
    out = tmp_path / "images.npz"
    assert run("embed", "--weights", path, "--out", out, "--batch-size", 2, path / "images", damaged) == 0
    assert f"skipped {damaged}" in capsys.readouterr().out
    saved = np.load(out)
    assert [name.rpartition("/")[2] for name in saved["names"]] == [f"{i}.png" for i in range(5)]
    np.testing.assert_allclose(saved["embeds"], oracle_images(path, model), atol=1e-5)
    texts = tmp_path / "texts.txt"
    texts.write_text("a cat\n\na dog, which is far too long a text for twelve tokens\n")
    out = tmp_path / "texts.parquet"
    assert run("embed", "--weights", path, "--out", out, "--texts", texts) == 0
    from pyarrow import parquet

    table = parquet.read_table(out)
    assert table["name"].to_pylist()[0] == "a cat" and len(table) == 2
    tokens = torch.from_numpy(tokenizer(table["name"].to_pylist())).long()
    expected = torch.nn.functional.normalize(model.get_text_features(tokens).pooler_output)
    np.testing.assert_allclose(table["embedding"].to_pylist(), expected.numpy(), atol=1e-5)


def test_embed_goes_on_where_it_stopped(checkpoint, tmp_path, monkeypatch):
    path, _, _ = checkpoint
    out = tmp_path / "out.npz"
    arguments = ["embed", "--weights", path, "--batch-size", 1, "--save-every", 2, "--out"]
    assert run(*arguments, tmp_path / "whole.npz", path / "images") == 0
    prepared = []
    real = embed.image_rows

    def stopping(bundle):
        prepare = real(bundle)

        def counted(name):
            prepared.append(name)
            if len(prepared) == 4:
                raise KeyboardInterrupt
            return prepare(name)

        return counted

    monkeypatch.setattr(embed, "THREADS", 1)
    monkeypatch.setattr(embed, "image_rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, out, path / "images")
    assert not out.exists() and (tmp_path / "out.npz.parts" / "000000.npz").is_file()
    assert run(*arguments[:-1], "--save-every", 3, "--out", out, path / "images") == 1  # another job
    prepared.clear()
    monkeypatch.setattr(embed, "image_rows", lambda bundle: lambda name: (prepared.append(name), real(bundle)(name))[1])
    assert run(*arguments, out, path / "images") == 0
    assert len(prepared) == 3 and not (tmp_path / "out.npz.parts").exists()
    np.testing.assert_array_equal(np.load(out)["embeds"], np.load(tmp_path / "whole.npz")["embeds"])


def test_siglip_directory(tmp_path):
    """Labels get a probability each, from the checkpoint's own sentencepiece vocabulary."""
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    text = tower | {"vocab_size": 97, "max_position_embeddings": 12, "projection_size": 32}
    image = tower | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=image)).eval()
    model.save_pretrained(tmp_path)
    spiece = Path(__file__).parents[1] / "data" / "siglip_spiece.model"
    (tmp_path / "spiece.model").write_bytes(spiece.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    (tmp_path / "picture.png").write_bytes(encode_png(pixels))
    texts = tmp_path / "texts.txt"
    texts.write_text("A photo of a cat.\na dog\n")
    assert run("embed", "--weights", tmp_path, "--out", tmp_path / "texts.npz", "--texts", texts) == 0
    tokens = torch.from_numpy(tokenizer_of({"spiece.model": spiece.read_bytes()})(["a photo of a cat", "a dog"])).long()
    features = torch.nn.functional.normalize(model.get_text_features(tokens[:, :12]).pooler_output)
    np.testing.assert_allclose(np.load(tmp_path / "texts.npz")["embeds"], features, atol=1e-5)
    output = ["--json", tmp_path / "scores.json", "--picture", tmp_path / "bars.png"]
    labels = ["--labels", "A photo of a cat.,a dog", "--templates", "{}"]
    assert run("zero-shot", "--weights", tmp_path, *labels, *output, tmp_path / "picture.png") == 0
    image = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    expected = torch.sigmoid(model(tokens[:, :12], image).logits_per_image)[0].tolist()
    scores = json.loads((tmp_path / "scores.json").read_text())["top"]
    np.testing.assert_allclose([scores["A photo of a cat."], scores["a dog"]], expected, atol=1e-5)
    (tmp_path / "spiece.model").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="ships no vocabulary, and OpenAI's has 49408 ids, its text tower 97"):
        embed.checkpoint_tokenizer(embed.load_clip(str(tmp_path)))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["zero-shot", "--labels", " , ", "IMAGES"], "--labels ' , ' holds no label"),
        (["zero-shot", "--labels", "a", "--templates", "photo", "IMAGES"], "--templates is 'photo', expected one of"),
        (["zero-shot", "--labels", "a", "nowhere.png"], "no such image or folder: 'nowhere.png'"),
        (["embed"], "give image files or folders, or --texts FILE"),
        (["embed", "--out", "x.csv", "IMAGES"], "expected a name that ends in .npz or .parquet"),
        (["embed", "--texts", "nowhere.txt"], "no such file: 'nowhere.txt'"),
        (
            ["embed", "--overflow", "error", "--texts", "LONG"],
            "tokens, expected at most 12: 'a photo of a cat, a photo",
        ),
    ],
)
def test_bad_input_is_one_line(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    path = checkpoint[0]
    (tmp_path / "long.txt").write_text("a photo of a cat, a photo of a dog, a photo of a fish\n")
    places = {"IMAGES": str(path / "images"), "LONG": str(tmp_path / "long.txt")}
    command, *rest = [places.get(argument, argument) for argument in arguments]
    assert run(command, "--weights", path, *rest) == 1
    error = capsys.readouterr().err
    assert error.startswith("ValueError: ") and message in error and error.count("\n") == 1


def test_the_vocabulary_goes_with_the_weights(checkpoint, tmp_path):
    path, _, tokenizer = checkpoint
    for format in ("transformers", "open_clip"):
        save(embed.load_clip(str(path)), tmp_path / format, format)
        again = embed.checkpoint_tokenizer(embed.load_clip(str(tmp_path / format)))
        np.testing.assert_array_equal(again(LABELS), tokenizer(LABELS))


def test_a_single_tower_is_refused(checkpoint, tmp_path, capsys):
    _, model, _ = checkpoint
    transformers.CLIPVisionModel(model.config.vision_config).save_pretrained(tmp_path)
    assert run("zero-shot", "--weights", tmp_path, "--labels", "a", checkpoint[0] / "images") == 1
    assert "holds a ImageConfig, expected both towers" in capsys.readouterr().err


def test_zero_shot_skips_and_names_an_unreadable_image(checkpoint, tmp_path, capsys):
    good = sorted((checkpoint[0] / "images").iterdir())[0]
    (tmp_path / "a.png").write_bytes(good.read_bytes()[:40])
    (tmp_path / f"b{good.suffix}").write_bytes(good.read_bytes())
    output = ["--json", tmp_path / "s.json", "--picture", tmp_path / "s.pdf"]
    assert run("zero-shot", "--weights", checkpoint[0], "--labels", "a,b", tmp_path, *output) == 0
    assert f"skipped {tmp_path / 'a.png'}: not a readable image" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["image"].endswith(f"b{good.suffix}")
    assert run("zero-shot", "--weights", checkpoint[0], "--labels", "a,b", tmp_path / "a.png", *output) == 1
    assert "none of the 1 images could be read; skipped" in capsys.readouterr().err


@pytest.mark.parametrize("tower", ["image", "text"])
def test_embeddings_that_are_not_finite_rank_nothing(checkpoint, tmp_path, capsys, tower):
    path, _, _ = checkpoint
    bundle = load(path)
    params = bundle.params | {tower: jax.tree.map(lambda leaf: leaf * jnp.nan, bundle.params[tower])}
    save(dataclasses.replace(bundle, params=params), tmp_path / "broken")
    arguments = ["--weights", str(tmp_path / "broken"), "--labels", "cat,dog", str(path / "images")]
    assert main(["zero-shot", *arguments, "--picture", str(tmp_path / "p.png")]) == 1
    name = str(path / "images" / "0.png") if tower == "image" else "label 'cat'"
    assert f"{name}: what the model makes of it is not finite" in capsys.readouterr().err


def test_labels_come_from_a_list_a_file_or_imagenet(tmp_path):
    assert zero_shot.parse_labels("a, b c ,") == ["a", "b c"]
    (tmp_path / "labels.txt").write_text("one\n\ntwo\n")
    assert zero_shot.parse_labels(str(tmp_path / "labels.txt")) == ["one", "two"]
    assert len(zero_shot.parse_labels("imagenet")) == 1000
