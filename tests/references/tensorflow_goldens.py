"""Writes tests/data/tensorflow.npz: what TensorFlow's resize and big_vision's RandAugment operations really return.

Run by hand where TensorFlow is installed (the tests read the file and need neither):
`python tests/references/tensorflow_goldens.py PATH/TO/big_vision/pp/archive/autoaugment.py`
"""

import importlib.util
import math
import sys
import types
from pathlib import Path

import numpy as np
import tensorflow as tf

OUTPUT = Path(__file__).resolve().parents[1] / "data" / "tensorflow.npz"
SIZES = [((23, 31), (11, 13)), ((23, 31), (40, 9)), ((8, 8), (8, 5)), ((9, 7), (21, 20))]
MAGNITUDES = (0, 7, 10, 15, 20)  # the published settings, and 7 for values that are not whole numbers
# operations with a sign and amounts that leave something of a small image
SIGNED = {"rotate": (30.0, -17.0), "shear_x": (0.3, -0.21), "shear_y": (0.3, -0.21), "translate_x": (5.5, -7.0)}
SIGNED["translate_y"] = SIGNED["translate_x"]
CROPS = [((40, 60), (0.05, 1.0)), ((30, 30), (0.5, 1.0)), ((10, 60), (0.4, 1.0))]


def noise(shape, seed):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def addons():
    """The three functions of the defunct tensorflow_addons.image, from its documentation."""

    def transform(image, matrix):
        return tf.raw_ops.ImageProjectiveTransformV3(
            images=image[None],
            transforms=tf.constant([matrix], tf.float32),
            output_shape=tf.shape(image)[:2],
            interpolation="NEAREST",
            fill_mode="CONSTANT",
            fill_value=0.0,
        )[0]

    def rotate(image, angle):
        height, width = image.shape[0] - 1, image.shape[1] - 1
        cos, sin = math.cos(angle), math.sin(angle)
        x = (width - (cos * width - sin * height)) / 2
        y = (height - (sin * width + cos * height)) / 2
        return transform(image, [cos, -sin, x, sin, cos, y, 0.0, 0.0])

    def translate(image, move):
        return transform(image, [1.0, 0.0, -move[0], 0.0, 1.0, -move[1], 0.0, 0.0])

    return types.SimpleNamespace(transform=transform, rotate=rotate, translate=translate)


def load_autoaugment(path):
    module = types.ModuleType("tensorflow_addons")
    module.image = addons()
    sys.modules["tensorflow_addons"] = module
    spec = importlib.util.spec_from_file_location("autoaugment", path)
    autoaugment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(autoaugment)
    return autoaugment


def in_graph(function, image, *arguments):
    """One operation in graph mode, as inside tf.data: constants wrap there that would be errors in eager mode."""
    dataset = tf.data.Dataset.from_tensors(image)
    return next(iter(dataset.map(lambda value: function(tf.ensure_shape(value, image.shape), *arguments)))).numpy()


def crops(shape, area, number=20_000):
    """[number, 4] of (top, left, rows, columns)."""

    def sample(index):
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.constant([*shape, 3]),
            tf.zeros([0, 0, 4], tf.float32),
            seed=tf.stack([index, 0]),
            area_range=area,
            aspect_ratio_range=(0.75, 1.33),
            min_object_covered=0.0,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.concat([begin[:2], size[:2]], 0)

    return np.stack(list(tf.data.Dataset.range(number).map(sample).as_numpy_iterator()))


def main():
    autoaugment = load_autoaugment(sys.argv[1])
    arrays = {}
    for source, target in SIZES:
        image = noise((*source, 3), 0)
        arrays[f"input/{source[0]}x{source[1]}"] = image
        for method in ("bilinear", "area"):
            key = f"{method}/{source[0]}x{source[1]}/{target[0]}x{target[1]}"
            arrays[key] = tf.image.resize(image, target, method=method, antialias=False).numpy()
    image = noise((19, 24, 3), 1)
    image[:, :, 1] //= 3
    arrays["input/randaugment"] = image
    hparams = autoaugment.HParams(cutout_const=40, translate_const=100)
    autoaugment._randomly_negate_tensor = lambda value: value
    for name in autoaugment.NAME_TO_FUNC:
        for magnitude in MAGNITUDES if name != "Cutout" else ():
            policy = autoaugment._parse_policy_info(name, 1.0, float(magnitude), [128] * 3, hparams)
            arrays[f"{name}/{magnitude}"] = in_graph(policy[0], image, *policy[2])
    for name, amounts in SIGNED.items():
        for amount in amounts:
            arrays[f"{name}/{amount}"] = in_graph(getattr(autoaugment, name), image, amount, [128] * 3)
    for shape, area in CROPS:
        drawn = crops(shape, area)
        key = f"crop/{shape[0]}x{shape[1]}/{area[0]}/{area[1]}"
        arrays[key] = np.stack([drawn.mean(0), drawn.std(0), drawn.min(0), drawn.max(0)])
    np.savez_compressed(OUTPUT, **arrays)


if __name__ == "__main__":
    main()
