"""Tiny models of real architectures for the torch backend, and whole models in dense form that they are held to."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from flix.backends.torch import adapt  # noqa: E402
from flix.backends.torch.experts import ExpertsKernel  # noqa: E402
from flix.backends.torch.layer import flix_layers  # noqa: E402
from flix.backends.torch.parameters import whole  # noqa: E402
from flix.core.adapter.adapter import tensor_name  # noqa: E402
from tests.helpers import experts  # noqa: E402
from tests.helpers.registry import ROWS, config, registry  # noqa: E402
from tests.helpers.zoo import build, inputs_of  # noqa: E402

torch.set_num_threads(1)

ROW = {"language": "swa", "task": "pos"}


def routing(rows: list[Any] = ROWS) -> tuple[Any, Any]:
    encoded = registry().encode(rows)
    return torch.from_numpy(encoded.ids), torch.from_numpy(encoded.weights)


def live_pairs(model: nn.Module) -> dict[str, Any]:
    """The pairs under the names of adapter files, as :func:`layer_pairs` gives them."""
    return {
        tensor_name(path, part, feature): value
        for path, layer in flix_layers(model)
        for feature, pair in layer_pairs(layer).items()
        for part, value in zip("AB", pair, strict=True)
    }


def layer_pairs(layer: Any) -> dict[tuple[str, str], tuple[Any, Any]]:
    """A layer's pairs by feature, as tensors that are the model's own memory.

    Their ``grad`` is the matching part of the feature's gradient at the time of the call, or None.
    """
    found, bank, place = {}, layer.flix_state.bank, layer.flix_place
    for feature, a, b in layer.pairs():
        parameter = bank.parameter(feature)
        pair = tuple(side.detach().requires_grad_(parameter.requires_grad) for side in (a, b))
        if parameter.grad is not None:
            grad, i = whole(parameter.grad), bank.features.index(feature)
            start, middle, end = bank.layout.starts[i][2 * place : 2 * place + 3]
            pair[0].grad = grad[start:middle].view(a.shape)
            pair[1].grad = grad[middle:end].view(b.mT.shape).mT
        found[feature] = pair
    return found


def parameters_of(model: nn.Module) -> dict[tuple[str, str], nn.Parameter]:
    """The features' parameters."""
    bank = model.flix_bank
    return {bank.features[i]: parameter for i, parameter in bank.held().items()}


