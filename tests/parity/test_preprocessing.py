"""Preprocessor files beside the published processors: every key of every class, on odd images."""

import copy
import json

import numpy as np
import pytest
from omnax.data.conversations.qwen_vl import PixelSettings
from omnax.data.preprocess import build
from omnax.hub import processor as processors
from omnax.hub.families.qwen_vl import preprocessing as qwen
from oracles import timm, torch, transformers
from PIL import Image

IMAGES = [np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8) for size in ((45, 71), (83, 38))]
TOLERANCE = 2e-6


def ours(processor, image):
    return build(processor.steps)({"image": image}, np.random.default_rng(0))["image"]


def assert_equal(processor, oracle, message=""):
    for image in IMAGES:
        np.testing.assert_allclose(
            ours(processor, image), oracle(image), rtol=1e-6, atol=TOLERANCE, err_msg=str(message)
        )


def published(name, entries):
    """The class of transformers that computes with Pillow, as our rules do, as a function of one image."""
    made = getattr(transformers, f"{name}Pil")(**entries)
    return lambda image: np.moveaxis(made(Image.fromarray(image), return_tensors="np")["pixel_values"][0], 0, -1)


def read_entries(entries):
    return processors.from_transformers({"preprocessor_config.json": entries}, (8, 8), "ViTImageProcessor")


SMALL = {"size": {"height": 24, "width": 20}}
COVER = {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 18}}
CASES = {
    "ViTImageProcessor": SMALL,
    "SiglipImageProcessor": SMALL,
    "DeiTImageProcessor": {"size": {"height": 32, "width": 30}, "crop_size": {"height": 24, "width": 20}},
    "CLIPImageProcessor": COVER,
    "BitImageProcessor": COVER,
}
VALUES = {
    "do_resize": [False],
    "size": [
        *(26, [26, 22], {"height": 26, "width": 22}, {"shortest_edge": 26}, {"longest_edge": 26}),
        *({"shortest_edge": 20, "longest_edge": 30}, {"max_height": 20, "max_width": 30}),
    ],
    "default_to_square": [True, False],
    "resample": [0, 1, 2, 3, 4, 5],
    "do_center_crop": [True, False],
    "crop_size": [22, [22, 20], {"height": 22, "width": 20}],
    "do_rescale": [False],
    "rescale_factor": [1 / 127.5],
    "do_normalize": [False],
    "image_mean": [0.25, [0.1, 0.2, 0.3]],
    "image_std": [0.25, [0.1, 0.2, 0.3]],
    "do_pad": [True],
    "pad_size": [{"height": 100, "width": 100}],
    "do_convert_rgb": [True],
    "use_square_size": [True],
}


@pytest.mark.parametrize("name", CASES)
def test_every_key_of_the_class_gives_equal_pixels_or_is_refused_by_name(name):
    """Each value that is not the default, alone and with a crop: equality, or a refusal with the key in it."""
    keys = set(transformers.processing_utils.ImagesKwargs.__annotations__)
    assert keys <= set(processors.IMAGE.keys)
    outcomes = {}
    for key, values in VALUES.items():
        for value in values:
            entries = CASES[name] | {key: value}
            document = {"preprocessor_config.json": {"image_processor_type": name, **entries}}
            try:
                processor = processors.from_transformers(document, (24, 20), name)
            except ValueError as error:
                # Where a crop has no size the library fails too
                named = f"'{key}'" in str(error) or (key == "do_center_crop" and "'crop_size' is None" in str(error))
                assert named or "leaves images of any size" in str(error), error
                outcomes[key, str(value)] = "refused"
                continue
            assert_equal(processor, published(name, entries), (key, value))
            outcomes[key, str(value)] = "equal"
            if processor.files:
                assert processors.to_transformers(processor, name) == document
            again = processors.to_transformers(processors.dataclasses.replace(processor, files={}), "")
            assert processors.from_transformers(again, (24, 20), name) == processor
    assert outcomes["do_rescale", "False"] == outcomes["image_mean", "0.25"] == "equal"
    print(outcomes)


@pytest.mark.parametrize("name", CASES)
def test_absent_entries_are_the_defaults_of_the_class(name):
    document = {"preprocessor_config.json": {"image_processor_type": name}}
    processor = processors.from_transformers(document, (224, 224), "ViTImageProcessor")
    assert_equal(processor, published(name, {}))


