"""Prompt templates of CLIP's zero-shot evaluation (openai/CLIP notebooks/Prompt_Engineering_for_ImageNet.ipynb)."""

_ARTICLES = ("a", "the")
_OF_PHOTO = (
    *("bad", "low resolution", "cropped", "bright", "dark", "close-up"),
    *("black and white", "pixelated", "jpeg corrupted", "blurry", "good"),
)
_WORKS = ("sculpture", "rendering", "tattoo", "drawing", "painting", "doodle", "sketch", "rendition")
_BARE = ("graffiti", "art", "itap")
_MATERIALS = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")
_OF_OBJECT = ("hard to see", "clean", "dirty", "cool", "nice", "weird", "small", "large")

IMAGENET_80: tuple[str, ...] = (
    *(f"a {adjective} photo of {article} {{}}." for adjective in _OF_PHOTO for article in _ARTICLES),
    *(f"a photo of {article} {{}}." for article in _ARTICLES),
    *(f"a {work} of {article} {{}}." for work in _WORKS for article in _ARTICLES),
    *(f"{work} of {article} {{}}." for work in _BARE for article in _ARTICLES),
    *(f"{article} {material} {{}}." for material in _MATERIALS for article in _ARTICLES),
    *(f"{article} {{}} in a video game." for article in _ARTICLES),
    *(f"a photo of {article} {adjective} {{}}." for adjective in _OF_OBJECT for article in _ARTICLES),
    *("a photo of many {}.", "a photo of my {}.", "a photo of one {}.", "itap of my {}."),
)
IMAGENET_7: tuple[str, ...] = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
TEMPLATES: dict[str, tuple[str, ...]] = {
    "80": IMAGENET_80,
    "7": IMAGENET_7,
    "1": ("a photo of a {}.",),
    "bare": ("{}",),
}
