"""The public name of data/drawn/digits.py: `python -m omnax.data.digits FOLDER` writes the digits as image folders."""

import sys
from pathlib import Path

from .drawn.digits import Digits, read_digits, write_folders

__all__ = ["Digits", "read_digits", "write_folders"]

if __name__ == "__main__":
    write_folders(Path(sys.argv[1]))
