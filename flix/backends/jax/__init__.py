"""The JAX backend: pure functions for any JAX program, and ``adapt`` for flax.nnx (docs/specification.md §5.3).

::

    bank = init(config, {"layers.0.q": (768, 768)})
    y = linear(x, kernel, bank["layers.0.q"], ids, weights)

    model = adapt(nnx_model, config)
    y = model(x, flix_features=ids)
"""

from typing import Final

from flix.backends import missing as _missing

try:
    import jax as _jax  # noqa: F401
    import optax as _optax  # noqa: F401
    from flax.nnx import as_pure as _as_pure  # noqa: F401 - which flax 0.12.6 lacks
except ImportError as _error:  # pragma: no cover - exercised in a subprocess
    raise _missing("jax", "JAX with flax 0.12.7 or later", _error) from _error

from flix.backends.jax import primitives
from flix.backends.jax.banks import also_bare, load_bank, merge_kernels, to_bank
from flix.backends.jax.by_feature import (
    clip_by_feature_norm,
    losses_by_feature,
    scale_by_feature_rate,
)
from flix.backends.jax.export import export_fn
from flix.backends.jax.functional import (
    embed,
    embed_rows,
    gather,
    linear,
    linear_rows,
    scatter,
    touched,
)
from flix.backends.jax.layers import FlixEinsum, FlixEmbed, FlixLinear, FlixLinearGeneral, FlixParam
from flix.backends.jax.optimizers import adamw, mask_absent, scale_by_feature_adam, sparse_update
from flix.backends.jax.parameters import LayerBank, LayerRows, LayerSpec, init
from flix.backends.jax.patches.model import RoutedModel
from flix.backends.jax.processes import check_processes, shard_features
from flix.backends.jax.routing import route
from flix.backends.jax.sharding import partition_specs, shard
from flix.backends.jax.training import FlixOptimizer, SparseGrads, value_and_grad
from flix.backends.verbs import Verbs
from flix.core.adapter.summary import Summary

verbs: Final = Verbs(primitives)
adapt: Final = verbs.adapt
add_feature: Final = verbs.add_feature
disable: Final = verbs.disable
freeze: Final = also_bare(verbs.freeze)
thaw: Final = also_bare(verbs.thaw)
import_peft: Final = verbs.import_peft
load: Final = verbs.load
load_into: Final = verbs.load_into
load_features: Final = verbs.load_features
merge: Final = verbs.merge
named_pairs: Final = verbs.named_pairs
remove_feature: Final = verbs.remove_feature
rename_feature: Final = verbs.rename_feature
save: Final = verbs.save
push: Final = verbs.push
search_weights: Final = verbs.search_weights
summary: Final = verbs.summary
to_adapter: Final = verbs.to_adapter
trainable_parameters: Final = verbs.trainable_parameters

__all__ = [
    "FlixEinsum", "FlixEmbed", "FlixLinear", "FlixLinearGeneral", "FlixOptimizer", "FlixParam",
    "LayerBank", "LayerRows", "LayerSpec", "RoutedModel", "SparseGrads", "Summary", "adamw",
    "adapt", "add_feature", "check_processes", "clip_by_feature_norm", "disable", "embed", "embed_rows", "export_fn", "freeze", "gather",
    "import_peft", "init", "linear", "linear_rows", "load", "load_bank", "load_features",
    "load_into", "losses_by_feature", "mask_absent", "merge", "merge_kernels", "named_pairs", "partition_specs", "push",
    "remove_feature", "rename_feature", "route", "save", "scale_by_feature_adam", "scale_by_feature_rate", "scatter",
    "search_weights", "shard", "shard_features", "sparse_update", "summary", "thaw", "to_adapter", "to_bank", "touched",
    "trainable_parameters", "value_and_grad",
]  # fmt: skip
