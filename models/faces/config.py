"""What fixes a face network, recognisers and those that judge faces alike."""

import dataclasses

from ..ranges import Count, Whole


@dataclasses.dataclass(frozen=True)
class FaceConfig:
    """One of the networks of deepface 0.0.103; `omnax.models.faces.SIZES` has the published ones."""

    network: str  # a key of `omnax.models.faces.NETWORKS`
    image_size: tuple[Count, Count]  # rows, columns
    width: Count  # of the embedding
    classes: Whole = 0  # of a classifier behind it; 0: there is none
