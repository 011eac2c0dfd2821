"""`python -m omnax.infer COMMAND ...`: what one does with a trained model."""

import argparse
import importlib
import sys
from types import ModuleType

from ..models.messages import bounded, log_to_stderr
from ..storage.writing import check_output

# Command -> module of this folder: `add_arguments(parser)`, `run(arguments)`, and its docstring's first line as help.
COMMANDS = {
    "cache-latents": "cache_latents",
    "capfilt": "capfilt",
    "caption": "caption",
    "chat": "chat",
    "classify": "classify",
    "correspond": "correspond",
    "draw": "draw",
    "embed": "embed",
    "features": "features",
    "lipsync": "lipsync",
    "match": "match",
    "prepare-faces": "prepare_faces",
    "probe": "probe",
    "vqa": "vqa",
    "zero-shot": "zero_shot",
}


OUTPUTS = ("out", "picture", "json")  # arguments of commands that name what is written


def main(argv: list[str]) -> int:
    """Runs one command. Bad input (ValueError) is one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m omnax.infer", description="Run a trained model.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Only the command that is run is imported (its libraries too); the overview reads every module's docstring.
    chosen = argv[0] if argv and argv[0] in COMMANDS else None
    for command in [chosen] if chosen else COMMANDS:
        module = _module(command)
        summary = (module.__doc__ or "").partition("\n")[0]
        module.add_arguments(subparsers.add_parser(command, help=summary, description=summary))
    arguments = parser.parse_args(argv)
    log_to_stderr()
    try:
        for name in OUTPUTS:  # before any work: nothing fails after minutes that could have failed at once
            if path := getattr(arguments, name, None):
                check_output(path, folder=name == "out" and not path.suffix)
        _module(arguments.command).run(arguments)
    except ValueError as error:
        print(f"ValueError: {bounded(str(error))}", file=sys.stderr)
        return 1
    return 0


def _module(command: str) -> ModuleType:
    return importlib.import_module(f".{COMMANDS[command]}", __package__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
