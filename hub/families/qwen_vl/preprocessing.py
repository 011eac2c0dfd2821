"""How the files beside Qwen-VL's weights say that images and videos become patches: every key has its fate.

The classes are transformers' Qwen2VLImageProcessor, Qwen2VLVideoProcessor and Qwen3VLVideoProcessor. Sizes are bounds
of an area: `min_pixels` and `max_pixels` in the releases, since 4.50 `size` with shortest_edge and longest_edge, over
which the former win.
"""

from collections.abc import Mapping
from typing import Any

from ...keys import Key, Section, brief, harmless, only, used
from ...processor import FILTERS, IMAGE, JOINT, OPENAI, Statistics, statistics

_PATCHES = ("patch_size", "temporal_patch_size", "merge_size")
_KEPT = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
_PIXELS: dict[str, Key] = {
    **{name: key for name, key in IMAGE.keys.items() if key.fate == "harmless" or name in _KEPT},
    "do_resize": only(True),
    "size": used("object", None),
    "min_pixels": used("count", None),
    "max_pixels": used("count", None),
    "resample": used("whole", 3, choices=FILTERS),
    **{name: used("count", None) for name in _PATCHES},
    # The class neither crops nor fills
    **dict.fromkeys(("do_center_crop", "crop_size", "do_pad", "default_to_square"), harmless("ignored")),
}
_TYPES = ("image_processor_type", "feature_extractor_type", "video_processor_type")
IMAGES = Section({**_PIXELS, **{name: used("text", None) for name in _TYPES}})
VIDEOS = Section(
    {
        **IMAGES.keys,
        "cap_pixels_per_frame": used("flag", None),
        "max_video_tokens": used("count", 128_000),
        "do_sample_frames": only(False),
        **dict.fromkeys(("fps", "num_frames", "min_frames", "max_frames"), harmless("ignored")),  # without sampling
        **dict.fromkeys(("video_metadata", "size_divisor"), harmless("ignored")),
    }
)
# Qwen3-VL's: the area is that of all frames together, and the class takes frames out of the video itself
CLIPS = Section(
    {
        **VIDEOS.keys,
        **dict.fromkeys(("min_pixels", "max_pixels"), only(None)),
        "max_video_tokens": used("count", 768),
        "do_sample_frames": only(True),
        "fps": used("positive", 2.0),
        "min_frames": used("count", 4),
        "max_frames": used("count", 768),
        "num_frames": only(None),
        "max_duration": only(None),
        "max_image_size": harmless("ignored"),
    }
)
_HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_BOUNDS = {
    "clip": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
    "image": {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28},
    "video": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
}
TABLES = {
    "transformers: Qwen2VLImageProcessor, preprocessor_config.json": IMAGES,
    "transformers: Qwen2VLVideoProcessor, video_preprocessor_config.json": VIDEOS,
    "transformers: Qwen3VLVideoProcessor, video_preprocessor_config.json": CLIPS,
}


def read_pixels(
    documents: Mapping[str, Any], kind: str, patches: Mapping[str, int], clips: bool = False
) -> dict[str, Any]:
    """The settings of "image" or "video" as the fields of `PixelSettings` (data/conversations/qwen_vl.py).

    `patches` are the sizes of the model's patches, which the files may repeat. Absent entries are those of the class.
    Videos without settings of their own have the images', but for the bounds of their area: those of qwen-vl-utils,
    also for the videos as a whole, unless `cap_pixels_per_frame` says no. With `clips` videos are those of Qwen3-VL,
    whose class has settings of its own. ValueError names what is not understood.
    """
    clips = clips and kind == "video"
    given, where = _given(documents, kind)
    if not given and kind == "video" and not clips:
        given, where = _given(documents, "image")
        given = {name: value for name, value in given.items() if name not in ("size", "min_pixels", "max_pixels")}
    section = CLIPS if clips else VIDEOS if kind == "video" else IMAGES
    entries = section.read((_HALVES if clips else OPENAI) | given, where)
    for name in _PATCHES:
        if entries[name] not in (None, patches[name]):
            raise ValueError(f"{where}: {name!r} is {entries[name]}, the model's is {patches[name]}")
    colours: Statistics = statistics(entries, where)
    side = patches["patch_size"] * patches["merge_size"]
    if clips:
        bounds = {
            **_bounds(entries, _BOUNDS["clip"], where),
            "whole_clip": True,
            "frame_tokens": entries["max_video_tokens"] if entries["cap_pixels_per_frame"] else 0,
        }
        return {**bounds, "mean": colours[0], "std": colours[1], "resample": entries["resample"], **patches}
    whole = kind == "video" and entries["cap_pixels_per_frame"] is not False
    return {
        **_bounds(entries, _BOUNDS[kind], where),
        "clip_pixels": int(entries["max_video_tokens"] * side * side * 0.9) if whole else 0,
        "mean": colours[0],
        "std": colours[1],
        "resample": entries["resample"],
        **patches,
    }


def read_sampling(documents: Mapping[str, Any]) -> dict[str, Any]:
    """How Qwen3-VL's class takes frames out of a video, as the fields of `FrameSampling`."""
    entries = CLIPS.read(*_given(documents, "video"))
    return {"even": False} | {name: entries[name] for name in ("fps", "min_frames", "max_frames")}


def _given(documents: Mapping[str, Any], kind: str) -> tuple[dict[str, Any], str]:
    """What the files say about "image" or "video", and where."""
    joint = JOINT.read(documents.get("processor_config.json") or {}, "processor_config.json")
    files = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}
    where, given = files[kind], joint[f"{kind}_processor"] or documents.get(files[kind])
    if joint[f"{kind}_processor"]:
        where = f"processor_config.json, {kind}_processor"
    return {name: value for name, value in (given or {}).items() if value is not None}, where


def _bounds(entries: Mapping[str, Any], absent: Mapping[str, int], where: str) -> dict[str, int]:
    size = dict(absent if entries["size"] is None else entries["size"])
    for edge, name in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        if entries.get(name) is not None:
            size = {key: value for key, value in size.items() if key != name} | {edge: entries[name]}
    known = set(size) == set(absent)
    if not known or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in size.values()):
        raise ValueError(f"{where}: 'size' is {brief(size)}, expected the areas 'shortest_edge' and 'longest_edge'")
    return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
