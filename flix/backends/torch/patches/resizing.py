"""transformers' ``resize_token_embeddings``, of an adapted model: its features grow with the vocabulary.

What: the method of adapted models' own classes. When: with the class, by ``adapt`` and ``load``. Undone: with it. An
embedding keeps its module and gets another kernel, and a head is replaced by a plain one; afterwards A of adapted
embeddings and B of adapted heads are longer or shorter, too. Old words keep their values; new ones start without an
update, as the resized base has them.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from flix.backends import messages
from flix.backends.torch.layer import FlixLayer, flix_layers
from flix.backends.torch.targets import become
from flix.core.adapter.flat import flat_layout
from flix.core.errors import ConfigError


def resizing(base: Any) -> Any:
    """The method for a model class that has one."""

    @functools.wraps(base.resize_token_embeddings)
    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.flix_state.folded is not None:
            raise messages.folded_in(self.flix_state.folded)
        if any(hasattr(p, "device_mesh") for p in self.flix_state.bank.parameters()):
            raise ConfigError("resize the vocabulary before the model is sharded")
        layers = dict(flix_layers(self))
        found = base.resize_token_embeddings(self, *args, **kwargs)
        for path, layer in layers.items():
            module = self.get_submodule(path)
            if not isinstance(module, FlixLayer):
                become(module, layer.flix_name, layer.flix_place, self.flix_state)
        _fit(self)
        return found

    return resize_token_embeddings


def _fit(model: Any) -> None:
    """Give every feature's vector the sizes that the layers have now; an optimizer's state does not follow."""
    state, bank = model.flix_state, model.flix_state.bank
    old = bank.layout
    sizes = dict(zip(old.places, old.shapes, strict=True))
    sizes |= {layer.flix_name: layer.shape_of(layer) for _, layer in flix_layers(model)}
    new = flat_layout(state.config, sizes)
    if new.shapes == old.shapes:
        return
    for i, parameter in bank.held().items():
        before = bank.array(bank.features[i])
        after = np.zeros(new.length(i), before.dtype)
        for path, pair in new.pairs(after, i).items():
            for one, other in zip(pair, old.views(before, i, old.places[path]), strict=True):
                kept = tuple(map(slice, np.minimum(one.shape, other.shape)))
                one[kept] = other[kept]
        # The parameter stays the object that it is: an optimizer that has it fails by its size, not in silence.
        parameter.data = torch.from_numpy(after).to(parameter.device, parameter.dtype)
        parameter.grad = None
    bank.arrange(bank.features, new)
    state.forget()
