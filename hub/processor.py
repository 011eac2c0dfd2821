"""The published preprocessing of images as data: which size, which resize rule, which colours.

The pixel functions live in data/: `data.preprocess.build(processor.steps)` makes the transform.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

from .keys import Section, brief, harmless, only, used

# PIL's filter numbers, as `preprocessor_config.json` has them, and timm's names -> rules of data/images/resize.py.
FILTERS = {0: "pil_nearest", 1: "pil_lanczos", 2: "pil_bilinear", 3: "pil_bicubic", 4: "pil_box", 5: "pil_hamming"}
Step = tuple[str, dict[str, Any]]
OPENAI = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
HALVES = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_SQUARE = {"height": 224, "width": 224}
_COVERED = {"size": {"shortest_edge": 224}, "crop_size": _SQUARE, "do_center_crop": True, "default_to_square": False}
# Class of transformers 5.23 -> what it takes absent entries to be (beside those of IMAGE); the same for its PIL twin.
CLASSES: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {"size": _SQUARE, "resample": 2, **HALVES},
    "DeiTImageProcessor": {
        "size": {"height": 256, "width": 256},
        "crop_size": _SQUARE,
        "do_center_crop": True,
        "resample": 3,
        **HALVES,
    },
    "SiglipImageProcessor": {"size": _SQUARE, "resample": 3, "default_to_square": False, **HALVES},
    "BlipImageProcessor": {"size": {"height": 384, "width": 384}, "resample": 3, **OPENAI},
    "CLIPImageProcessor": {**_COVERED, "resample": 3, **OPENAI},
    "BitImageProcessor": {**_COVERED, "resample": 3, **OPENAI},
}
IMAGE = Section(
    {
        "do_resize": used("flag", True),
        "size": used("any", None),
        "default_to_square": used("flag", True),
        "resample": used("whole", 2, choices=FILTERS),
        "do_center_crop": used("flag", False),
        "crop_size": used("any", None),
        "do_rescale": used("flag", True),
        "rescale_factor": used("positive", 1 / 255),
        "do_normalize": used("flag", True),
        "image_mean": used("any", None),
        "image_std": used("any", None),
        "do_pad": only(False),
        "use_square_size": only(False),
        # An image is made RGB in any case: the models take nothing else, and the library fails without it
        **dict.fromkeys(("do_convert_rgb", "input_data_format", "device", "disable_grouping"), harmless("runtime")),
        **dict.fromkeys(("data_format", "return_tensors", "return_metadata"), harmless("outputs")),
        **dict.fromkeys(("pad_size", "image_seq_length", "do_reduce_labels"), harmless("ignored")),
        **dict.fromkeys(("image_processor_type", "feature_extractor_type"), used("text", None)),
        **dict.fromkeys(("processor_class", "_valid_processor_keys", "auto_map"), harmless("bookkeeping")),
    }
)
JOINT = Section(
    {
        "image_processor": used("object", None),
        "video_processor": used("object", None),
        "processor_class": harmless("bookkeeping"),
        "auto_map": harmless("bookkeeping"),
        "chat_template": harmless("ignored"),
        # Of BLIP-2: both stand in config.json as well, and are compared with it (hub/families/blip2)
        **dict.fromkeys(("num_query_tokens", "image_token"), harmless("tokens")),
    }
)
_TIMM = Section(
    {
        "interpolation": used("text", "bicubic", choices=tuple(name[4:] for name in FILTERS.values())),
        "crop_pct": used("positive", 0.875),
        "crop_mode": used("text", "center", choices=("center", "squash", "border")),
        "mean": used("numbers", (0.485, 0.456, 0.406)),
        "std": used("numbers", (0.229, 0.224, 0.225)),
        "input_size": used("integers", None),
        "fixed_input_size": used("flag", False),
        # of the model and its head: hub/families/vit/timm.py
        "num_classes": used("integer", 1000, null=True),
        "label_offset": only(None, 0),
        "label_names": used("any", None),
        "labels": used("any", None),  # the name of 2022
        "global_pool": used("text", None),
        "label_descriptions": harmless("outputs"),
        **dict.fromkeys(
            ("test_input_size", "test_crop_pct", "min_input_size"), harmless("ignored")
        ),  # unless asked for
        **dict.fromkeys(("pool_size", "test_pool_size", "first_conv", "classifier"), harmless("ignored")),
        # where the weights came from, and in which form they lay there
        **dict.fromkeys(("url", "file", "state_dict", "custom_load", "source", "tag"), harmless("bookkeeping")),
        **dict.fromkeys(("hf_hub_id", "hf_hub_filename", "architecture", "license"), harmless("bookkeeping")),
        **dict.fromkeys(("description", "origin_url", "paper_name", "paper_ids", "notes"), harmless("bookkeeping")),
        **dict.fromkeys(("num_features", "model_args"), harmless("bookkeeping")),  # around it in later files
    }
)
_PREPROCESSING = ("interpolation", "crop_pct", "crop_mode", "mean", "std")
_OPEN_CLIP = Section(
    {
        "size": used("any", 224),
        "mode": only("RGB"),
        "mean": used("any", OPENAI["image_mean"]),
        "std": used("any", OPENAI["image_std"]),
        # "random" is of training; open_clip evaluates it as bicubic
        "interpolation": used("text", "bicubic", choices=("bicubic", "bilinear", "random")),
        "resize_mode": used("text", "shortest", choices=("shortest", "longest", "squash")),
        "fill_color": used("whole", 0),
    }
)
_TIMM_FITS = {"center": "cover", "squash": "stretch", "border": "contain"}
_OPEN_CLIP_FITS = {"shortest": "cover", "squash": "stretch", "longest": "contain"}
TABLES = {
    "transformers: processors of ViT, DeiT, CLIP, BiT and SigLIP, preprocessor_config.json": IMAGE,
    "transformers: processor_config.json": JOINT,
    "timm: pretrained_cfg": _TIMM,
    "open_clip: preprocess_cfg": _OPEN_CLIP,
}


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Resize, crop, normalise: (pixels / 255 - mean) / std."""

    crop: tuple[int, int]  # rows, columns that the model sees
    # Length of the shorter side before the centre crop; None: `fit` says what becomes of the image.
    shortest_edge: int | None = None
    method: str = "pil_bilinear"  # of data/images/resize.py RESIZE
    rounding: str = "torchvision"  # of data/images/resize.py SHORTEST_EDGE
    crop_rule: str = "torchvision"  # of data/images/resize.py CENTER_CROP
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    # "stretch": to `edges` whatever the aspect ratio; "cover", "contain": the ratio is kept, and the image is no
    # smaller, or no larger, than `edges`; "none": no resize. Then comes the centre crop, where `edges` are not it.
    fit: str = "stretch"
    edges: tuple[int, int] | None = None  # None: `crop`
    fill: tuple[int, ...] = (0,)  # of what a crop finds beside the image: one level, or one a channel
    alpha: Literal["white", "drop"] = "white"  # what transparent pixels show, see data/images/decode.py to_channels
    files: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)  # what it was read from
    published_class: str = dataclasses.field(default="", compare=False)  # of transformers, that read them
    # The library whose file says this; "" for one of our own making. Two libraries' own rules differ by half a pixel in
    # where a crop of odd margins begins (CENTER_CROP) and in `alpha`, which no file says: a published processor takes
    # the rules of the library that it is written for, one of our own is written exactly or refused.
    origin: str = dataclasses.field(default="", compare=False)

    @property
    def steps(self) -> list[Step]:
        """From a uint8 image [X, Y, C] to what the model takes, in the language of `data.preprocess`."""
        edges, crop = self.edges or self.crop, {"size": self.crop, "rule": self.crop_rule}
        geometry: list[Step] = []
        if self.shortest_edge is not None:
            resize = {"size": self.shortest_edge, "method": self.method, "rounding": self.rounding}
            edges, geometry = (self.shortest_edge,) * 2, [("resize_shortest", resize)]
        elif self.fit in ("cover", "contain"):
            resize = {"size": edges, "method": self.method, "contain": self.fit == "contain"}
            geometry = [("resize_keep_ratio", resize)]
        elif self.fit == "stretch":
            geometry = [("resize", {"size": edges, "method": self.method})]
        if edges != self.crop or self.shortest_edge is not None or self.fit != "stretch":
            small = self.fit in ("contain", "none") or edges[0] < self.crop[0] or edges[1] < self.crop[1]
            geometry.append(("center_crop", crop | ({"fill": self.fill} if small else {})))
        return [*geometry, ("normalize", {"mean": self.mean, "std": self.std})]

    @property
    def crops_unevenly(self) -> bool:
        """Whether the centre crop leaves odd margins that libraries share out differently, of some image at least."""
        if self.shortest_edge is not None or self.fit != "stretch":
            return True
        return any((edge - side) % 4 == 3 for edge, side in zip(self.edges or self.crop, self.crop, strict=True))

    def fitted(self, size: tuple[int, int], published: tuple[int, int], where: str) -> "ImageProcessor":
        """For a model that takes images of one size, `published` being that of its file.

        ValueError where timm's file gives it images of another, for positions that follow them.
        """
        if size != published:
            return self.resized(size)
        if self.crop != size and self.origin == "timm":
            raise ValueError(
                f"{where}: 'input_size' is {self.crop}, the positions are of {size}; give image_size={self.crop}"
            )
        return self

    def resized(self, size: tuple[int, int]) -> "ImageProcessor":
        """For images of another size: the margin of the crop keeps its proportion; none beside a non-square crop."""
        edge, edges = self.shortest_edge, self.edges
        if edge is not None:
            edge = math.floor(edge * size[0] / self.crop[0]) if size[0] == size[1] else None
        if edges is not None:
            edges = (math.floor(edges[0] * size[0] / self.crop[0]), math.floor(edges[1] * size[1] / self.crop[1]))
        return dataclasses.replace(self, crop=size, shortest_edge=edge, edges=edges, files={})


