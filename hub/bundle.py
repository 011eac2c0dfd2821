"""What loading gives and saving takes: a model with its parameters and everything that was published beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn


@dataclass(frozen=True)
class Bundle:
    """A published model, ready to run: `bundle.model.apply({"params": bundle.params} | bundle.variables, …)`.

    `variables` are the collections beside the parameters, batch statistics say; most models have none.
    `format` names the layout of files that `save` writes by default. `metadata` is the published configuration as it
    was read; saving in the same format keeps the entries that `config` does not speak about.
    """

    model: nn.Module
    params: dict[str, Any]
    config: Any
    processor: Any = None
    format: str = "transformers"
    labels: tuple[str, ...] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)
