"""What loading gives and saving takes: a model with its parameters and everything that was published beside them.

A directory of several models (diffusers' pipelines) is a bundle of bundles: `assemble` makes one of its `components`.
"""

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
    components: Mapping[str, "Bundle"] = field(default_factory=dict)


class Assembly(nn.Module):
    """Several models as one: `assembly.apply({"params": bundle.params}, "text_encoder", tokens)` runs one of them."""

    models: tuple[tuple[str, nn.Module], ...]

    @nn.compact
    def __call__(self, component: str, *inputs: Any, **options: Any) -> Any:
        return dict(self.models)[component].clone(parent=self, name=component)(*inputs, **options)


def assemble(components: Mapping[str, Bundle], format: str, metadata: Mapping[str, Any], processor: Any) -> Bundle:
    """The bundle whose model, parameters, variables and config are those of its components, by name."""
    collections = {kind for bundle in components.values() for kind in bundle.variables}
    return Bundle(
        model=Assembly(tuple((name, bundle.model) for name, bundle in components.items())),
        params={name: bundle.params for name, bundle in components.items()},
        config={name: bundle.config for name, bundle in components.items()},
        processor=processor,
        format=format,
        metadata=metadata,
        variables={
            kind: {name: bundle.variables[kind] for name, bundle in components.items() if kind in bundle.variables}
            for kind in sorted(collections)
        },
        components=components,
    )
