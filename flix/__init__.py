"""flix: featurized low-rank mixtures, one pretrained model adapted to many tasks in many languages.

The core needs numpy and safetensors only; backends live in ``flix.backends.<framework>`` and are imported when
asked for. The method is that of Lin et al., arXiv 2402.17934.
"""

from flix import backends, ranks
from flix._version import __version__
from flix.core.adapter import Adapter, load_adapter, save_adapter
from flix.core.config import FlixConfig
from flix.core.dropout import FeatureDropout
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
from flix.core.registry import FeatureRegistry
from flix.core.routing import Routing

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
    "TargetError",
    "__version__",
    "backends",
    "load_adapter",
    "ranks",
    "save_adapter",
]
