"""The training command, `python -m omnax.train`: see main.py."""

import sys

from .main import main

sys.exit(main())
