"""Which folders are the package: the repository's root is `omnax`, and each room with its wings is `omnax.<room>`."""

from setuptools import find_packages, setup

ROOMS = ["storage", "kernels", "objectives", "models", "hub", "data", "train", "infer", "configs", "benchmarks"]

setup(
    packages=[f"omnax.{name}" for name in find_packages(include=[*ROOMS, *(f"{room}.*" for room in ROOMS)])],
    package_dir={f"omnax.{room}": room for room in ROOMS},
)
