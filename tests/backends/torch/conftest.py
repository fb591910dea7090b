"""Tiny models of real architectures, and the dense reference they are held to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import flix  # noqa: E402
from flix.backends.torch import named_pairs  # noqa: E402
from flix.backends.torch.model import flix_layers  # noqa: E402
from tests.architectures.zoo import build  # noqa: E402

torch.set_num_threads(1)

ROWS = [
    {"language": "hau", "task": "ner"},
    {"language": {"swa": 0.5, "yor": -1.5}, "task": "pos"},
    {"task": ["ner", "pos"]},
    {},
]


def registry() -> flix.FeatureRegistry:
    return flix.FeatureRegistry({"language": ["hau", "swa", "yor", "zul"], "task": ["ner", "pos"]})


def config(**changes: Any) -> flix.FlixConfig:
    """Unequal ranks, one of them 0, and an alpha that makes scales other than 1."""
    settings: dict[str, Any] = {
        "registry": registry(),
        "ranks": {
            "language": {"hau": 1, "swa": 3, "yor": 0, "zul": 2},
            "task": {"ner": 2, "pos": 4},
        },
        "alpha": {"task": 3.0},
    }
    return flix.FlixConfig(**{**settings, **changes})


def routing(rows: list[Any] = ROWS) -> tuple[Any, Any]:
    encoded = registry().encode(rows)
    return torch.from_numpy(encoded.ids), torch.from_numpy(encoded.weights)


def randomize(model: nn.Module, seed: int = 0, std: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in named_pairs(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * std)


def llama(**changes: Any) -> nn.Module:
    return build("llama", **changes)


def t5() -> nn.Module:
    return build("t5")


# One of each kind, for what does not depend on the architecture; tests/architectures has them all.
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
    return result.logits if "logits" in result else result.last_hidden_state


def dense(
    base: nn.Module, adapted: nn.Module, ids: Any, weights: Any, inputs: dict[str, Any]
) -> tuple[Any, dict[str, Any], Any]:
    """Row by row through a plain copy of the base whose kernels are W0 + Σ w s B A, in dense form.

    Returns the output, the leaves that stand for the pairs, and the leaf that stands for the weights.
    """
    settings = adapted.flix_config
    pairs = {n: p.detach().clone().requires_grad_() for n, p in named_pairs(adapted).items()}
    weights = weights.to(next(iter(pairs.values())).dtype).clone().requires_grad_()
    kinds = {path: type(layer).__name__ for path, layer in flix_layers(adapted)}
    plain = dict(base.named_parameters())
    rows = []
    for row in range(ids.shape[0]):
        replaced = {}
        for path, kind in kinds.items():
            kernel = plain[f"{path}.weight"]
            for entry, feature_id in enumerate(ids[row].tolist()):
                if feature_id < 0:
                    continue
                feature = settings.registry.features[feature_id]
                a = pairs.get(f"{path}.A.{feature[0]}.{feature[1]}")
                if a is None:
                    continue
                b = pairs[f"{path}.B.{feature[0]}.{feature[1]}"]
                update = weights[row, entry] * settings.scale(path, feature) * (b @ a)
                kernel = kernel + (update if kind == "FlixLinear" else update.t())
            own = plain[f"{path}.weight"]
            for name, parameter in base.named_parameters(remove_duplicate=False):
                # T5's encoder and decoder embed with kernels tied to "shared".
                if parameter is own and name.endswith(("embed_tokens.weight", f"{path}.weight")):
                    replaced[name] = kernel
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        result = torch.func.functional_call(base, replaced, (), one, tie_weights=False)
        rows.append(output(result))
    return torch.cat(rows), pairs, weights


def relative(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found.detach()), np.asarray(expected.detach())
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))