def test_a_crop_beyond_the_image_is_filled_with_black():
    """As the library's default class has it; that of Pillow puts an odd margin elsewhere."""
    entries = {"do_resize": False, "crop_size": {"height": 60, "width": 90}}
    document = {"preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor", **entries}}
    oracle = transformers.CLIPImageProcessor(**entries)
    processor = processors.from_transformers(document, (60, 90), "CLIPImageProcessor")
    for image in IMAGES:
        expected = oracle(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(ours(processor, image), np.moveaxis(expected, 0, -1), atol=TOLERANCE)


def test_deit_resizes_to_256_and_crops_224():
    processor = processors.from_transformers(
        {"preprocessor_config.json": {"image_processor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224}},
        (224, 224),
        "ViTImageProcessor",
    )
    assert processor.crop == (224, 224) and processor.edges == (256, 256)


def test_a_directory_of_transformers_5_keeps_its_one_file(tmp_path):
    """processor_config.json alone: read, and written back as it is."""
    settings = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "image_mean": [0.1, 0.2, 0.3]}
    image = transformers.CLIPImageProcessor(**settings)
    nested = {"image_processor": json.loads(image.to_json_string()), "processor_class": "CLIPProcessor"}
    files = {"processor_config.json": nested}
    processor = processors.from_transformers(files, (16, 16), "CLIPImageProcessor")
    assert_equal(processor, published("CLIPImageProcessor", settings))
    assert processors.to_transformers(processor) == files
    changed = processors.to_transformers(processor.resized((32, 32)))
    assert changed["preprocessor_config.json"]["crop_size"] == {"height": 32, "width": 32}
    beside = files | {"preprocessor_config.json": {"size": 7}}
    assert processors.from_transformers(beside, (16, 16), "CLIPImageProcessor") == processor


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(24, 24), (24, 36), (30, 20)])
@pytest.mark.parametrize("pct", [0.875, 0.95, 1.0])
def test_timms_crops_equal_its_evaluation(mode, size, pct):
    cfg = {"input_size": (3, *size), "crop_pct": pct, "crop_mode": mode, "mean": (0.3, 0.4, 0.5)}
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))
    processor = processors.from_timm(cfg, size)
    assert_equal(processor, lambda image: np.moveaxis(transform(Image.fromarray(image)).numpy(), 0, -1))
    assert processors.from_timm(processors.to_timm(processor, {}), size) == processor


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "nearest-exact"])
def test_timms_filters(name):
    cfg = {"input_size": (3, 24, 24), "interpolation": name}
    try:
        processor = processors.from_timm(cfg, (24, 24))
    except ValueError as error:
        assert "'interpolation' is 'nearest-exact'" in str(error)
        return
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))
    assert_equal(processor, lambda image: np.moveaxis(transform(Image.fromarray(image)).numpy(), 0, -1))


PUBLISHED = {  # keys of pretrained_cfg -> values off their defaults, one at a time
    "interpolation": ["bilinear"],
    "crop_pct": [0.8],
    "crop_mode": ["squash", "border"],
    "mean": [[0.1, 0.2, 0.3]],
    "std": [[0.1, 0.2, 0.3]],
    "input_size": [[3, 30, 30]],
    "fixed_input_size": [True],
    "test_input_size": [[3, 48, 48]],
    "test_crop_pct": [1.0],
    "min_input_size": [[3, 8, 8]],
    "num_classes": [7],
    "label_offset": [1],
    "label_names": [["a"]],
    "label_descriptions": [{"a": "b"}],
    "pool_size": [[2, 2]],
    "test_pool_size": [[2, 2]],
    "first_conv": ["x"],
    "classifier": ["x"],
    "custom_load": [True],
    "state_dict": [{}],
    **{key: ["x"] for key in ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag")},
    **{key: ["x"] for key in ("license", "description", "origin_url", "paper_name", "paper_ids", "notes")},
}


def test_every_key_of_timms_pretrained_cfg_gives_equal_pixels_or_is_refused_by_name():
    assert PUBLISHED.keys() == timm.models.PretrainedCfg.__dataclass_fields__.keys()
    refused = set()
    for key, values in PUBLISHED.items():
        for value in values:
            cfg = {"input_size": [3, 24, 24], "crop_pct": 0.9, key: value}
            try:
                processor = processors.from_timm(cfg, (24, 24))
            except ValueError as error:
                assert f"'{key}' is" in str(error)
                refused.add(key)
                continue
            made = timm.models.PretrainedCfg(**cfg).to_dict()
            transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=made))
            assert_equal(
                processor, lambda image, t=transform: np.moveaxis(t(Image.fromarray(image)).numpy(), 0, -1), key
            )
    assert refused == {"label_offset"}
    beside = processors.from_timm({"input_size": [3, 30, 30]}, (24, 24))  # of a model of any size
    assert beside.crop == (30, 30) and processors.from_timm(
        {"input_size": [3, 9, 9], "fixed_input_size": True}, (24, 24)
    )
    with pytest.raises(
        ValueError, match=r"'input_size' is \(30, 30\), the positions are of \(24, 24\); give image_size="
    ):
        beside.fitted((24, 24), (24, 24), "config.json")
    assert beside.fitted((30, 30), (24, 24), "config.json").crop == (30, 30)
    with pytest.raises(ValueError, match=r"'crop_pt' is unknown, got 0\.8; nearest: 'crop_pct'"):
        processors.from_timm({"crop_pt": 0.8}, (24, 24))


