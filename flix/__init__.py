"""flix: featurized low-rank mixtures. Adapt one pretrained model to many tasks in many languages.

The core needs only numpy and safetensors. Backends are in ``flix.backends.<framework>`` and are imported on demand.
The method is that of Lin et al., arXiv 2402.17934.
"""

from flix import backends, ranks
from flix._version import __version__
from flix.core.adapter.adapter import Adapter
from flix.core.adapter.files import load_adapter, save_adapter
from flix.core.adapter.sharing import (
    combine_adapters,
    remove_feature,
    rename_feature,
    select_features,
)
from flix.core.config.config import FlixConfig
from flix.core.errors import (
    AdapterError,
    ConfigError,
    FeatureError,
    FlixError,
    MissingFrameworkError,
    RankError,
    RoutingError,
    TargetError,
)
from flix.core.features.dropout import FeatureDropout
from flix.core.features.registry import FeatureRegistry
from flix.core.features.relatives import by_parents, by_vectors
from flix.core.features.routing import Routing
from flix.core.features.search import SearchedWeights, search_weights
from flix.core.peft.importing import from_peft

__all__ = [
    "Adapter",
    "AdapterError",
    "ConfigError",
    "FeatureDropout",
    "FeatureError",
    "FeatureRegistry",
    "FlixConfig",
    "FlixError",
    "MissingFrameworkError",
    "RankError",
    "Routing",
    "RoutingError",
    "SearchedWeights",
    "TargetError",
    "__version__",
    "backends",
    "by_parents",
    "by_vectors",
    "combine_adapters",
    "from_peft",
    "load_adapter",
    "ranks",
    "remove_feature",
    "rename_feature",
    "save_adapter",
    "search_weights",
    "select_features",
]
