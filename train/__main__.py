"""The training command, `python -m omnax.train`: see main.py."""

import signal
import sys

# Until the run takes Ctrl-C over, which then saves, it ends without a traceback: while everything is imported, too.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from .main import main  # noqa: E402

sys.exit(main())