def test_the_squash_of_a_published_checkpoint():
    """vit_base_patch16_clip_384.openai_ft_in12k_in1k as timm registers it: the whole image to 404, then 384 of it."""
    cfg = timm.models.get_pretrained_cfg("vit_base_patch16_clip_384.openai_ft_in12k_in1k").to_dict()
    assert (cfg["crop_mode"], cfg["crop_pct"]) == ("squash", 0.95)
    processor = processors.from_timm(cfg, (384, 384))
    assert (processor.fit, processor.edges, processor.crop) == ("stretch", (404, 404), (384, 384))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg))
    assert_equal(processor, lambda image: np.moveaxis(transform(Image.fromarray(image)).numpy(), 0, -1))
    written = processors.to_timm(processor, cfg)
    assert {key: written[key] for key in ("crop_pct", "crop_mode")} == {"crop_pct": 0.95, "crop_mode": "squash"}
    # And in transformers' words: a resize to 404, then a crop.
    assert processors.from_transformers(processors.to_transformers(processor), (384, 384), "").edges == (404, 404)


def test_timms_config_of_2022_is_flat():
    flat = {"architecture": "vit_tiny_patch16_224", "crop_pct": 0.8, "mean": [0.1, 0.2, 0.3], "num_classes": 3}
    assert processors.from_timm(processors.timm_preprocessing(flat), (24, 24)).shortest_edge == 30


@pytest.mark.parametrize("size", [24, [24, 36], [36, 24]])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_open_clips_preprocessing(size, resize_mode, interpolation):
    import open_clip  # behind the oracles, which mend torchvision

    cfg = {
        "size": size,
        "resize_mode": resize_mode,
        "interpolation": interpolation,
        "fill_color": 77,
        "mean": [0.3] * 3,
    }
    oracle = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**cfg | {"size": size if isinstance(size, int) else tuple(size)}), False
    )
    processor = processors.from_open_clip(cfg, (24, 24))
    assert_equal(processor, lambda image: np.moveaxis(oracle(Image.fromarray(image)).numpy(), 0, -1))
    again = processors.from_open_clip(processors.to_open_clip(processor), (24, 24))
    for image in IMAGES:
        np.testing.assert_array_equal(ours(again, image), ours(processor, image))


def test_every_key_of_open_clips_preprocess_cfg_has_a_fate():
    import open_clip

    fields = open_clip.transform.PreprocessCfg.__dataclass_fields__
    section = processors.TABLES["open_clip: preprocess_cfg"]
    assert section.keys.keys() == fields.keys()
    cfg = {"size": 24, "mean": 0.25, "std": [0.5, 0.4, 0.3]}  # a number for all channels
    oracle = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**cfg), False)
    processor = processors.from_open_clip(cfg, (24, 24))
    assert_equal(processor, lambda image: np.moveaxis(oracle(Image.fromarray(image)).numpy(), 0, -1))


