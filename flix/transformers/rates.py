"""Learning rates of their own for groups of features and for heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flix.backends.torch.optimizers import HEADS, parameter_groups

if TYPE_CHECKING:
    from typing import Any as _Base  # what a mixin calls is its sibling's
else:
    _Base = object


class RatesMixin(_Base):  # type: ignore[misc]
    """A part of :class:`flix.transformers.trainer.FlixTrainerMixin`."""

    optimizer: Any
    learning_rates: Mapping[str, float] | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with a group of parameters for each group of features where they have rates of their own."""
        if self.learning_rates and self.optimizer is None:
            groups = parameter_groups(self.model, self._rates(), weight_decay=self.args.weight_decay)  # fmt: skip
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            settings.pop("lr", None)
            self.optimizer = kind(groups, **settings)
        return super().create_optimizer(*args, **kwargs)

    def _rates(self) -> dict[str, float]:
        groups = self.model.flix_config.registry.groups
        heads = "base" if HEADS in groups else HEADS
        usual = dict.fromkeys((*groups, heads), float(self.args.learning_rate))
        return {**usual, **(self.learning_rates or {})}
