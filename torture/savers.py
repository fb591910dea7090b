"""Everything that flix writes, as a version that can be told from every other: all of its numbers are the version's."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import flix
from flix.core.adapter.adapter import LayerShape

FEATURES = {"language": ["hau", "swa", "yor"], "task": ["ner", "pos"]}
SIZES = {"q": (48, 64), "k": (48, 64), "v": (64, 48)}
ONE, TWO = {"language": "hau"}, {"language": "hau", "task": "ner"}


class MixedError(AssertionError):
    """What was read is of no one version."""


@dataclass(frozen=True)
class Saver:
    """Something that writes versions into a folder, over and over.

    Attributes:
        name: what it is.
        make: makes ``write(folder, version)``; called in the process that writes.
        read: the version that a folder holds. Raises :class:`MixedError`, or what a load raises.
        imports: modules to import before processes are forked.
    """

    name: str
    make: Callable[[], Callable[[Path, int], None]]
    read: Callable[[Path], int]
    imports: tuple[str, ...] = ()


def one_version(values: Iterable[Any], what: str) -> int:
    """The version that all arrays hold.

    Raises:
        MixedError: they hold more than one.
    """
    found = {float(value) for array in values for value in np.unique(np.asarray(array, np.float64))}
    if len(found) != 1:
        raise MixedError(f"{what} holds the versions {sorted(found)}")
    return int(found.pop())


def configuration(**changes: Any) -> flix.FlixConfig:
    """The configuration of all adapters here."""
    registry = flix.FeatureRegistry(FEATURES)
    return flix.FlixConfig(registry=registry, ranks=4, target_modules=list(SIZES), **changes)


def adapter(version: int) -> flix.Adapter:
    """An adapter whose values are all the version."""
    config = configuration()
    layers = {path: LayerShape(*sizes) for path, sizes in SIZES.items()}
    tensors = {}
    for path, shape in layers.items():
        for group, name in config.registry.features:
            tensors[f"{path}.A.{group}.{name}"] = np.full((4, shape.d_in), version, np.float32)
            tensors[f"{path}.B.{group}.{name}"] = np.full((shape.d_out, 4), version, np.float32)
    return flix.Adapter(config, layers, tensors)


def read_adapter(folder: Path) -> int:
    """The version of an adapter's folder."""
    return one_version(flix.load_adapter(folder).tensors.values(), str(folder))


def _numpy() -> Callable[[Path, int], None]:
    return lambda folder, version: flix.save_adapter(adapter(version), folder)