OWN = processors.ImageProcessor
UNSAID = {
    "TensorFlow's resize": (OWN((24, 24), method="tf_bilinear"), ["timm", "open_clip", "transformers"]),
    "big_vision's rounding": (OWN((24, 24), 30, rounding="big_vision"), ["timm", "open_clip", "transformers"]),
    "timm's crop": (OWN((24, 24), 30), ["open_clip", "transformers"]),
    "transformers' crop": (OWN((24, 24), 30, crop_rule="floor"), ["timm", "open_clip"]),
    "a margin of three": (OWN((24, 24), edges=(27, 27)), ["open_clip", "transformers"]),
    "a margin of four": (OWN((24, 24), edges=(28, 28)), ["open_clip"]),
    "fitted inside": (OWN((24, 24), fit="contain"), ["transformers", "timm"]),
    "a grey border": (OWN((24, 24), fit="contain", method="pil_bicubic", fill=(127,)), ["transformers", "timm"]),
    "covered, not square": (OWN((24, 36), fit="cover", method="pil_bilinear"), ["transformers", "open_clip"]),
    "no resize": (OWN((24, 24), fit="none", crop_rule="floor"), ["timm", "open_clip"]),
    "stretched": (OWN((24, 24), method="pil_bicubic"), []),
}


@pytest.mark.parametrize("name", UNSAID)
def test_preprocessing_is_written_as_it_is_or_refused(name):
    """One of our own making; a published one takes the crop of the library that it is written for."""
    processor, refused = UNSAID[name]
    written = {
        "timm": lambda p: processors.from_timm(processors.to_timm(p, {}), p.crop),
        "open_clip": lambda p: processors.from_open_clip(processors.to_open_clip(p), p.crop),
        "transformers": lambda p: processors.from_transformers(processors.to_transformers(p), p.crop, ""),
    }
    for format, again in written.items():
        if format in refused:
            with pytest.raises(ValueError, match=f"{format}.*(word|say|no processor|resizes)"):
                again(processor)
            continue
        for image in IMAGES:
            np.testing.assert_allclose(ours(again(processor), image), ours(processor, image), atol=TOLERANCE)
    if name == "timm's crop":
        published = processors.dataclasses.replace(processor, origin="timm")
        assert written["transformers"](published).crop_rule == "floor"


@pytest.mark.parametrize(
    "read",
    [
        lambda: processors.from_open_clip({"mode": "L"}, (24, 24)),
        lambda: processors.from_open_clip({"modes": "RGB"}, (24, 24)),
        lambda: processors.from_timm({"crop_mode": "ratio"}, (24, 24)),
        lambda: read_entries({"image_mean": "a"}),
        lambda: read_entries({"image_std": 0}),
        lambda: read_entries({"image_processor_type": "DonutImageProcessor"}),
    ],
)
def test_what_is_not_understood_is_refused_by_name(read):
    with pytest.raises(ValueError, match=r"'(mode|modes|crop_mode|image_mean|image_std|image_processor_type)' is"):
        read()


QWEN_PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
QWEN = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}}
# Without which the library refuses the key
QWEN_BESIDE = {"do_center_crop": {"crop_size": 22}, "do_pad": {"pad_size": {"height": 100, "width": 100}}}
QWEN_VALUES = {
    "size": [
        *({"shortest_edge": 84 * 84, "longest_edge": 112 * 112}, {"shortest_edge": 84 * 84}, 56),
        {"height": 56, "width": 56},
    ],
    "min_pixels": [84 * 84],
    "max_pixels": [28 * 28],
    "patch_size": [7],
    "temporal_patch_size": [1],
    "merge_size": [1],
    "do_center_crop": [True],
    "data_format": ["channels_first"],
    **{name: VALUES[name] for name in ("do_resize", "default_to_square", "resample", "crop_size", "do_rescale")},
    **{name: VALUES[name] for name in ("rescale_factor", "do_normalize", "image_mean", "image_std", "do_pad")},
    "do_convert_rgb": [True],
}
VIDEO_VALUES = {
    "cap_pixels_per_frame": [True, False],
    "max_video_tokens": [8],
    "do_sample_frames": [True],
    "fps": [3.0],
    "num_frames": [2],
    "min_frames": [2],
    "max_frames": [2],
}


def qwen_patches(document, kind, frames):
    settings = PixelSettings(**qwen.read_pixels(document, kind, QWEN_PATCHES))
    return settings.patches([Image.fromarray(frame) for frame in frames])


def outcome(name, key, value, ours, oracle):
    """ "equal" or "refused"; anything else fails."""
    try:
        patches, grid = ours()
    except ValueError as error:
        assert f"'{key}'" in str(error) or f"'{key.replace('min_', 'max_')}'" in str(error), error
        return "refused"
    expected, expected_grid = oracle()
    assert grid == tuple(int(side) for side in expected_grid), (name, key, value)
    np.testing.assert_allclose(patches, expected, atol=2e-5, rtol=1e-5, err_msg=f"{name}.{key} = {value}")
    return "equal"


