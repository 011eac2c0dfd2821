"""Whole pipelines from text to latents and pictures beside diffusers', through one directory that it writes."""

import dataclasses
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from omnax.data.images.decode import encode_png
from omnax.data.latents import LatentFolder
from omnax.data.text.bpe import train_tokenizer
from omnax.infer import diffusion as inference
from omnax.infer.__main__ import main
from omnax.infer.draw import Options, check_prompts, draw, load, read_hint, save
from omnax.models.samplers import make_schedule
from omnax.models.stable_diffusion.pipeline import control_scales
from omnax.train.recipes.stable_diffusion.data import PictureConfig, train_batches
from oracles import transformers
from PIL import Image
from references.stable_diffusion import FORMS, randomized

TOLERANCE = 1e-4  # of a run of several steps: each adds its own rounding
SIDE, STEPS = 32, 4
LATENTS = np.random.default_rng(5).normal(size=(2, 4, SIDE // 4, SIDE // 4)).astype(np.float32)
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 600}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.3,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PROMPTS, NEGATIVE = ["a red disc on gray", "two blue squares"], "a dog"
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """diffusers' pipeline with every component, and its directory."""
    folder = tmp_path_factory.mktemp("pipeline")
    tokens = train_tokenizer(["a red disc on gray", "two blue squares and a dog"], 40, context_length=16)
    (folder / "words").mkdir()
    tokens.save(folder / "words")
    ids = {"bos_token_id": tokens.start_id, "eos_token_id": tokens.end_id, "pad_token_id": tokens.pad_id}
    text = transformers.CLIPTextConfig(**TEXT, **ids, max_position_embeddings=16)
    vision = transformers.CLIPVisionConfig(**VISION, image_size=SIDE, projection_dim=20)
    unet = randomized(diffusers.UNet2DConditionModel(**FORMS["1.5"]))
    net = randomized(diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16)), 1)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        vae=randomized(diffusers.AutoencoderKL(**VAE), 2),
        text_encoder=randomized(transformers.CLIPTextModel(text), 3),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "words"),
        unet=unet,
        controlnet=net,
        scheduler=diffusers.DDIMScheduler(**SCHEDULER, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=transformers.CLIPImageProcessor(size=SIDE, crop_size=SIDE),
        image_encoder=randomized(transformers.CLIPVisionModelWithProjection(vision), 4),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "sd")
    return pipe, folder / "sd"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A control image and an image prompt, as arrays and files."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    found = {name: rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8) for name in ("control", "prompt")}
    for name, pixels in found.items():
        (folder / f"{name}.png").write_bytes(encode_png(pixels))
    return found, folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An IP-Adapter's tensors, and the file that holds them."""
    rng, path = np.random.default_rng(7), tmp_path_factory.mktemp("adapter") / "ip-adapter.safetensors"
    draw = lambda *shape: torch.from_numpy(rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32))  # noqa: E731
    tensors = {
        "image_proj": {"proj.weight": draw(4 * 64, 20), "proj.bias": draw(256), "norm.weight": draw(64) + 1},
        "ip_adapter": {},
    }
    tensors["image_proj"]["norm.bias"] = draw(64)
    for n, width in ((1, 16), (3, 16), (5, 16), (7, 32)):  # down, up, up, middle
        tensors["ip_adapter"] |= {f"{n}.to_{name}_ip.weight": draw(width, 64) for name in "kv"}
    flat = {f"{part}.{name}": tensor for part, own in tensors.items() for name, tensor in own.items()}
    safetensors.torch.save_file(flat, path)
    return tensors, path


def ours(folder, hint, *, kind="", scale=0.8, guess=False, span=(0.0, 1.0), adapter=None, image=None, **options):
    loaded = inference.load_diffusion(folder, num_controls=0 if hint is None else 1, adapter=str(adapter or ""))
    size = loaded.size((SIDE, SIDE))
    return loaded.draw(
        make_schedule(loaded.sampler(kind), STEPS),
        loaded.prompt(PROMPTS, size),
        loaded.negative(NEGATIVE, size),
        jnp.stack([jax.random.key(i) for i in range(2)]),
        jnp.asarray(np.moveaxis(LATENTS, 1, -1)),
        guidance=5.0,
        hints=[] if hint is None else [(hint.astype(np.float32) / 255, control_scales(scale, STEPS, *span))],
        guess_mode=guess,
        image_tokens=None if image is None else loaded.tokens_of([image]),
        image_scale=0.6,
        **options,
    )


def theirs(pipe, hint, **options):
    out = pipe(
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        latents=torch.from_numpy(LATENTS),
        output_type="pt",
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        **({} if hint is None else {"image": [Image.fromarray(hint)] * 2, "controlnet_conditioning_scale": 0.8}),
        **options,
    )
    return np.moveaxis(out.images.numpy(), 1, -1)


