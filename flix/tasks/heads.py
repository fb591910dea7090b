"""One encoder with a head for each task: rows of several kinds in one batch, each answered by its own task's head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import ModelOutput

from flix.backends.torch.layer import FlixLayer
from flix.core.errors import ConfigError, TargetError
from flix.tasks.making import heads_of
from flix.tasks.masked import most_masked
from flix.tasks.task import IGNORED, Task


@dataclass
class HeadedOutput(ModelOutput):  # type: ignore[misc]
    """The output of a headed model.

    Attributes:
        loss: the mean of the rows' losses, over rows that have labels; None without labels.
        row_losses: ``[batch]``, the loss of each row, which is the mean over its labels; 0 without labels.
        row_counts: ``[batch]``, 1 for rows with labels, else 0.
        logits: float32 ``[batch, length, labels]``: first the task's own labels, then the lowest possible number.
            Classification and regression answer at the first position. Rows of masked texts have no logits.
        predicted: int64 ``[batch, length]``, the most likely token at each label of a masked text, else -100.
    """

    loss: Tensor | None = None
    row_losses: Tensor | None = None
    row_counts: Tensor | None = None
    logits: Tensor | None = None
    predicted: Tensor | None = None


_LOW = torch.finfo(torch.float32).min

_ENCODERS = frozenset(
    f"{name}_checkpointing_{what}able"
    for name in ("activation", "gradient")
    for what in ("en", "dis")
)  # by whichever of the names that transformers gave them


class HeadedModel(nn.Module):
    """An encoder, or a decoder without its output head, with a head for each task.

    A head is linear, after a dropout at the rate that the encoder's configuration gives classifiers. Tagging reads
    every position. Classification and regression read the mean over a row's positions or, for a decoder, the last
    position. The base's own head, which is not in ``classifier``, answers masked texts.

    Args:
        encoder: gives ``last_hidden_state`` ``[batch, length, size]``.
        tasks: the tasks; tasks of the same name share a head. Heads start at random, from torch's generator.
        last: whether rows are read at their last position.
        lm: for masked texts, a model with the encoder inside and the head that predicts tokens.

    Attributes:
        classifier: the heads by task; ``adapt`` leaves them out of ``"all-linear"``.
    """

    def __init__(
        self, encoder: Any, tasks: Sequence[Task], *, last: bool = False, lm: Any = None
    ) -> None:
        super().__init__()
        self.config: Any = encoder.config
        self.encoder = encoder
        self.last = last
        owners, _ = heads_of(tasks)
        self.kinds: tuple[str, ...] = tuple(task.kind for task in owners)
        self.names: tuple[str, ...] = tuple(_module_names([task.name for task in owners]))
        size, spread = _size_of(self.config), getattr(self.config, "initializer_range", None)
        self.dropout: nn.Dropout = nn.Dropout(_dropout_of(self.config))
        self.classifier: nn.ModuleDict = nn.ModuleDict()
        for task, name in zip(owners, self.names, strict=True):
            if task.kind == "masked":
                continue
            head = nn.Linear(size, max(len(task.labels), 1))
            nn.init.normal_(head.weight, std=0.02 if spread is None else float(spread))
            nn.init.zeros_(head.bias)
            self.classifier[name] = head
        self.widest: int = max(
            (max(len(t.labels), 1) for t in owners if t.kind != "masked"), default=0
        )
        self.lm_head: Any = None if lm is None else _alone(lm, encoder)
        self.fresh: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.encoder.parameters()).device
        return device

    def get_input_embeddings(self) -> Any:
        """The encoder's."""
        return self.encoder.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None: heads are not tied to anything here."""

    def __getattr__(self, name: str) -> Any:
        if name in _ENCODERS:
            return getattr(self.encoder, name)
        return super().__getattr__(name)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        head: Tensor | None = None,
        labels: Tensor | None = None,
        values: Tensor | None = None,
    ) -> HeadedOutput:
        """Answer a batch.

        Args:
            input_ids: ``[batch, length]``.
            attention_mask: of that shape; default: all ones.
            head: ``[batch]``, the number of each row's head, in the order of the tasks; default: the first.
            labels: ``[batch, length]``, -100 where there is none; a row's single label is at the first position.
            values: ``[batch]``, for regression; NaN in other rows.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if head is None:
            head = input_ids.new_zeros(len(input_ids))
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        answer = self._of_every_row if torch.compiler.is_compiling() else self._of_own_rows
        losses, counts, logits, predicted = answer(states, attention_mask, head, labels, values)
        told = labels is not None or values is not None
        loss = losses.sum() / counts.sum().clamp(min=1.0) if told else None
        return HeadedOutput(loss, losses, counts, logits, predicted)

    def _nothing(self, states: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Losses, counts, logits and predictions of rows that nobody answers."""
        batch, length = states.shape[:2]
        losses = states.new_zeros(batch, dtype=torch.float32)
        logits = states.new_full((batch, length, self.widest), _LOW, dtype=torch.float32)
        return losses, torch.zeros_like(losses), logits, head.new_full((batch, length), IGNORED)

    def _of_own_rows(
        self,
        states: Tensor,
        mask: Tensor,
        head: Tensor,
        labels: Tensor | None,
        values: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        losses, counts, logits, predicted = self._nothing(states, head)
        # Heads that no row of the batch needs get no gradient, so that no optimizer moves them.
        for number in torch.unique(head).tolist():
            rows = (head == number).nonzero()[:, 0]
            kind = self.kinds[number]
            given = values if kind == "regression" else labels
            wanted = None if given is None else given[rows]
            if kind == "masked":
                own, count = self._masked(predicted, rows, states, wanted)
            else:
                found = self._logits(number, states[rows], mask[rows])
                where = torch.arange(found.shape[1], device=rows.device)
                logits[rows[:, None], where, : found.shape[2]] = found
                own, count = _losses(kind, found, wanted)
            losses = losses.index_put((rows,), own)
            counts = counts.index_put((rows,), count)
        return losses, counts, logits, predicted

    def _of_every_row(
        self,
        states: Tensor,
        mask: Tensor,
        head: Tensor,
        labels: Tensor | None,
        values: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same in one graph, whatever rows there are: every head answers every row, and its own are taken."""
        losses, counts, logits, predicted = self._nothing(states, head)
        length, widest = logits.shape[1:]
        for number, kind in enumerate(self.kinds):
            mine = head == number
            wanted = labels if labels is None else torch.where(mine[:, None], labels, IGNORED)
            if kind == "masked":
                if wanted is None:
                    continue
                own, count = self._all_masked(predicted, states, wanted)
            else:
                found = self._logits(number, states, mask)
                around = (0, widest - found.shape[2], 0, length - found.shape[1])
                logits = torch.where(mine[:, None, None], F.pad(found, around, value=_LOW), logits)
                if kind == "regression":
                    wanted = values if values is None else torch.where(mine, values, torch.nan)
                own, count = _losses(kind, found, wanted)
            losses = losses + torch.where(mine, own, 0.0)
            counts = counts + torch.where(mine, count, 0.0)
        return losses, counts, logits, predicted

    def _logits(self, number: int, states: Tensor, mask: Tensor) -> Tensor:
        """What a head says of its rows: float32 ``[rows, length or 1, labels]``."""
        head: Any = self.classifier[self.names[number]]
        _check_plain(f"classifier.{self.names[number]}", head)
        if self.kinds[number] != "tagging":
            states = self._pooled(states, mask)[:, None]
        return head(self.dropout(states).to(head.weight.dtype)).float()  # type: ignore[no-any-return]

    def _masked(
        self, predicted: Tensor, rows: Tensor, states: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The losses of rows of masked texts; what is likeliest there is put into ``predicted``."""
        nothing = states.new_zeros(len(rows), dtype=torch.float32)
        if labels is None or not len(found := (labels != IGNORED).nonzero()):
            return nothing, nothing
        if self.lm_head is None:
            raise ConfigError("masked texts need a model that was loaded for a task of that kind")
        row, place = found.unbind(1)
        _check_plain("lm_head", self.lm_head)
        logits = self.lm_head(inputs_embeds=states[rows[row], place][None]).logits[0]
        predicted[rows[row], place] = logits.argmax(-1)
        losses = F.cross_entropy(logits.float(), labels[row, place], reduction="none")
        count = nothing.index_add(0, row, torch.ones_like(losses))
        return nothing.index_add(0, row, losses) / count.clamp(min=1.0), (count > 0).float()

    def _all_masked(
        self, predicted: Tensor, states: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same of every row, at as many positions of each as may be masked."""
        assert self.lm_head is not None
        on = labels != IGNORED
        places = on.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        places = places[:, : most_masked(labels.shape[1])]
        chosen = on.gather(1, places)
        torch._assert_async(
            (on.sum(1) == chosen.sum(1)).all(), "a text has more masks than a quarter of its tokens"
        )
        index = places[..., None].expand(-1, -1, states.shape[2])
        logits = self.lm_head(inputs_embeds=states.gather(1, index)).logits
        said = torch.where(chosen, logits.argmax(-1), IGNORED)
        predicted.scatter_(1, places, torch.where(chosen, said, predicted.gather(1, places)))
        wanted = torch.where(chosen, labels.gather(1, places), IGNORED)
        return _losses("tagging", logits.float(), wanted)

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """A row's one state ``[rows, size]``: the mean over its positions, or the last."""
        if self.last:
            places = torch.arange(mask.shape[1], device=mask.device) * mask.ne(0)
            return states[torch.arange(len(states), device=mask.device), places.argmax(1)]
        weights = mask[..., None].to(torch.float32)
        summed = (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return summed.to(states.dtype)


class _States(nn.Module):
    """Stands where an encoder was, and gives the states that it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor | None = None, **__: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=inputs_embeds)


def _alone(lm: Any, encoder: Any) -> Any:
    """A model's own head: the same model, with the same parameters, without its encoder.

    Every class of models has a forward of its own for its head; so that is run, with states in the place of inputs.
    """
    shell = copy.copy(lm)
    names = [name for name, module in lm.named_children() if module is encoder]
    shell._modules = {**lm._modules, **{name: _States() for name in names}}
    if not names:
        raise ConfigError(f"{type(lm).__name__} has no encoder of its own")
    return shell


def _check_plain(path: str, module: nn.Module) -> None:
    if torch.compiler.is_compiling():
        return  # every head gets every row there
    for name, layer in module.named_modules():
        if isinstance(layer, FlixLayer):
            inside = f".{name}" if name else ""
            raise TargetError(
                f"{path}{inside} belongs to a head, which sees only some rows of a batch and "
                f"cannot be adapted; leave it "
                f"out: exclude_modules=['{(path + inside).rpartition('.')[2]}']. Heads train whole: train_heads(model)"
            )


def _losses(kind: str, logits: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each row's loss, and 1 for rows that have one: the mean over a row's labels."""
    if wanted is None:
        nothing = logits.new_zeros(len(logits))
        return nothing, nothing
    if kind == "regression":
        counts = ~wanted.isnan()
        errors = logits[:, 0, 0] - torch.where(counts, wanted, 0.0).to(logits.dtype)
        return torch.where(counts, errors**2, 0.0), counts.float()
    labels = wanted[:, : logits.shape[1]]
    losses = F.cross_entropy(logits.mT, labels, ignore_index=IGNORED, reduction="none")
    number = (labels != IGNORED).sum(1)
    return losses.sum(1) / number.clamp(min=1), (number > 0).float()


def _module_names(names: Sequence[str]) -> list[str]:
    """Names that modules can have: without dots, not those of attributes, each once."""
    found: list[str] = []
    for name in names:
        own = name.replace(".", "_") or "_"
        while own in found or hasattr(nn.ModuleDict, own):
            own += "_"
        found.append(own)
    return found


def _size_of(config: Any) -> int:
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        if isinstance(size := getattr(config, name, None), int):
            return size
    raise ConfigError(f"{type(config).__name__} does not say how wide the model's states are")


def _dropout_of(config: Any) -> float:
    for name in ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob"):
        if (rate := getattr(config, name, None)) is not None:
            return float(rate)
    return 0.0