def randomize(model: nn.Module, seed: int = 0, std: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in live_pairs(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * std)


def llama(**changes: Any) -> nn.Module:
    return build("llama", **changes)


def t5() -> nn.Module:
    return build("t5")


# One of each kind, for what does not depend on the architecture; the tests of architectures have them all.
MODELS = ("llama", "gpt2", "bert", "t5")


def make(name: str, dtype: Any = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build(name).to(dtype)


def batch(name: str, rows: int = len(ROWS), length: int = 9) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    inputs = {"input_ids": torch.randint(1, 40, (rows, length), generator=generator)}
    if name == "t5":
        inputs["labels"] = torch.randint(1, 40, (rows, length - 3), generator=generator)
    return inputs


def output(result: Any) -> Any:
    if "text_embeds" in result:  # two towers
        return torch.cat([result.text_embeds, result.image_embeds], -1)
    names = ("logits", "pred_masks", "last_hidden_state")
    return next(result[name] for name in names if name in result)


def adapted(name: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A model of the zoo in float64, adapted, with values drawn from the seed, in evaluation mode."""
    model = adapt(make(name), config(**changes))
    randomize(model, seed)
    return model.eval()


def run(model: Any, name: str = "llama", rows: Any = None) -> Any:
    """A model's output for some rows, without gradients."""
    rows = rows or [ROW, {"language": "hau", "task": "ner"}, {"task": "pos"}]
    encoded = model.flix_config.registry.encode(rows)
    with torch.no_grad():
        return output(model(**inputs_of(name, rows=len(rows)), flix_features=encoded))


def dense_model(
    base: nn.Module, adapted: nn.Module, ids: Any, weights: Any, inputs: dict[str, Any]
) -> tuple[Any, dict[str, Any], Any]:
    """Row by row through a plain copy of the base whose kernels are W0 + Σ w s B A, in dense form.

    Returns the output, the leaves that stand for the pairs, and the leaf that stands for the weights.
    """
    settings = adapted.flix_config
    pairs = {n: p.detach().clone().requires_grad_() for n, p in live_pairs(adapted).items()}
    weights = weights.to(next(iter(pairs.values())).dtype).clone().requires_grad_()
    turned = {path: layer.flix_transposed for path, layer in flix_layers(adapted)}
    plain = dict(base.named_parameters())
    rows = []
    for row in range(ids.shape[0]):
        replaced = {}
        for path, transposed in turned.items():
            own = plain[path if path in plain else f"{path}.weight"]
            kernel = own
            for entry, feature_id in enumerate(ids[row].tolist()):
                if feature_id < 0:
                    continue
                feature = settings.registry.features[feature_id]
                a = pairs.get(f"{path}.A.{feature[0]}.{feature[1]}")
                if a is None:
                    continue
                b = pairs[f"{path}.B.{feature[0]}.{feature[1]}"]
                update = weights[row, entry] * settings.scale(path, feature) * (b @ a)
                kernel = kernel + (update.mT if transposed else update)
            for name, parameter in base.named_parameters(remove_duplicate=False):
                # T5's encoder and decoder embed with kernels tied to "shared".
                if parameter is own and name.endswith(
                    ("embed_tokens.weight", f"{path}.weight", path)
                ):
                    replaced[name] = kernel
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        result = torch.func.functional_call(base, replaced, (), one, tie_weights=False)
        rows.append(output(result))
    return torch.cat(rows), pairs, weights


@contextmanager
def updated(
    base: nn.Module, adapted: nn.Module, ids: Any, weights: Any
) -> Iterator[dict[str, Any]]:
    """Let a plain model's layers add each position's own sum of updates, feature by feature, in a hook.

    Args:
        base: the plain model that was adapted.
        adapted: the adapted one: its pairs and scales are used.
        ids: int ``[B, T, W]``.
        weights: float ``[B, T, W]``.

    Returns:
        The pairs that the hooks compute with, whose ``grad`` a backward sets.
    """
    settings = adapted.flix_config
    pairs = live_pairs(adapted)
    handles, patched = [], {}
    for path, layer in flix_layers(adapted):
        if isinstance(layer, ExpertsKernel):
            parent, _, name = path.rpartition(".")
            patched.setdefault(base.get_submodule(parent), {})[name] = path
            continue

        def hook(
            module: Any, args: Any, y: Any, path: str = path, kind: str = layer.flix_kind
        ) -> Any:
            x, total = args[0], torch.zeros_like(y)
            for number, feature in enumerate(settings.registry.features):
                a = pairs.get(f"{path}.A.{feature[0]}.{feature[1]}")
                if a is None:
                    continue
                b = pairs[f"{path}.B.{feature[0]}.{feature[1]}"]
                h = a.t()[x] if kind == "embedding" else x @ a.t()
                factor = (weights * (ids == number)).sum(-1).view(*y.shape[:-1], 1)
                total = total + factor * settings.scale(path, feature) * (h @ b.t())
            return y + total

        handles.append(base.get_submodule(path).register_forward_hook(hook))
    for module, paths in patched.items():

        def delta(t: int, e: int, path: str) -> Any:
            total = None
            for entry, number in enumerate(ids.flatten(0, 1)[t].tolist()):
                feature = settings.registry.features[number]
                name = f"{path}.A.{feature[0]}.{feature[1]}"
                if number >= 0 and name in pairs:
                    b = pairs[f"{path}.B.{feature[0]}.{feature[1]}"][e]
                    factor = weights.flatten(0, 1)[t, entry] * settings.scale(path, feature)
                    own = factor * (b @ pairs[name][e])
                    total = own if total is None else total + own
            return total

        deltas = {n: functools.partial(delta, path=path) for n, path in paths.items()}
        module.forward = functools.partial(experts.forward, module, deltas=deltas)  # type: ignore[method-assign]
    try:
        yield pairs
    finally:
        for handle in handles:
            handle.remove()
        for module in patched:
            del module.forward


def project_back(result: Any) -> None:
    """The gradient of one projection, so that a loss's own reduction plays no part."""
    generator = torch.Generator().manual_seed(2)
    (result * torch.randn(result.shape, generator=generator, dtype=result.dtype)).sum().backward()


def ask(model: nn.Module, name: str, rows: list[Any]) -> Any:
    """The answers of an adapted model to ``batch(name)``, each row under its own features."""
    encoded = model.flix_config.registry.encode(rows)
    ids, weights = torch.from_numpy(encoded.ids), torch.from_numpy(encoded.weights)
    with torch.no_grad():
        return output(
            model.eval()(**batch(name, len(rows)), flix_features=ids, flix_weights=weights)
        )
