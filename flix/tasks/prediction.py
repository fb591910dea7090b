"""Answers for rows that name their features, from an adapter's folder alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from flix.core.errors import AdapterError, FlixError, listed, near
from flix.core.features.cells import cell_of, names_of, read_cell
from flix.core.features.encoding import Unknown
from flix.core.sampling.batching import implied_groups
from flix.data.errors import DataError
from flix.data.files import Record
from flix.tasks.answering import answers
from flix.tasks.asked import Asker
from flix.tasks.collating import TaskCollator
from flix.tasks.columns import states_weights
from flix.tasks.pretrained import load_pretrained, tasks_of, tokenizer_of
from flix.tasks.recipe import read_recipe
from flix.transformers import FlixCollator

NamedRecord = tuple[str, Mapping[str, Any], Mapping[str, Any]]
"""(where it is, for messages; the record; what its file says of its features)."""

_AT_ONCE = 2048  # rows that are sorted by length


class Predictor:
    """An adapter that answers rows.

    A row is a record with the columns of its task, and names its features in columns called as their groups, or as
    the training data called them. Its feature of the group ``task`` says which task it is of, if there are several.

    Args:
        folder: the adapter's, with the ``recipe.json`` that ``flix train`` writes.
        base: where the base is now; default: where the recipe says.
        features: of rows that do not name theirs, by group.
        unknown: what unknown features do; default: as in training.
        batch_size: rows at a time.
        max_new_tokens, num_beams: of written answers; default: as the recipe says.

    Raises:
        AdapterError: no adapter, one without a recipe, or another base.
        ModelError: a base that cannot be loaded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        base: str | None = None,
        features: Mapping[str, Any] | None = None,
        unknown: Unknown | None = None,
        batch_size: int = 32,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
    ) -> None:
        import torch

        recipe = read_recipe(folder)
        if recipe is None:
            raise AdapterError(
                f"{folder} holds no recipe.json, which flix train writes beside an adapter's files and which says what its "
                "rows are. If this adapter was made from one of flix train, copy the file from there, and add new "
                "combinations to its list 'seen'; otherwise load it with flix.backends.torch.load"
            )
        tokenizer = tokenizer_of(folder, base=base)
        self.recipe = recipe
        self.tasks = tasks_of(folder, tokenizer)
        self.model = load_pretrained(folder, base=base, dtype=recipe.get("dtype", "float32"))
        if torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens or recipe.get("max_new_tokens", 64)
        self.num_beams = num_beams or recipe.get("num_beams", 1)
        collator = FlixCollator(
            self.model.flix_config, TaskCollator(self.tasks, tokenizer), unknown=unknown
        )
        self.collator = collator.evaluation()
        self.asker = Asker(recipe["tasks"], self.collator.columns, features or {})
        self._implied = {*implied_groups(collator.registry)}
        self._checked: set[str] = set()
        self.factors = recipe.get("unseen_group_weights") or {}
        self.elsewhere = collator.evaluation(self.factors)
        self.seen = {frozenset(cell_of(read_cell(name))) for name in recipe.get("seen", ())}

    def __call__(self, records: Iterable[Record | NamedRecord]) -> Iterator[dict[str, Any]]:
        """Each record with its answer in ``output``, and in ``right`` whether that is what it says is wanted.

        What a record itself has in ``output`` and ``right`` goes.

        Args:
            records: pairs of where a record stands and the record; they may mix tasks and features. A third entry is
                what the record's file says of its features, by group.

        Raises:
            DataError: a row without what its task reads, or of no known task; its place is named.
            FeatureError, RoutingError: features that do not exist, or none.
        """
        records = iter(records)
        while block := list(islice(records, _AT_ONCE)):
            rows = [
                self._row(where, record, named[0] if named else {})
                for where, record, *named in block
            ]
            found: dict[int, dict[str, Any]] = {}
            as_named = [self._is_seen(row) or states_weights(row, self.factors) for row in rows]
            for wanted, collator in ((True, self.collator), (False, self.elsewhere)):
                places = [i for i, as_it_is in enumerate(as_named) if as_it_is is wanted]
                given = answers(
                    self.model, self.tasks, [rows[i] for i in places], collator, batch_size=self.batch_size,
                    max_new_tokens=self.max_new_tokens, num_beams=self.num_beams,
                )  # fmt: skip
                for i, answer in zip(places, given, strict=True):
                    right = {} if answer.right is None else {"right": answer.right}
                    # An answer of another run is none of this one.
                    kept = {k: v for k, v in block[i][1].items() if k not in ("output", "right")}
                    found[i] = {**kept, "output": answer.output, **right}
            yield from (found[i] for i in range(len(block)))

    def _row(
        self, where: str, record: Mapping[str, Any], named: Mapping[str, Any]
    ) -> dict[str, Any]:
        row = self.asker(where, record, named)
        self._check(where, record, row)
        return row

    def _check(self, where: str, record: Mapping[str, Any], row: Mapping[str, Any]) -> None:
        """Refuse a row whose features cannot be routed, with its place.

        Raises:
            DataError: a group that the row does not name, or features that do not exist.
        """
        named = {group: row[group] for group in self.collator.columns if group in row}
        key = repr(sorted(named.items()))
        if key in self._checked:
            return
        for group in self.collator.columns:
            if group not in named and group not in self._implied:
                raise DataError(
                    f"{where}: the row does not name its {group}{near(group, record)}; its columns are: {listed(record)}. Name "
                    f"it (null for none), or say it for all rows: --features {group}=..."
                )
        try:
            self.collator.routing_of([named])
        except FlixError as error:
            reason = str(error).removeprefix("row 0: ").partition(". To serve")[0]
            known = self.collator.registry
            new = any((group, name) not in known for group, value in named.items() for name in names_of(group, value))  # fmt: skip
            more = "; to answer without it: --unknown skip, or mean" if new and self.collator.unknown == "error" else ""  # fmt: skip
            raise DataError(f"{where}: {reason}{more}") from None
        self._checked.add(key)

    def _is_seen(self, row: Mapping[str, Any]) -> bool:
        named = {group: row[group] for group in self.collator.columns if row.get(group) is not None}
        return not self.seen or frozenset(cell_of(named)) in self.seen
