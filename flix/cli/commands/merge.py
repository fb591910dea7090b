"""``flix merge``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flix.cli.composed import composed, idle_json, note_idle, told
from flix.cli.console import show, show_json
from flix.cli.options import AdapterFolder, Base, Force, Json, Out
from flix.core.errors import ConfigError, listed, near
from flix.core.folders import whole_folder
from flix.tasks.recipe import read_recipe

# What an earlier model or LoRA of a folder is read from: what the new one does not write anew goes, and nothing else.
_FILES = {
    "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json",
    # the vocabularies of transformers' tokenizers
    "vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "emoji.json", "entity_vocab.json", "normalizer.json",
    "prophetnet.tokenizer", "sentencepiece.bpe.model", "sentencepiece.model", "source.spm", "target.spm", "spiece.model",
    "spm.model", "spm_char.model", "target_vocab.json", "tokenizer.model", "vocab-src.json", "vocab-tgt.json",
    "word_pronunciation.json", "word_shape.json", "byte_maps.json",
}  # fmt: skip
_SHARD = re.compile(r"(model-\d{5}-of-\d{5}\.safetensors|pytorch_model-\d{5}-of-\d{5}\.bin)")
DTYPES = ("float32", "bfloat16", "float16")


def merge(
    adapter: AdapterFolder,
    features: Annotated[
        list[str],
        typer.Option(
            "--features",
            metavar="GROUP=NAME,...",
            help="The composition, e.g. language=hau,task=ner; language=hau:0.5+swa:0.5 mixes.",
        ),
    ],
    out: Out,
    base: Base = None,
    force: Force = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="Of the merged model: float32, bfloat16 or float16; default: as the base's file.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fold one composition into the base: a plain transformers folder."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: no dtype {dtype!r}{near(dtype, DTYPES)}; the dtypes are: {listed(DTYPES)}")  # fmt: skip
    model, place, row, active, idle = composed(adapter, base, features, out, force, dtype or "auto")
    tokenizer = _tokenizer(adapter, place)
    from flix.backends.torch import merge as merged_with

    merged = merged_with(model, row)
    with whole_folder(out, key="config.json", keep=_is_no_model(out)) as aside:
        merged.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
    found = str(merged.dtype).removeprefix("torch.")
    if as_json:
        said = {"features": active, "dtype": found, "tokenizer": tokenizer is not None}
        show_json({"out": str(out), **said, **idle_json(idle)})
        return
    note_idle(idle)
    show(f"merged {told(active)} into {place}, in {found}: {out}")
    if dtype is None and found in ("bfloat16", "float16"):
        show("note: this is the dtype of the base's file, and the sum is rounded to it; --dtype float32 rounds less")  # fmt: skip
    if tokenizer is None:
        show("the base has no tokenizer; none was copied")


def _tokenizer(adapter: Path, base: str) -> Any:
    """The tokenizer that the adapter was trained with, or None if the base has none."""
    from flix.tasks import ModelError, tokenizer_of

    try:
        return tokenizer_of(adapter, base=base)
    except ModelError:
        if (read_recipe(adapter) or {}).get("tokenizer") is not None:
            raise  # the base's would be another one
        return None


def _is_no_model(folder: Path) -> Callable[[str], bool]:
    """Tells whether a name in a folder is none of what an earlier model there would be read from."""

    def stays(name: str) -> bool:
        return (folder / name).is_dir() or not (name in _FILES or _SHARD.fullmatch(name))

    return stays
