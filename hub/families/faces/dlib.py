"""dlib's file (dlib_face_recognition_resnet_model_v1.dat): its layers in order, as hub/files/dlib_files.py reads."""

from collections.abc import Iterator

from ....models.faces.dlib import UNITS
from ...mapping import Row, Table


def _convolution(number: int, module: str, gains: str) -> Iterator[Row]:
    yield Row(f"con_{number}.filters", f"{module}/kernel", "D C X Y -> X Y C D")
    yield Row(f"con_{number}.biases", f"{module}/bias")
    yield Row(f"affine_{number}.gamma", f"{gains}/scale")
    yield Row(f"affine_{number}.beta", f"{gains}/bias")


def _rows() -> Iterator[Row]:
    yield from _convolution(0, "con", "affine")
    for i in range(len(UNITS)):
        for k in (1, 2):
            yield from _convolution(2 * i + k, f"unit_{i}/con{k}", f"unit_{i}/affine{k}")
    yield Row("fc_0.weights", "fc/kernel")


DLIB_TABLE = Table(tuple(_rows()))