def test_every_key_of_qwens_images_gives_equal_patches_or_is_refused_by_name():
    """In either of the two files: each value that is not the default."""
    made = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl
    keys = set(transformers.processing_utils.ImagesKwargs.__annotations__)
    assert keys | set(made.Qwen2VLImageProcessorKwargs.__annotations__) <= set(qwen.IMAGES.keys)
    outcomes = {}
    for key, values in QWEN_VALUES.items():
        for value in values:
            entries = QWEN | {key: value} | QWEN_BESIDE.get(key, {})
            documents = [{"preprocessor_config.json": entries}, {"processor_config.json": {"image_processor": entries}}]

            def oracle(entries=entries):
                out = made.Qwen2VLImageProcessorPil(**copy.deepcopy(entries))(
                    Image.fromarray(IMAGES[0]), return_tensors="np"
                )
                return out["pixel_values"], out["image_grid_thw"][0]

            found = {
                outcome("image", key, value, lambda d=d: qwen_patches(d, "image", IMAGES[:1]), oracle)
                for d in documents
            }
            assert len(found) == 1
            outcomes[key, str(value)] = found.pop()
    print(outcomes)
    assert {key[0] for key, fate in outcomes.items() if fate == "refused"} == {"size", "do_resize", *QWEN_PATCHES}


def test_every_key_of_qwens_videos_gives_equal_patches_or_is_refused_by_name():
    """Frames of a size that stays as it is, and unresized there: its filter for videos is a level off even then."""
    made = transformers.models.qwen2_vl.video_processing_qwen2_vl
    keys = set(transformers.processing_utils.VideosKwargs.__annotations__)
    keys |= set(made.Qwen2VLVideoProcessorInitKwargs.__annotations__)
    assert keys <= set(qwen.VIDEOS.keys)
    frames = np.random.default_rng(0).integers(0, 256, (3, 56, 84, 3), np.uint8)
    base = {"size": {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}, "cap_pixels_per_frame": True}
    values = {key: value for key, value in QWEN_VALUES.items() if key not in ("data_format", "min_pixels", "size")}
    for key, values_of in (values | VIDEO_VALUES).items():
        for value in values_of:
            entries = base | {key: value} | QWEN_BESIDE.get(key, {})

            def oracle(entries=entries, sized=key in ("max_pixels", "max_video_tokens")):
                video = torch.from_numpy(frames).permute(0, 3, 1, 2)
                theirs = made.Qwen2VLVideoProcessor(**{"do_resize": sized} | copy.deepcopy(entries))
                out = theirs(video, return_tensors="pt")
                return out["pixel_values_videos"].numpy(), out["video_grid_thw"][0]

            if key in ("max_pixels", "max_video_tokens"):
                settings = PixelSettings(
                    **qwen.read_pixels({"video_preprocessor_config.json": entries}, "video", QWEN_PATCHES)
                )
                assert settings.grid(3, 56, 84) == tuple(oracle()[1])
                continue
            document = {"video_preprocessor_config.json": entries}
            outcome("video", key, value, lambda d=document: qwen_patches(d, "video", frames), oracle)


def test_what_qwens_files_leave_out():
    """The defaults of the classes; a video's colours are the image file's where there is no file for videos."""
    absent = PixelSettings(**qwen.read_pixels({}, "image", QWEN_PATCHES))
    theirs = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil()
    assert (absent.min_pixels, absent.max_pixels) == (theirs.size["shortest_edge"], theirs.size["longest_edge"])
    document = {"preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 12845056, "image_mean": 0.25}}
    image, video = (PixelSettings(**qwen.read_pixels(document, kind, QWEN_PATCHES)) for kind in ("image", "video"))
    assert image.mean == video.mean == (0.25,) * 3 and image.max_pixels == 12845056
    assert (video.min_pixels, video.max_pixels, video.clip_pixels) == (128 * 784, 768 * 784, 115_200 * 784)
    with pytest.raises(ValueError, match=r"processor_config\.json, video_processor: 'fpss' is unknown"):
        qwen.read_pixels({"processor_config.json": {"video_processor": {"fpss": 2}}}, "video", QWEN_PATCHES)