def from_transformers(files: Mapping[str, Any], image_size: tuple[int, int], published_class: str) -> ImageProcessor:
    """Reads `preprocessor_config.json` and `processor_config.json` (by name), the latter going first where it has an
    "image_processor"; absent entries are those of the class it names, else of `published_class`, as transformers
    5.23 has them. Without a file it is that class for images of the model's size.

    ValueError names every entry that is not understood, and those that would give images of any size.
    """
    joint = JOINT.read(files.get("processor_config.json") or {}, "processor_config.json")["image_processor"]
    where = "processor_config.json, image_processor" if joint else "preprocessor_config.json"
    given = {key: value for key, value in (joint or files.get(where) or {}).items() if value is not None}
    name = given.get("image_processor_type") or given.get("feature_extractor_type") or published_class
    name = str(name).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if name not in CLASSES:
        raise ValueError(f"{where}: 'image_processor_type' is {brief(name)}, expected one of {[*CLASSES]}")
    absent = CLASSES[name]
    if not given:
        side = {"height": image_size[0], "width": image_size[1]}
        covered = "shortest_edge" in absent["size"]
        absent = absent | {"size": {"shortest_edge": image_size[0]} if covered else side, "crop_size": side}
        absent = absent | ({} if covered else {"do_center_crop": False})
    entries = IMAGE.read(absent | given, where)
    mean, std = statistics(entries, where)
    crop = _sides(entries["crop_size"], "crop_size", where) if entries["do_center_crop"] else None
    size, edge, edges, fit = entries["size"], None, None, "stretch"
    if isinstance(size, int) and (not entries["default_to_square"] or (crop and name == "CLIPImageProcessor")):
        size = {"shortest_edge": size}  # files of transformers < 4.20
    if not entries["do_resize"]:
        fit = "none"
    elif isinstance(size, Mapping) and set(size) == {"shortest_edge"} and _whole(size["shortest_edge"]):
        edge = size["shortest_edge"]
    else:
        edges = _sides(size, "size", where)
    if crop is None and edges is None:
        raise ValueError(
            f"{where}: 'do_center_crop' is False with do_resize {entries['do_resize']} and size {brief(size)}, "
            "which leaves images of any size; expected a crop, or a size with height and width"
        )
    crop = crop or edges
    assert crop is not None
    return ImageProcessor(
        crop=crop,
        shortest_edge=edge,
        edges=None if edges == crop else edges,
        fit=fit,
        method=FILTERS[entries["resample"]],
        crop_rule="floor",
        mean=mean,
        std=std,
        files=files,
        published_class=name,
        origin="transformers",
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 16


def _sides(size: Any, key: str, where: str) -> tuple[int, int]:
    """(rows, columns) of a size in any of its forms; ValueError for those that keep an aspect ratio, and nonsense."""
    sides = size
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        sides = (size["height"], size["width"])
    sides = (sides, sides) if isinstance(sides, int) else sides
    if not (isinstance(sides, list | tuple) and len(sides) == 2 and all(map(_whole, sides))):
        raise ValueError(f"{where}: {key!r} is {brief(size)}, expected a height and a width, or a size's shortest_edge")
    return sides[0], sides[1]


Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def statistics(entries: Mapping[str, Any], where: str) -> Statistics:
    """Mean and standard deviation of pixels / 255 that say what a file's rescaling and normalisation do together."""
    scale = 255 * entries["rescale_factor"] if entries["do_rescale"] else 255.0
    mean, std = (0.0,) * 3, (1.0,) * 3
    if entries["do_normalize"]:
        mean, std = (_channels(entries[key], key, where) for key in ("image_mean", "image_std"))
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def _channels(value: Any, key: str, where: str) -> tuple[float, ...]:
    """Three numbers, or one for all."""
    values = [value] * 3 if isinstance(value, int | float) else value
    if not (isinstance(values, list | tuple) and values and all(isinstance(v, int | float) for v in values)):
        raise ValueError(f"{where}: {key!r} is {brief(value)}, expected a number, or one for each channel")
    if key.endswith("std") and not all(values):
        raise ValueError(f"{where}: {key!r} is {brief(value)}, expected no zeros")
    return tuple(values)


def from_open_clip(preprocessing: Mapping[str, Any], image_size: tuple[int, int]) -> ImageProcessor:
    """`preprocess_cfg` of open_clip_config.json over open_clip's PreprocessCfg, whose size is the model's."""
    where = "open_clip_config.json, preprocess_cfg"
    entries = _OPEN_CLIP.read({key: value for key, value in preprocessing.items() if value is not None}, where)
    size = preprocessing.get("size") or image_size
    crop = _sides(size[-2:] if isinstance(size, list) and len(size) == 3 else size, "size", where)
    method = "pil_bilinear" if entries["interpolation"] == "bilinear" else "pil_bicubic"
    shortest = entries["resize_mode"] == "shortest"
    square = crop[0] == crop[1]
    if shortest and not square:
        method = "pil_bicubic"  # whatever the file says: open_clip's transform.py hands nothing on there
    return ImageProcessor(
        crop=crop,
        shortest_edge=crop[0] if shortest and square else None,
        fit="stretch" if shortest and square else _OPEN_CLIP_FITS[entries["resize_mode"]],
        method=method,
        fill=(entries["fill_color"],),
        mean=_channels(entries["mean"], "mean", where),
        std=_channels(entries["std"], "std", where),
        alpha="drop",
        origin="open_clip",
    )


def to_open_clip(processor: ImageProcessor) -> dict[str, Any]:
    """The `preprocess_cfg`; ValueError for what open_clip has no word for."""
    modes = {"cover": "shortest", "contain": "longest", "stretch": "squash"}
    mode = "shortest" if processor.shortest_edge is not None else modes.get(processor.fit)
    edge = processor.shortest_edge
    margin = processor.edges is not None or (edge is not None and processor.crop != (edge, edge))
    if mode is None or margin or processor.method not in ("pil_bicubic", "pil_bilinear"):
        raise ValueError(
            f"open_clip's preprocess_cfg resizes to the size of the model, bicubic or bilinear, got {processor.steps}"
        )
    document = {"size": list(processor.crop), "mode": "RGB", "mean": list(processor.mean), "std": list(processor.std)}
    document |= {"interpolation": processor.method.removeprefix("pil_"), "resize_mode": mode}
    document |= {"fill_color": processor.fill[0]} if mode == "longest" else {}
    _check_written("open_clip's preprocess_cfg", processor, from_open_clip(document, processor.crop))
    return document


def to_transformers(processor: ImageProcessor, published_class: str = "") -> dict[str, Any]:
    """File name -> content: the files as they were read where they still say what the processor does, else a new one.

    ValueError for what transformers has no word for.
    """
    if processor.files and from_transformers(processor.files, processor.crop, processor.published_class) == processor:
        return dict(processor.files)
    filters = {name: number for number, name in FILTERS.items()}
    kept = processor.shortest_edge is None and processor.fit not in ("stretch", "none")
    if kept or processor.method not in filters:
        raise ValueError(f"transformers has no processor for this preprocessing: {processor.steps}{_REMEDY}")
    crop = {"height": processor.crop[0], "width": processor.crop[1]}
    name = published_class or ("ViTImageProcessor" if processor.shortest_edge is None else "CLIPImageProcessor")
    geometry: dict[str, Any] = {"image_processor_type": name, "size": crop, "do_center_crop": False}
    if processor.shortest_edge is not None:
        geometry |= {"size": {"shortest_edge": processor.shortest_edge}, "do_center_crop": True, "crop_size": crop}
    elif processor.edges is not None or processor.fit == "none":
        rows, columns = processor.edges or processor.crop
        size = {"height": rows, "width": columns}
        geometry |= {"size": size, "do_center_crop": True, "crop_size": crop}
    files = {
        "preprocessor_config.json": geometry
        | {
            "do_convert_rgb": True,
            "do_resize": processor.fit != "none" or processor.shortest_edge is not None,
            "resample": filters[processor.method],
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(processor.mean),
            "image_std": list(processor.std),
        }
    }
    _check_written("transformers' preprocessor_config.json", processor, from_transformers(files, processor.crop, name))
    return files


def timm_preprocessing(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `pretrained_cfg` of a timm config.json, which before 2023 was the file itself."""
    return metadata.get("pretrained_cfg") or ({} if "pretrained_cfg" in metadata else metadata)


def from_timm(config: Mapping[str, Any], image_size: tuple[int, int]) -> ImageProcessor:
    """Reads a timm `pretrained_cfg` as timm.data.resolve_data_config does; without one it is that of AugReg's ViTs.

    Images are of the model's size, or of another that the file names for a model of any size.
    """
    where = "config.json, pretrained_cfg"
    given = {key: value for key, value in config.items() if value or key not in _PREPROCESSING}  # empty ones are absent
    if not set(given) & set(_PREPROCESSING):
        given |= {"crop_pct": 0.9 if image_size == (224, 224) else 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    entries = _TIMM.read(given, where)
    if entries["input_size"] is not None and not entries["fixed_input_size"]:
        image_size = _sides(entries["input_size"][-2:], "input_size", where)
    edges = (math.floor(image_size[0] / entries["crop_pct"]), math.floor(image_size[1] / entries["crop_pct"]))
    centred = entries["crop_mode"] == "center" and edges[0] == edges[1]
    return ImageProcessor(
        crop=image_size,
        shortest_edge=edges[0] if centred else None,
        fit="stretch" if centred else _TIMM_FITS[entries["crop_mode"]],
        edges=None if centred or edges == image_size else edges,
        fill=tuple(round(255 * value) for value in entries["mean"]) if entries["crop_mode"] == "border" else (0,),
        method=f"pil_{entries['interpolation']}",
        mean=tuple(entries["mean"]),
        std=tuple(entries["std"]),
        alpha="drop",
        origin="timm",
    )


def to_timm(processor: ImageProcessor, published: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing of a timm `pretrained_cfg`; `published` is the one it came from, if any.

    ValueError for what timm has no word for.
    """
    edge = processor.shortest_edge
    edges = (edge, edge) if edge is not None else processor.edges or processor.crop
    # timm rounds down to the edge; the published fraction stays if it still leads there.
    side = processor.crop[0]
    choices = (published.get("crop_pct"), side / edges[0], side / (edges[0] + 0.5))
    leads = [c for c in choices if c and tuple(math.floor(length / c) for length in processor.crop) == edges]
    fits = {"cover": "center", "stretch": "squash", "contain": "border"}
    mode = "center" if edge is not None else fits.get(processor.fit)
    filled = mode != "border" or processor.fill == tuple(round(255 * value) for value in processor.mean)
    if not leads or mode is None or not filled or processor.method not in FILTERS.values():
        raise ValueError(f"timm's pretrained_cfg has no words for this preprocessing: {processor.steps}{_REMEDY}")
    document = dict(published) | {
        "input_size": [len(processor.mean), *processor.crop],
        "interpolation": processor.method.removeprefix("pil_"),
        "crop_pct": leads[0],
        "crop_mode": mode,
        "mean": list(processor.mean),
        "std": list(processor.std),
    }
    _check_written("timm's pretrained_cfg", processor, from_timm(document, processor.crop))
    return document


_REMEDY = "; write another format, or leave it out (`without_images`, --without-preprocessing)"


def _check_written(what: str, processor: ImageProcessor, again: ImageProcessor) -> None:
    """ValueError where a file says other pixels than the processor gives."""
    pairs = itertools.zip_longest(processor.steps, again.steps, fillvalue=("nothing", {}))
    for (name, wanted), (read, got) in pairs:
        wanted, got = dict(wanted), dict(got)
        if processor.origin or not processor.crops_unevenly:
            wanted["rule"] = got["rule"] = ""
        if name != read or not _alike(wanted, got):
            raise ValueError(f"{what} cannot say {name} {wanted}, reads as {read} {got}{_REMEDY}")


def _alike(a: Any, b: Any) -> bool:
    """Equality but for rounding of numbers."""
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) if isinstance(a, float) else a == b


def without_images(processor: Any) -> Any:
    """The processor of a bundle without its part for images: what is saved then says nothing of them."""
    return dataclasses.replace(processor, image=None) if hasattr(processor, "image") else None


def from_google(image_size: tuple[int, int], resize_directly: bool) -> ImageProcessor:
    """Of .npz files: vision_transformer's evaluation (whole image to size), or big_vision's (256 : 224, then crop)."""
    if resize_directly or image_size[0] != image_size[1]:
        return ImageProcessor(image_size, method="tf_bilinear", alpha="drop", origin="google")
    edge = round(image_size[0] * 256 / 224)
    return ImageProcessor(
        image_size,
        edge,
        method="bv_area",
        rounding="big_vision",
        crop_rule="floor",
        alpha="drop",
        origin="google",
    )
