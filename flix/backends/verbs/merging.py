"""One composition as plain kernels, or as a LoRA of PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flix.backends.protocol import (
    SupportsDequantizing,
    SupportsFolding,
    SupportsPeft,
)
from flix.backends.verbs.shared import Shared
from flix.core.adapter.adapter import Adapter
from flix.core.adapter.composition import Composition, composition, delta
from flix.core.errors import ConfigError, TargetError
from flix.core.features.encoding import Row
from flix.core.files import Path_
from flix.core.peft.attention import as_attention
from flix.core.peft.convolutions import as_convolutions
from flix.core.peft.exporting import (
    PeftExport,
    PeftFacts,
    as_peft,
    check_exportable,
    cut_to_rank,
    with_modules,
    write_peft,
)
from flix.core.peft.serving import PeftExports, Served, folder_name, lora_names

M = TypeVar("M")


class Merging(Shared):
    """Verbs about one composition."""

    def merge(self, model: M, row: Row, *, dequantize: bool = False) -> M:
        """A plain copy of an adapted model with one composition folded into its kernels; no flix layer is left.

        If other modules share the kernel of an adapted layer (an embedding tied to the head), it is untied, because
        only this layer's kernel changes. The copy refuses ``flix_features`` if the framework allows it (torch).

        Args:
            model: an adapted model; it is not changed.
            row: the composition, ``{group: name | [names] | {name: weight}}``.
            dequantize: turn layers with quantised kernels into plain layers; otherwise they are refused.

        Raises:
            FeatureError, RoutingError: a row that cannot be encoded, or that activates nothing.
            TargetError: the model is not adapted, or cannot be copied; a kernel is quantised, or not in memory.
        """
        active, adapter = self.composed("merge", model, row)
        merged = self.primitives.merged
        if dequantize:
            supporting = self.supporting(SupportsDequantizing, "merge with dequantize=True")
            merged = supporting.dequantized
        return merged(model, active, lambda path: delta(adapter, path, active))

    def merge_in_place(self, model: M, row: Row) -> M:
        """Fold one composition into an adapted model's kernels until ``unmerge``; ``merge`` gives a copy instead.

        Until then the model answers under this composition at the base's speed and takes no routing. It keeps its
        features and its original kernels, so that ``save`` works and ``unmerge`` restores every bit.

        Args:
            model: an adapted model.
            row: the composition, ``{group: name | [names] | {name: weight}}``.

        Returns:
            The model.

        Raises:
            FeatureError, RoutingError: a row that cannot be encoded, or that activates nothing.
            TargetError: the model is not adapted, or is already merged, or its framework cannot do this.
        """
        folding = self.supporting(SupportsFolding, "merge_in_place")
        active, adapter = self.composed("merge_in_place", model, row)
        if (held := folding.folded(model)) is not None:
            raise TargetError(f"the model is merged already, with {held!r}; unmerge(model) first")
        folding.fold(model, row, lambda path: delta(adapter, path, active))
        return model

    def unmerge(self, model: M) -> M:
        """Remove the composition that ``merge_in_place`` folded in, bit for bit.

        Returns:
            The model.

        Raises:
            TargetError: the model is not adapted, or not merged.
        """
        folding = self.supporting(SupportsFolding, "unmerge")
        self.config_of("unmerge", model)
        if folding.folded(model) is None:
            raise TargetError("the model is not merged; merge_in_place(model, row) merges it")
        folding.unfold(model)
        return model

    def export_peft(
        self, model: Any, row: Row, directory: Path_, *, compress_to: int | None = None
    ) -> PeftExport:
        """Write one composition as a LoRA, exactly, for PEFT and vLLM.

        Heads that were trained with the features are included as whole modules (PEFT's ``modules_to_save``). PEFT
        opens these, vLLM does not.

        Args:
            model: an adapted model; it is not changed.
            row: the composition.
            directory: the folder to write; its name is the LoRA's name in vLLM's flags.
            compress_to: cut the composition to this rank if it has a larger one, and report the error. Default: never
                cut. (vLLM serves ranks up to 512.)

        Returns:
            The LoRA's rank, its error if it was cut, and whether vLLM serves it and with which flags; print its
            ``message``.

        Raises:
            FeatureError, RoutingError: a row that cannot be encoded, or that activates nothing.
            AdapterError: the composition has no update in any layer, or a trained parameter cannot be stored in
                PEFT's format.
            ConfigError: an ill-formed ``compress_to``.
            TargetError: the model is not adapted.
        """
        peft = self.supporting(SupportsPeft, "export_peft")
        active, adapter = self.composed("export_peft", model, row)
        return _exported(adapter, active, peft.peft_facts(model), directory, compress_to)

    def export_peft_all(
        self,
        model: Any,
        rows: Iterable[Row] | Mapping[str, Row],
        directory: Path_,
        *,
        compress_to: int | None = None,
    ) -> PeftExports:
        """Write many compositions, each as a LoRA in a folder of its own, to be served together.

        This does :meth:`export_peft` once for each, but reads what they share (the features' values, the model's
        description) only once. ``loras.json`` says which LoRA is for which features, and how vLLM serves all of them.

        Args:
            model: an adapted model; it is not changed.
            rows: the compositions; a mapping gives names for the LoRAs, otherwise names are made from the features.
            directory: the folder in which the LoRAs' folders are made.
            compress_to: as for :meth:`export_peft`.

        Returns:
            The exports by name, with one command line; print its ``message``.

        Raises:
            As :meth:`export_peft`, and ConfigError for no rows, for two rows with the same composition, and for a
            name that cannot be a folder's name. Then nothing is written.
        """
        peft = self.supporting(SupportsPeft, "export_peft_all")
        config = self.config_of("export_peft_all", model)
        named = rows if isinstance(rows, Mapping) else None
        stated = list(rows.values() if isinstance(rows, Mapping) else rows)
        if not stated:
            raise ConfigError("export_peft_all needs at least one composition, got none")
        compositions = [composition(config, row) for row in stated]
        names = lora_names(compositions, stated)
        if named is not None:
            names = [folder_name(name) for name in named]
        used = list(dict.fromkeys(feature for active in compositions for feature, _ in active))
        adapter, facts = self.adapter_of(model, used), peft.peft_facts(model)
        for active in compositions:
            check_exportable(adapter, active)
        loras = []
        for name, active in zip(names, compositions, strict=True):
            export = _exported(adapter, active, facts, Path(directory) / name, compress_to)
            loras.append(Served(name, active, export))
        made = PeftExports(str(directory), tuple(loras), facts.base_model)
        made.write_map()
        return made


def _exported(
    adapter: Adapter,
    active: Composition,
    facts: PeftFacts,
    directory: Path_,
    compress_to: int | None,
) -> PeftExport:
    """One composition as a LoRA in a folder."""
    facts.check([path for path, shape in adapter.layers.items() if not shape.experts])
    config, tensors = as_peft(
        adapter,
        active,
        target_modules=facts.target_modules,
        fan_in_fan_out=facts.fan_in_fan_out,
        base_model=facts.base_model,
        task_type=facts.task_type,
    )
    error = 0.0
    if compress_to is not None:
        config, tensors, error = cut_to_rank(config, tensors, compress_to)
    tensors = as_attention(as_convolutions(tensors, facts.kernels), facts.attentions)
    config, tensors = with_modules(config, tensors, facts.modules)
    return write_peft(
        directory,
        config,
        tensors,
        error=error,
        architecture=facts.architecture,
        encoder_decoder=facts.encoder_decoder,
        vocabulary=facts.vocabulary,
    )
