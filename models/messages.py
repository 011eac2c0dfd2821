"""Messages stay short, however long the names, keys and lists are that they quote: bounded where they leave."""

import contextlib
import logging
from collections.abc import Iterator

LONGEST = 1900  # characters of a message


def bounded(text: str, longest: int = LONGEST) -> str:
    """Of a long text its beginning and end, and how much is left out between."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} … {len(text) - 2 * half} characters … {text[-half:]}"


@contextlib.contextmanager
def bounded_errors() -> Iterator[None]:
    """What is raised within, or by a function that this decorates, has a bounded message.

    Paths that cannot be opened (names too long, no permission, full disks) are ValueErrors too.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise ValueError(bounded(f"{error.filename}: {error.strerror}")) from error
    except Exception as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (bounded(error.args[0]),)
        raise


class BoundedFormatter(logging.Formatter):
    """Log lines for a command's stderr."""

    def format(self, record: logging.LogRecord) -> str:
        return bounded(super().format(record))


def log_to_stderr() -> None:
    """Warnings of a command as `WARNING: text`, bounded."""
    handler = logging.StreamHandler()
    handler.setFormatter(BoundedFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
