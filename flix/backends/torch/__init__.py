"""The PyTorch backend (SPEC §5)::

from flix.backends.torch import adapt
model = adapt(model, config)
loss = model(**batch, flix_features=ids).loss
"""

from flix.backends import missing as _missing

try:
    import torch as _torch  # noqa: F401
except ImportError as _error:  # pragma: no cover - exercised in a subprocess
    raise _missing("torch", "PyTorch", _error) from _error

from flix.backends.torch._context import route
from flix.backends.torch.files import load, load_into, save, to_adapter
from flix.backends.torch.inspection import named_pairs, summary, trainable_parameters
from flix.backends.torch.layers import FlixConv1D, FlixEmbedding, FlixLinear
from flix.backends.torch.lifecycle import add_feature
from flix.backends.torch.merging import export_peft, merge
from flix.backends.torch.model import RoutedModel, adapt
from flix.backends.torch.paging import Pager, page, unpage
from flix.core.summary import Summary

__all__ = [
    "FlixConv1D",
    "FlixEmbedding",
    "FlixLinear",
    "Pager",
    "RoutedModel",
    "Summary",
    "adapt",
    "add_feature",
    "export_peft",
    "load",
    "load_into",
    "merge",
    "named_pairs",
    "page",
    "route",
    "save",
    "summary",
    "to_adapter",
    "trainable_parameters",
    "unpage",
]
