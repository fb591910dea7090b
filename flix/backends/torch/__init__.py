"""The PyTorch backend (docs/specification.md §5.2)::

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
from flix.backends.torch._routed import routed
from flix.backends.torch.files import load, load_into, save, to_adapter
from flix.backends.torch.inspection import named_pairs, summary, trainable_parameters
from flix.backends.torch.layers import FlixConv1D, FlixEmbedding, FlixLinear
from flix.backends.torch.lifecycle import (
    add_feature,
    import_peft,
    load_features,
    remove_feature,
    rename_feature,
)
from flix.backends.torch.merging import export_peft, merge
from flix.backends.torch.model import RoutedModel, adapt
from flix.backends.torch.paging import Pager, page, unpage
from flix.backends.torch.switching import (
    disable,
    freeze,
    merge_in_place,
    share_base,
    thaw,
    unmerge,
)
from flix.core.adapter.summary import Summary

__all__ = [
    "FlixConv1D",
    "FlixEmbedding",
    "FlixLinear",
    "Pager",
    "RoutedModel",
    "Summary",
    "adapt",
    "add_feature",
    "disable",
    "export_peft",
    "freeze",
    "import_peft",
    "load",
    "load_features",
    "load_into",
    "merge",
    "merge_in_place",
    "named_pairs",
    "page",
    "remove_feature",
    "rename_feature",
    "route",
    "routed",
    "save",
    "share_base",
    "summary",
    "thaw",
    "to_adapter",
    "trainable_parameters",
    "unmerge",
    "unpage",
]
