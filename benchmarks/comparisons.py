"""What ``benchmarks.compare`` measures in each tree: short comparisons of the layer and model benchmarks.

Each runs in a process of its own, which ``benchmarks.compare`` starts with one tree's flix and this tree's benchmarks,
and writes one line of JSON. Only flix's public names are used, so that both trees have them.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common import Arm, Results, interleave, median_ms
from benchmarks.layer.problem import ACTIVE, RANK, SHAPES, make_problem

SMALL = (64, 4, 16)


@dataclass(frozen=True)
class Ratio:
    """One figure: an arm's time over another's in the same round.

    Attributes:
        what: its name.
        arm, base: the two.
        bar: what it may be at most; None where nothing is asked of it.
    """

    what: str
    arm: str
    base: str
    bar: float | None = None


@dataclass
class Candidates:
    """What is timed together.

    Attributes:
        arms: guarded already.
        ratios: the figures.
        rounds, warmup: how many.
        share: reads the seconds of a part from what a run returned; None if there is none.
        check: reads from the results of flix's arm what must be the same in both trees.
        checked: that arm's name.
    """

    arms: list[Arm]
    ratios: list[Ratio]
    rounds: int
    checked: str
    warmup: int = 2
    share: Callable[[Any], float] | None = None
    check: Callable[[Results], Any] = lambda found: found["y"]


def torch_layer(smoke: bool, shape: tuple[int, int, int], rounds: int) -> Candidates:
    """One layer beside the frozen one and PEFT's single LoRA."""
    import torch

    from benchmarks.layer import torch_layer as layer
    from benchmarks.layer.torch_arms import flix_arm, frozen_arm, peft_single_arm

    torch.set_num_threads(1)
    problem = make_problem(*(SMALL if smoke else shape))
    frozen, single = frozen_arm(problem), peft_single_arm(problem, ACTIVE * RANK)
    arms = [frozen, single, flix_arm(layer.FIRST, problem)]
    arms.append(flix_arm(layer.LATER, problem, later=True))
    ratios = [
        Ratio("a later layer, over the frozen layer", layer.LATER, frozen.name),
        Ratio("a later layer, over PEFT's one LoRA", layer.LATER, single.name, 0.95),
        Ratio("the first layer, over the frozen layer", layer.FIRST, frozen.name),
    ]
    return Candidates(layer.guarded(arms, problem, True), ratios, rounds, layer.LATER)


def torch_growth(smoke: bool) -> Candidates:
    """2,000 registered features over 25."""
    import torch

    from benchmarks.scale.layer_growth import guarded_arms

    torch.set_num_threads(1)
    few, many = (25, 100) if smoke else (25, 2000)
    shape = SMALL if smoke else SHAPES[0]
    arms = guarded_arms({f"{n:,}": make_problem(*shape, n) for n in (few, many)})
    ratio = Ratio(f"{many:,} features over {few}", f"{many:,}", f"{few}", 1.04)
    return Candidates(arms, [ratio], 25, f"{many:,}")


def torch_training(smoke: bool, which: str) -> Candidates:
    """A training step with fused AdamW."""
    import torch

    from benchmarks.model import torch_model as model

    torch.set_num_threads(1)
    arms, _ = model.training_arms(*model.problem(which, smoke), peers=False)
    ratios = [
        Ratio("step over the frozen model's", model.FLIX, model.FROZEN),
        Ratio(
            "step over PEFT's one LoRA", model.FLIX, model.SINGLE, 0.95 if which == "t5" else None
        ),
    ]
    return Candidates(
        arms,
        ratios,
        2,
        model.FLIX,
        warmup=0,
        share=lambda out: out["seconds"],
        check=lambda found: found["loss"],
    )


def torch_generation(smoke: bool, which: str) -> Candidates:
    """Greedy generation."""
    import torch

    from benchmarks.model import torch_generation as model
    from benchmarks.model.torch_model import problem

    torch.set_num_threads(1)
    make, batch, inputs = problem(which, smoke)
    new = 3 if smoke else 16
    arms, _ = model.generation_arms(make, batch, inputs["input_ids"], new, peers=False)
    ratios = [
        Ratio("over the base model", model.FLIX, model.BASE, 1.12 if which == "t5" else None),
        Ratio("over PEFT's one LoRA", model.FLIX, model.SINGLE),
    ]
    return Candidates(
        arms, ratios, 4, model.FLIX, warmup=0, check=lambda found: np.abs(found["logits"]).mean()
    )


def jax_layer(smoke: bool, shape: tuple[int, int, int], rounds: int) -> Candidates:
    """One layer beside the frozen one and ``nnx.LoRA``."""
    from benchmarks.layer import jax_layer as layer

    methods = {name: layer.METHODS[name] for name in ("frozen", layer.LORA, "auto")}
    arms = layer.guarded_arms(make_problem(*(SMALL if smoke else shape)), methods)
    ratios = [
        Ratio("over the frozen layer", "auto", "frozen"),
        Ratio("over nnx.LoRA", "auto", layer.LORA),
    ]
    return Candidates(arms, ratios, rounds, "auto")


