"""The PyTorch backend (docs/specification.md §5.2).

::

    from flix.backends.torch import adapt
    model = adapt(model, config)
    loss = model(**batch, flix_features=ids).loss
"""

from typing import Final

from flix.backends import missing as _missing

try:
    import torch as _torch  # noqa: F401
except ImportError as _error:  # pragma: no cover - exercised in a subprocess
    raise _missing("torch", "PyTorch", _error) from _error

from flix.backends.torch import primitives
from flix.backends.torch.by_feature import clip_grad_norm_by_feature_, losses_by_feature
from flix.backends.torch.distributed.sharding import shard_features, whole_features
from flix.backends.torch.layers import FlixConv1D, FlixEmbedding, FlixLinear
from flix.backends.torch.merging import share_base
from flix.backends.torch.optimizers import parameter_groups
from flix.backends.torch.paging import Pager, page, unpage
from flix.backends.torch.patches.models import RoutedModel
from flix.backends.torch.routed import routed
from flix.backends.torch.routing import route
from flix.backends.torch.tenants import Tenants
from flix.backends.verbs import Verbs
from flix.core.adapter.summary import Summary

verbs: Final = Verbs(primitives)
adapt: Final = verbs.adapt
trainable_parameters: Final = verbs.trainable_parameters
summary: Final = verbs.summary
add_feature: Final = verbs.add_feature
remove_feature: Final = verbs.remove_feature
rename_feature: Final = verbs.rename_feature
save: Final = verbs.save
load: Final = verbs.load
load_into: Final = verbs.load_into
to_adapter: Final = verbs.to_adapter
push: Final = verbs.push
load_features: Final = verbs.load_features
import_peft: Final = verbs.import_peft
named_pairs: Final = verbs.named_pairs
freeze: Final = verbs.freeze
thaw: Final = verbs.thaw
disable: Final = verbs.disable
merge: Final = verbs.merge
merge_in_place: Final = verbs.merge_in_place
unmerge: Final = verbs.unmerge
search_weights: Final = verbs.search_weights
export_peft: Final = verbs.export_peft
export_peft_all: Final = verbs.export_peft_all

__all__ = [
    "FlixConv1D",
    "FlixEmbedding",
    "FlixLinear",
    "Pager",
    "RoutedModel",
    "Summary",
    "Tenants",
    "adapt",
    "add_feature",
    "clip_grad_norm_by_feature_",
    "disable",
    "export_peft",
    "export_peft_all",
    "freeze",
    "import_peft",
    "load",
    "load_features",
    "load_into",
    "losses_by_feature",
    "merge",
    "merge_in_place",
    "named_pairs",
    "page",
    "parameter_groups",
    "primitives",
    "push",
    "remove_feature",
    "rename_feature",
    "route",
    "routed",
    "save",
    "search_weights",
    "shard_features",
    "share_base",
    "summary",
    "thaw",
    "to_adapter",
    "trainable_parameters",
    "unmerge",
    "unpage",
    "whole_features",
]