@cache
def _net() -> Any:
    import torch
    from torch import nn

    class Net(nn.Module):
        """A small model with a head."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(*SIZES[name]) for name in SIZES)
            self.head = nn.Linear(48, 16)

        def forward(self, x: Any) -> Any:
            return self.head(self.v(torch.tanh(self.q(x) + self.k(x))))

    torch.set_num_threads(1)
    return Net


def _fill(model: Any, version: int) -> None:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(version)


def _torch() -> Callable[[Path, int], None]:
    from flix.backends.torch import adapt, save

    model = adapt(_net()(), configuration())
    model.head.requires_grad_(True)

    def write(folder: Path, version: int) -> None:
        _fill(model, version)
        save(model, folder)

    return write


def _read_torch(folder: Path) -> int:
    from flix.backends.torch import load

    model = load(_net()(), folder)
    trained = [
        p.detach().numpy() for n, p in model.named_parameters() if "flix" in n or "head" in n
    ]
    return one_version(trained, str(folder))


def _peft() -> Callable[[Path, int], None]:
    from flix.backends.torch import adapt, export_peft

    model = adapt(_net()(), configuration())

    def write(folder: Path, version: int) -> None:
        _fill(model, version)
        export_peft(model, TWO if version % 2 else ONE, folder)

    return write


def _read_peft(folder: Path) -> int:
    from flix.core.peft.importing import read_peft

    # Out of one folder, whatever takes its place between its two files; ranks are held to the tensors.
    a = {path: pair[0] for path, pair in read_peft(folder).pairs.items()}
    version = one_version(a.values(), str(folder))
    rank = 8 if version % 2 else 4
    ranks = {value.shape[0] for value in a.values()}
    if ranks != {rank}:
        raise MixedError(f"{folder}: tensors of version {version}, ranks {sorted(ranks)}")
    return version


def _merged() -> Callable[[Path, int], None]:
    from transformers import GPT2Config, GPT2LMHeadModel

    from flix.backends.torch import adapt, save
    from flix.cli.commands.merge import merge

    small = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8)
    base = GPT2LMHeadModel(small)
    for parameter in base.parameters():
        parameter.data.zero_()
    registry = flix.FeatureRegistry(FEATURES)
    settings = flix.FlixConfig(registry=registry, ranks=1, target_modules=["c_attn"])
    model = adapt(GPT2LMHeadModel(small), settings)

    def write(folder: Path, version: int) -> None:
        aside = folder.with_name(folder.name + "-source")
        if not (aside / "base").exists():
            base.save_pretrained(aside / "base")
        for name, value in model.named_parameters():
            if "flix" in name:
                value.data.fill_(1)
        save(model, aside / str(version))
        with contextlib.redirect_stdout(io.StringIO()):
            merge(
                aside / str(version),
                str(aside / "base"),
                [f"language=hau:{version}"],
                folder,
                True,
                False,
            )
        shutil.rmtree(aside / str(version))

    return write


def _read_merged(folder: Path) -> int:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder)
    return one_version([model.transformer.h[0].attn.c_attn.weight.detach().numpy()], str(folder))


def _shared(folder: Path, version: int) -> None:
    from flix.cli.commands.share import share

    source = folder.with_name(folder.name + "-source")
    flix.save_adapter(adapter(version), source)
    with contextlib.redirect_stdout(io.StringIO()):
        share(source, ["language=hau"], folder, True, False)


def _combined(folder: Path, version: int) -> None:
    from flix.cli.commands.combine import combine

    sources = []
    for name in ("hau", "swa"):
        sources.append(folder.with_name(f"{folder.name}-{name}"))
        flix.save_adapter(flix.select_features(adapter(version), [("language", name)]), sources[-1])
    with contextlib.redirect_stdout(io.StringIO()):
        combine(sources, folder, "error", True, False)


def _jax() -> Callable[[Path, int], None]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from flix.backends.jax import FlixParam, adapt, save

    class Net(nnx.Module):
        """The same model in flax."""

        def __init__(self) -> None:
            for name, sizes in SIZES.items():
                setattr(self, name, nnx.Linear(*sizes, rngs=nnx.Rngs(0)))

    model = adapt(Net(), configuration())

    def write(folder: Path, version: int) -> None:
        state = nnx.state(model, FlixParam)
        nnx.update(model, jax.tree.map(lambda value: jnp.full_like(value, version), state))
        save(model, folder)

    return write


def _keras() -> Callable[[Path, int], None]:
    import keras

    from flix.backends.tensorflow import adapt, save

    inputs = keras.Input((48,))
    hidden = keras.layers.Dense(64, name="q")(inputs) + keras.layers.Dense(64, name="k")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(48, name="v")(hidden))
    model = adapt(model, configuration())

    def write(folder: Path, version: int) -> None:
        for variable in model.trainable_variables:
            variable.assign(np.full(variable.shape, version, np.float32))
        save(model, folder)

    return write


def _checkpoints() -> Callable[[Path, int], None]:
    import torch
    from transformers import TrainingArguments

    from flix.backends.torch import adapt
    from flix.transformers import FlixTrainer

    model = adapt(_net()(), configuration())
    model.head.requires_grad_(True)
    made: dict[Path, Any] = {}

    def write(folder: Path, version: int) -> None:
        if folder not in made:
            arguments = TrainingArguments(
                output_dir=str(folder),
                report_to=[],
                save_total_limit=3,
                use_cpu=True,
                disable_tqdm=True,
            )
            made[folder] = FlixTrainer(model=model, args=arguments)
            made[folder].create_optimizer_and_scheduler(10)
        trainer = made[folder]
        _fill(model, version)
        trainer.state.global_step = version
        torch.manual_seed(version)
        trainer._save_checkpoint(model, None)

    return write


def _read_checkpoint(folder: Path) -> int:
    from flix.transformers import last_checkpoint

    found = last_checkpoint(folder)
    if found is None:
        raise MixedError(f"{folder}: no whole checkpoint")
    version = _read_torch(found)
    if found.name != f"checkpoint-{version}":
        raise MixedError(f"{found} holds version {version}")
    state = json.loads((found / "trainer_state.json").read_text(encoding="utf-8"))
    if state["global_step"] != version:
        raise MixedError(f"{found}: its state is of step {state['global_step']}")
    return version


_TORCH = ("torch", "flix.backends.torch")
SAVERS = {
    saver.name: saver
    for saver in (
        Saver("numpy", _numpy, read_adapter),
        Saver("torch, with heads", _torch, _read_torch, _TORCH),
        Saver("JAX", _jax, read_adapter, ("jax", "flax.nnx", "flix.backends.jax")),
        Saver("Keras", _keras, read_adapter, ("keras", "flix.backends.tensorflow")),
        Saver("PEFT export", _peft, _read_peft, _TORCH),
        Saver("share", lambda: _shared, read_adapter, ("flix.cli.commands.share",)),
        Saver("combine", lambda: _combined, read_adapter, ("flix.cli.commands.combine",)),
        Saver("merge", _merged, _read_merged, (*_TORCH, "transformers", "flix.cli.commands.merge")),
        Saver("checkpoints", _checkpoints, _read_checkpoint, (*_TORCH, "flix.transformers")),
    )
}