def close(found, expected):
    """Theirs are in [0, 1] and clipped."""
    np.testing.assert_allclose(np.clip(np.asarray(found) / 2 + 0.5, 0, 1), expected, rtol=0, atol=TOLERANCE)
    assert expected.std() > 0.1


def test_guess_mode_for_part_of_the_steps(oracle, pictures):
    pipe, folder = oracle
    hint = pictures[0]["control"]
    close(
        ours(folder, hint, guess=True, span=(0.0, 0.6)), theirs(pipe, hint, guess_mode=True, control_guidance_end=0.6)
    )


def test_text_alone_with_another_sampler(oracle):
    """Euler scales what the UNet sees; the guidance is rescaled."""
    pipe, folder = oracle
    written = diffusers.DDIMScheduler.load_config(folder, subfolder="scheduler")  # every key stands in the file
    parts = {name: part for name, part in pipe.components.items() if name not in ("controlnet", "scheduler")}
    scheduler = diffusers.EulerDiscreteScheduler.from_config(written)
    plain = diffusers.StableDiffusionPipeline(**parts, scheduler=scheduler, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    close(ours(folder, None, kind="euler", rescale=0.7), theirs(plain, None, guidance_rescale=0.7))


def test_control_and_image_prompt(oracle, pictures, adapter):
    """The last of these tests: diffusers' pipeline keeps the adapter."""
    pipe, folder = oracle
    tensors, path = adapter
    files = {"subfolder": "", "weight_name": "", "image_encoder_folder": None, "low_cpu_mem_usage": False}
    pipe.load_ip_adapter(tensors, **files)
    pipe.set_ip_adapter_scale(0.6)
    hint, image = pictures[0]["control"], pictures[0]["prompt"]
    expected = theirs(pipe, hint, ip_adapter_image=Image.fromarray(image))
    close(ours(folder, hint, adapter=path, image=image), expected)


def test_command(oracle, pictures, adapter, tmp_path, capsys):
    """Pictures are functions of prompt and seed; another of either compiles nothing anew; files say what they are."""
    folder, files = oracle[1], pictures[1]
    arguments = ["draw", "--weights", str(folder), "--size", "32", "32", "--steps", "3", "--out", str(tmp_path / "a")]
    arguments += ["--control", str(files / "control.png"), "--canny", "50", "100", "--batch-size", "2"]
    before = inference._draw._cache_size()
    assert main([*arguments, "a red disc", "a blue disc", "--seed", "3"]) == 0
    assert inference._draw._cache_size() == before + 1
    out = capsys.readouterr().out
    assert "2 pictures" in out and "3/3" in out  # one batch of three steps
    with Image.open(tmp_path / "a" / "0001.png") as file:
        drawn, written = np.asarray(file), json.loads(file.text["parameters"])
    assert written == {
        "prompt": "a blue disc",
        "seed": 4,
        "size": [32, 32],
        "steps": 3,
        "weights": str(folder),
        "control": [str(files / "control.png")],
        "canny": [50.0, 100.0],
    }
    options = Options(
        weights=str(folder),
        prompts=["a blue disc", "a green disc"],
        seed=4,
        size=(32, 32),
        steps=3,
        control=[str(files / "control.png")],
        canny=(50.0, 100.0),
        batch_size=2,
    )
    loaded = load(options)
    again = draw(options, loaded)
    np.testing.assert_array_equal(again[0].pixels, drawn)  # another place in the batch, the same seed
    assert (again[1].pixels != again[0].pixels).any()
    assert inference._draw._cache_size() == before + 1
    assert "3/3" in capsys.readouterr().out
    more = {"image": str(files / "prompt.png"), "strength": 0.4, "control": (), "canny": None}
    onward = draw(dataclasses.replace(options, **more, prompts=["a blue disc"]), load_without_control(loaded))
    assert onward[0].pixels.shape == (32, 32, 3)
    with pytest.raises(ValueError, match=r"expected a folder for 2 pictures"):
        save(again, tmp_path / "one.png")


def load_without_control(loaded):
    pipeline = dataclasses.replace(loaded.pipeline, controlnets=())
    return dataclasses.replace(loaded, pipeline=pipeline, control_params=())


def test_bad_input_is_named(oracle, pictures, adapter, tmp_path, capsys):
    folder, files = oracle[1], pictures[1]
    options = Options(weights=str(folder), prompts=["a red disc"], size=(32, 32), steps=2)
    loaded = load(options)
    small = tmp_path / "small.png"
    small.write_bytes(encode_png(np.zeros((8, 9, 3), np.uint8)))
    controlled = dataclasses.replace(options, control=[str(small)])
    assert read_hint(str(small), controlled, (32, 32)).shape == (32, 32, 3)
    assert "has 8 x 9 pixels, the picture 32 x 32: resized" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has 8 x 9 pixels, the picture 32 x 32; expected the same"):
        read_hint(str(small), dataclasses.replace(controlled, resize_control="error"), (32, 32))
    long = dataclasses.replace(options, prompts=["a red disc on gray " * 4])
    check_prompts(long, loaded)
    assert "prompt too long: 'gray a red disc on gray' is not read" in capsys.readouterr().out
    with pytest.raises(ValueError, match="prompt of more than 16 tokens"):
        check_prompts(dataclasses.replace(long, long_prompt="error"), loaded)
    with pytest.raises(ValueError, match="size is 30 x 32 pixels, expected multiples of 4"):
        loaded.size((30, 32))
    with pytest.raises(ValueError, match="2 control images for 1 ControlNets"):
        load(dataclasses.replace(options, control=["a", "b"]))
    other = adapter[0] | {"ip_adapter": {"1.to_k_ip.weight": torch.ones(8, 64), "1.to_v_ip.weight": torch.ones(8, 64)}}
    flat = {f"{part}.{name}": tensor for part, own in other.items() for name, tensor in own.items()}
    safetensors.torch.save_file(flat, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="adapter of another base model"):
        load(dataclasses.replace(options, adapter=str(tmp_path / "other.safetensors"), ip_image=[str(files)]))
    with pytest.raises(ValueError, match="give both --ip-image and --adapter"):
        dataclasses.replace(options, adapter="a.bin")
    with pytest.raises(ValueError, match=r"no model_index.json"):
        load(dataclasses.replace(options, weights=str(folder / "unet")))
    with pytest.raises(ValueError, match=r"begins at 0.5 and ends at 0.2"):
        control_scales(1.0, 4, 0.5, 0.2)


def test_cached_latents(oracle, tmp_path, capsys):
    """Moments and text states as diffusers has them; a stopped job goes on; other settings are refused."""
    pipe, folder = oracle
    rng, images = np.random.default_rng(3), tmp_path / "images"
    images.mkdir()
    pixels = [rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8) for _ in range(5)]
    for i, picture in enumerate(pixels):
        (images / f"{i}.png").write_bytes(encode_png(picture) if i != 3 else b"damaged")
    lines = [json.dumps({"image": f"{i}.png", "text": PROMPTS[i % 2]}) for i in range(5)]
    (images / "captions.jsonl").write_text("\n".join(lines))
    arguments = ["cache-latents", "--weights", str(folder), "--data", str(images), "--out", str(tmp_path / "out")]
    arguments += ["--size", str(SIDE), "--condition", "canny", "--rows", "2", "--batch-size", "2"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "3 of 3 shards made" in out and "3.png" in out
    source = LatentFolder(tmp_path / "out")
    assert len(source) == 4
    batch = torch.from_numpy(np.stack([pixels[i] for i in (0, 1, 2, 4)])).permute(0, 3, 1, 2) / 127.5 - 1
    posterior = pipe.vae.encode(batch).latent_dist
    moments = torch.cat([posterior.mean, posterior.logvar], 1).permute(0, 2, 3, 1)
    texts = pipe.encode_prompt([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]], "cpu", 1, False)[0]
    empty = pipe.encode_prompt([""], "cpu", 1, False)[0]
    for i in range(4):
        example = source[i]
        np.testing.assert_allclose(example["moments"], moments[i], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(example["context"], texts[i], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(example["empty_context"], empty[0], rtol=0, atol=TOLERANCE)
        assert example["condition"].shape == (SIDE, SIDE, 3)
    shutil.rmtree(tmp_path / "out" / "00001")
    with pytest.raises(ValueError, match="lacks 1 of 3 shards, 00001 first"):
        LatentFolder(tmp_path / "out")
    assert main(arguments) == 0
    assert "1 of 3 shards made" in capsys.readouterr().out
    np.testing.assert_array_equal(LatentFolder(tmp_path / "out")[2]["moments"], source[2]["moments"])
    assert main([*arguments, "--rows", "4"]) == 1
    assert "made with examples" not in (said := capsys.readouterr().err) and "rows 2, not 4" in said
    with pytest.raises(ValueError, match=r"has no latents.json"):
        LatentFolder(images)
    # A training batch of the recipe has these rows and nothing else of them.
    data = PictureConfig(
        name="latents",
        path=str(tmp_path / "out"),
        preprocess=(),
        preprocess_test=(),
        condition="file",
        drop_text=0.5,
    )
    rows = next(train_batches(data, 32, 0, lambda: ())((0, 1)))
    assert rows.keys() == {"moments", "context", "condition", "index", "mask"}
    assert rows["condition"].max() == 1
    dropped = (np.abs(rows["context"] - np.asarray(empty)).max((1, 2)) < 1e-3).mean()
    assert 0.2 < dropped < 0.8
