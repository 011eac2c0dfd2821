"""The page of all keys: `python -m omnax.hub.exactness > docs/exactness.md`."""

from .families import FAMILIES
from .families.transformers_keys import COMMON
from .generation import GENERATION
from .keys import REASONS, Section, markdown
from .processor import TABLES
from .samplers import SECTIONS

_HEAD = """# Exact or refused

A published file is read exactly, or refused with the entry that is not understood. For every file that configures a
model one table lists the keys that the publishing library knows, with the fate of each:

- **used**: becomes part of the model; an absent key is what the publishing library takes it to be;
- **harmless**: cannot change the function, for the reason given;
- **refused**: has a meaning that no model here has; only the value listed is read.

A key in no table is refused by name, and so is a value of another kind. `tests/hub/test_config_keys.py` feeds every
key of the published classes, with a value that is not its default, to the publishing library and to `hub.load`: the
outputs are equal, or the key is refused by name; `tests/parity/test_preprocessing.py` does so with the files of images.
Saving reads back what it wrote and refuses to say another function: `tests/parity/test_save_matrix.py` saves each kind
of checkpoint in every format of its family and has the publishing library compute with it.

This page is made by `python -m omnax.hub.exactness > docs/exactness.md`; the test compares it.

Why a key is harmless:

"""


def page() -> str:
    """The tables of every family, of images, of generation and of samplers, as Markdown."""
    reasons = "".join(f"- {name}: {words}\n" for name, words in REASONS.items())
    common = markdown({"transformers: the common keys of every config": Section(COMMON)})
    tables = [markdown(family.keys, COMMON) for family in FAMILIES if family.keys]
    samplers = {f"diffusers: scheduler_config.json, {name}": section for name, section in SECTIONS.items()}
    shared = markdown({**TABLES, "transformers: generation_config.json": GENERATION, **samplers})
    return "\n".join([_HEAD + reasons, common, *tables, shared])


if __name__ == "__main__":
    print(page(), end="")
