"""What an adapted model carries beside its parameters: one object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flix.backends.torch.parameters import Bank
from flix.backends.torch.patches import optimizers
from flix.core.config.config import FlixConfig


@dataclass(eq=False)
class FlixState:
    """One adapted model's, or one layer's that is used by hand; a model's layers and its encoder share it.

    Attributes:
        config: the configuration.
        bank: the features' parameters.
        strategy: how sums are computed where layers join.
        trained: names of the parameters that trained before the base was frozen.
        heads: names of the base's parameters that were saved or loaded with the features.
        folded: the row that is merged in place, or None.
        traced: whether a compiled forward has run since the last optimizer step.
        pager: the :class:`flix.backends.torch.paging.Pager`, while the features are paged.
        marks: what is known of layers whose inputs are not plainly ``[B, ...]``, by place (see ``rows``).
        media: places of the layers that were seen to get images or sounds, one for each row.
        forms: the forms of calls that were watched, and found in order (see ``bypassed``).
        reducer: what averages gradients over processes, see ``distributed.reducing``; copies have none.
        last: the last routing of an evaluation and what it was made of: generation calls at every token.
    """

    config: FlixConfig
    bank: Bank
    strategy: str = "auto"
    trained: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    folded: dict[str, Any] | None = None
    traced: bool = False
    pager: Any = None
    marks: dict[int, str] = field(default_factory=dict)
    media: set[int] = field(default_factory=set)
    forms: set[tuple[Any, ...]] = field(default_factory=set)
    last: tuple[Any, ...] | None = None
    reducer: Any = None

    def __post_init__(self) -> None:
        optimizers.watch(self)

    def __setstate__(self, values: dict[str, Any]) -> None:
        vars(self).update(values)
        optimizers.watch(self)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles are not paged nor reduced, and make routing of their own.
        return {**vars(self), "pager": None, "reducer": None, "last": None, "forms": set()}

    def forget(self) -> None:
        """Let go of what was made for the features as they were."""
        self.last, self.traced = None, False
        self.forms.clear()
        if self.pager is not None:
            self.pager.forget()
        if self.reducer is not None:
            self.reducer.follow()