def jax_model(smoke: bool) -> Candidates:
    """A training step of an nnx model."""
    from benchmarks.model import jax_model as model

    arms, _, _ = model.guarded_arms(smoke)
    ratios = [
        Ratio("step over the frozen model's", model.FLIX, model.FROZEN),
        Ratio("step over nnx.LoRA", model.FLIX, model.LORA),
    ]
    return Candidates(arms, ratios, 4, model.FLIX, warmup=1, check=lambda found: found["loss"])


def tensorflow_layer(smoke: bool, shape: tuple[int, int, int], rounds: int) -> Candidates:
    """One layer beside the frozen one and Keras's own LoRA."""
    from benchmarks.layer import tensorflow_layer as layer

    layer.one_thread()
    problem = make_problem(*(SMALL if smoke else shape))
    arms = layer.guarded_arms({"flix, {}": problem}, strategies=("auto",), peers=True)
    ratios = [
        Ratio("over the frozen layer", "flix, auto", layer.BASE),
        Ratio("over Keras's LoRA", "flix, auto", layer.LORA),
    ]
    return Candidates(arms, ratios, rounds, "flix, auto", warmup=3)


def keras_model(smoke: bool) -> Candidates:
    """A training step of a Keras model."""
    from benchmarks.layer.tensorflow_layer import one_thread
    from benchmarks.model import keras_model as model

    one_thread()
    arms, _, _ = model.guarded_arms(smoke)
    ratios = [
        Ratio("step over the frozen model's", model.FLIX, model.FROZEN),
        Ratio("step over Keras's LoRA", model.FLIX, model.LORA),
    ]
    return Candidates(arms, ratios, 4, model.FLIX, warmup=1, check=lambda found: found["loss"])


small, large = SHAPES
COMPARISONS: Mapping[str, Callable[[bool], Candidates]] = {
    "torch-layer-768": functools.partial(torch_layer, shape=small, rounds=25),
    "torch-layer-2048": functools.partial(torch_layer, shape=large, rounds=11),
    "torch-growth": torch_growth,
    "t5-training": functools.partial(torch_training, which="t5"),
    "t5-generation": functools.partial(torch_generation, which="t5"),
    "jax-layer-768": functools.partial(jax_layer, shape=small, rounds=25),
    "jax-layer-2048": functools.partial(jax_layer, shape=large, rounds=7),
    "tensorflow-layer-768": functools.partial(tensorflow_layer, shape=small, rounds=25),
    "tensorflow-layer-2048": functools.partial(tensorflow_layer, shape=large, rounds=7),
    "gpt2-training": functools.partial(torch_training, which="gpt2"),
    "gpt2-generation": functools.partial(torch_generation, which="gpt2"),
    "jax-model": jax_model,
    "keras-model": keras_model,
}
DEFAULT = tuple(name for name in COMPARISONS if "gpt2" not in name and not name.endswith("model"))
"""What fits about ten minutes."""


def measure(name: str, smoke: bool = False) -> dict[str, Any]:
    """Run one comparison in this process.

    Returns:
        ``ratios`` {figure: its value in every round}, ``bars``, ``ms`` {arm: median}, and ``check``, which must be the
        same in both trees.
    """
    load = os.getloadavg()[0]
    found = COMPARISONS[name](smoke)
    shares: dict[str, list[float]] = {arm.name: [] for arm in found.arms}

    def seen(arm: str, out: Any) -> None:
        if found.share is not None:
            shares[arm].append(found.share(out))

    rounds = 2 if smoke else found.rounds
    times = interleave(found.arms, rounds, warmup=found.warmup, seen=seen)
    ms = {arm: median_ms(seconds) for arm, seconds in times.items()}
    if found.share is not None:
        for arm, part in shares.items():
            rest = [t - p for t, p in zip(times[arm], part, strict=True)]
            ms[f"{arm}, optimizer"] = median_ms(rest)
    ratios = {
        r.what: [t / b for t, b in zip(times[r.arm], times[r.base], strict=True)]
        for r in found.ratios
    }
    arm = next(arm for arm in found.arms if arm.name == found.checked)
    arm.reset()
    with arm.around():
        value = found.check(arm.results(arm.run()))
    return {
        "ratios": ratios,
        "bars": {r.what: r.bar for r in found.ratios if r.bar is not None},
        "ms": ms,
        "check": float(np.abs(np.asarray(value, np.float64)).mean()),
        "load": [load, os.getloadavg()[0]],
    }


def main() -> None:
    """What ``benchmarks.compare`` starts: a comparison's name, and whether it is a smoke run."""
    import flix

    name, smoke = sys.argv[1], sys.argv[2] == "smoke"
    found = measure(name, smoke) | {"flix": os.path.dirname(os.path.dirname(flix.__file__))}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
