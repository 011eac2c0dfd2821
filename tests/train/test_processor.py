"""What was evaluated is what is exported: each list of transforms and its processor give one odd image alike."""

import numpy as np
import pytest
from omnax.configs import clip, vit
from omnax.data import preprocess
from omnax.hub import processor as processors
from omnax.train.evaluation.processor import processor_of

SIZE = (16, 16)
MEANS = {"mean": (0.1, 0.5, 0.7), "std": (0.2, 0.3, 0.4)}
CROP = ("center_crop", {"size": 16})
LISTS = {
    "normalize": ("decode", ("resize", {"size": 16}), ("normalize", MEANS), ("keep", {"keys": ("image",)})),
    "0 to 1": ("decode", ("resize", {"size": 16}), ("value_range", {"low": 0.0, "high": 1.0})),
    "0 to 255": ("decode", ("resize", {"size": 16})),
    "resize, then crop": ("decode", ("resize", {"size": (20, 18)}), ("center_crop", {"size": 16}), "value_range"),
    "squash": ("decode", ("resize", {"size": 16, "method": "pil_bicubic"}), "value_range"),
    "bilinear": (
        ("resize_shortest", {"size": 19, "method": "pil_bilinear"}),
        ("center_crop", {"size": 16}),
        "value_range",
    ),
    "the transform's own method": (("resize_shortest", {"size": 19}), ("center_crop", {"size": 16}), "value_range"),
    "floor": (
        ("resize_shortest", {"size": 19, "rounding": "big_vision"}),
        ("center_crop", {"size": 16, "rule": "floor"}),
        "value_range",
    ),
    "cover": (("resize_keep_ratio", {"size": 20}), ("center_crop", {"size": 16}), "value_range"),
    "crop alone": (("center_crop", {"size": 16}), "value_range"),
}


@pytest.mark.parametrize("name", LISTS)
def test_the_processor_does_what_was_evaluated(name):
    steps = [step for step in LISTS[name] if step != "decode" and step[0] != "keep"]
    image = np.random.default_rng(1).integers(0, 256, (41, 53, 3), np.uint8)
    processor = processor_of(LISTS[name], SIZE, 3)
    ours, written = (
        preprocess.build(list_)({"image": image}, np.random.default_rng(0))["image"]
        for list_ in (steps, processor.steps)
    )
    assert written.shape == (16, 16, 3)
    np.testing.assert_allclose(written, ours, atol=1e-5 * max(1, np.abs(ours).max()))


@pytest.mark.parametrize("arg", ["size=b32", "size=h14,hyper=openclip", "size=eva02-l14,hyper=eva", "size=siglip-b16"])
def test_what_the_published_recipes_evaluate_can_be_written_beside_their_weights(arg):
    """By default in transformers' words, those of EVA in open_clip's."""
    config = clip.get_config(arg)
    size = tuple(config.model.image.trunk.image_size)
    processor = processor_of(config.data.preprocess_test, size, 3)
    files = processors.to_open_clip(processor) if "eva" in arg else processors.to_transformers(processor)
    read = processors.from_open_clip(files, size) if "eva" in arg else processors.from_transformers(files, size, "")
    image = np.random.default_rng(1).integers(0, 256, (size[0] + 27, 2 * size[0] + 9, 3), np.uint8)
    ours, written = (
        preprocess.build(p.steps)({"image": image}, np.random.default_rng(0))["image"] for p in (processor, read)
    )
    np.testing.assert_allclose(written, ours, atol=1e-5)


def test_big_visions_evaluation_has_words_in_its_own_format_alone():
    steps = vit.get_config("size=b16,data=i1k").data.preprocess_test
    processor = processor_of(steps, (224, 224), 3)
    assert processors.from_google((224, 224), resize_directly=False).steps == processor.steps
    for write in (processors.to_transformers, lambda p: processors.to_timm(p, {})):
        with pytest.raises(ValueError, match=r"preprocessing: .*bv_area.*--without-preprocessing"):
            write(processor)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (("decode", ("grayscale", {}), "value_range"), "no published processor does.*grayscale"),
        (("flip", "value_range"), "no published processor does.*flip"),
        (("value_range", ("resize", {"size": 16})), "no published processor does"),
        ((("resize", {"size": 24}), "value_range"), "expected"),
        ((("resize_shortest", {"size": 16}), "value_range"), "expected"),
    ],
)
def test_what_no_processor_does_is_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        processor_of(steps, SIZE, 3)
