"""Images and sounds beside a prompt: whether each row of the batch has one.

Models of language and vision take the images of all rows in one tensor, ``[images, ...]``, and tokens of the prompt say
where they stand. As many images as rows are one for each only if no row is without.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

# What stands beside a prompt in which tokens hold its places: how the configuration calls that token.
_PLACED = {"pixel_values": "image", "pixel_values_videos": "video", "input_features": "audio"}


@dataclass(frozen=True)
class Media:
    """Images, videos or sounds, as many as rows, beside a prompt in which tokens hold their places.

    They are one for each row exactly where each row has such a token: else a row without any makes up for one with two.

    Attributes:
        kind: ``"image"``, ``"video"`` or ``"audio"``.
        values: ``[B, ...]``.
        prompt: token ids ``[B, T]``, or None if embeddings were given.
        token: the token.
    """

    kind: str
    values: Tensor
    prompt: Tensor | None
    token: int

    @cached_property
    def without(self) -> list[int]:
        """The rows that have none."""
        if self.prompt is None:
            return list(range(len(self.values)))
        return (self.prompt != self.token).all(1).nonzero()[:, 0].tolist()  # type: ignore[no-any-return]


def media_of(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Media | None:
    """Images or sounds beside a prompt that marks their places, if there are as many of them as rows."""
    given = kwargs
    if args:
        given = {**dict(zip(inspect.signature(model.forward).parameters, args)), **kwargs}  # noqa: B905
    settings, prompt = getattr(model, "config", None), given.get("input_ids")
    for name, stem in _PLACED.items():
        value = given.get(name)
        if isinstance(value, Tensor) and value.dim() > 2 and value.shape[0] == rows > 1:
            told = (getattr(settings, f"{stem}_token_{end}", None) for end in ("id", "index"))
            token = next((t for t in told if type(t) is int), None)
            if token is not None:
                return Media(stem, value, prompt if isinstance(prompt, Tensor) else None, token)
    return None
