"""The JAX backend: pure functions for any JAX program, ``adapt`` for flax.nnx models (docs/specification.md §5.3)::

bank = init(config, {"layers.0.q": (768, 768)})
y = linear(x, kernel, bank["layers.0.q"], ids, weights)

model = adapt(nnx_model, config)
y = model(x, flix_features=ids)
"""

from flix.backends import missing as _missing

try:
    import flax.nnx as _nnx  # noqa: F401
    import jax as _jax  # noqa: F401
    import optax as _optax  # noqa: F401
except ImportError as _error:  # pragma: no cover - exercised in a subprocess
    raise _missing("jax", "JAX", _error) from _error

from flix.backends.jax._routing import route
from flix.backends.jax.bank import LayerBank, LayerRows, LayerSpec, init
from flix.backends.jax.export import export_fn
from flix.backends.jax.files import load, load_bank, load_into, save, to_adapter, to_bank
from flix.backends.jax.functional import (
    embed,
    embed_rows,
    gather,
    linear,
    linear_rows,
    scatter,
    touched,
)
from flix.backends.jax.inspection import named_pairs, summary, trainable_parameters
from flix.backends.jax.layers import (
    FlixEinsum,
    FlixEmbed,
    FlixLinear,
    FlixLinearGeneral,
    FlixParam,
)
from flix.backends.jax.lifecycle import (
    add_feature,
    import_peft,
    load_features,
    remove_feature,
    rename_feature,
)
from flix.backends.jax.merging import merge, merge_kernels
from flix.backends.jax.model import RoutedModel, adapt
from flix.backends.jax.optim import adamw, mask_absent, scale_by_feature_adam, sparse_update
from flix.backends.jax.sharding import partition_specs, shard
from flix.backends.jax.switching import disable, freeze, thaw
from flix.backends.jax.training import FlixOptimizer, SparseGrads, value_and_grad
from flix.core.adapter.summary import Summary

__all__ = [
    "FlixEinsum",
    "FlixEmbed",
    "FlixLinear",
    "FlixLinearGeneral",
    "FlixOptimizer",
    "FlixParam",
    "LayerBank",
    "LayerRows",
    "LayerSpec",
    "RoutedModel",
    "SparseGrads",
    "Summary",
    "adamw",
    "adapt",
    "add_feature",
    "disable",
    "embed",
    "embed_rows",
    "export_fn",
    "freeze",
    "gather",
    "import_peft",
    "init",
    "linear",
    "linear_rows",
    "load",
    "load_bank",
    "load_features",
    "load_into",
    "mask_absent",
    "merge",
    "merge_kernels",
    "named_pairs",
    "partition_specs",
    "remove_feature",
    "rename_feature",
    "route",
    "save",
    "scale_by_feature_adam",
    "scatter",
    "shard",
    "sparse_update",
    "summary",
    "thaw",
    "to_adapter",
    "to_bank",
    "touched",
    "trainable_parameters",
    "value_and_grad",
]
