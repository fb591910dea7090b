"""Train the quickstart's base: a small byte-level T5, by denoising words of many languages.

    python -m tools.pretrain --out DIR --seed 0 --steps 3000

None of the tasks it is later adapted to appears here: words are never paired with lemmas, digits,
hyphens, dates or translations. See :mod:`tools.noise` for what it does learn.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flix.quickstart.words import FORMS_ONLY, words
from tools.noise import LineSampler, denoising_pair
from tools.tokens import EOS, IGNORED, PAD, VOCABULARY, pad

#: Languages of the base. The first row is what the quickstart adapts to.
LANGUAGES = (
    *("de", "es", "fr", "ru", "cs", "sv", "hu", "fi", "tr", "id", "lt", "cy", "sw", "ka"),
    *("en", "it", "pt", "pl", "nl", "ro", "uk", "el", "da", "nb", "lv", "sk", "sl", "bg", "ca"),
    *("is", "ms", "vi", "fil"),
)
#: How often a language is drawn, where it is not 1.
SHARES = {
    "en": 4.0,
    **dict.fromkeys(LANGUAGES[:14], 2.0),
    **dict.fromkeys(("ka",), 3.0),
}
WORDS_EACH = 20000
#: Batches that are made at a time.
BUFFERED = 16


def base_config(**more: Any) -> Any:
    """The architecture: 3 + 2 layers, width 128, about 1.2 million parameters; ``more`` overrides settings."""
    from transformers import T5Config

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 128,
        "d_kv": 32,
        "d_ff": 384,
        "num_layers": 3,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": PAD,
        "tie_word_embeddings": True,
        **more,
    }
    return T5Config(**settings)


def new_model(config: Any = None) -> Any:
    """A model with fresh weights, drawn from torch's generator; ``config`` is that of the base unless it is given.

    Two departures from T5's usual start make copying, which every later task needs, appear within
    300 steps; with the usual start (and a rate of 3e-3) it had not after 1,000. The embeddings
    start smaller. And the position biases start with a preference in each head: the letter before,
    the letter after (in the decoder: two before), the neighbourhood, and a wider one. Heads after
    the fourth start without. All of this is trained like the rest.
    """
    import torch
    from transformers import T5ForConditionalGeneration

    model: Any = T5ForConditionalGeneration(config or base_config())
    with torch.no_grad():
        model.shared.weight.normal_(std=0.5)
        for stack, bidirectional in ((model.encoder, True), (model.decoder, False)):
            attention = stack.block[0].layer[0].SelfAttention
            offsets = torch.arange(-64, 65 if bidirectional else 1)
            buckets = attention._relative_position_bucket(
                offsets, bidirectional=bidirectional, num_buckets=32, max_distance=128
            )
            # centre, width and height of each head's preference
            heads = (
                (-1, 0.5, 5.0),
                (1 if bidirectional else -2, 0.5, 5.0),
                (0, 3, 3.0),
                (0, 12, 2),
            )
            table = attention.relative_attention_bias.weight.zero_()
            for head, (centre, width, height) in enumerate(heads[: table.shape[1]]):
                wish = height * torch.exp(-(offsets - centre).abs() / width)
                table[:, head].scatter_reduce_(0, buckets, wish, reduce="amax")
    return model


def curriculum(sampler: LineSampler, done: float) -> None:
    """Short lines of half jumbled words at first, lines as they come after a fifth of the run."""
    sampler.most_words = 1 if done < 0.12 else 3 if done < 0.2 else 5
    sampler.jumbled = 0.5 if done < 0.12 else 0.1


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


class Batches:
    """Endless batches of pairs; each holds pairs of similar length.

    Args:
        draw: makes the ids of a source and of its target.
        batch: pairs in a batch.
        rng: draws the order of batches.
    """

    def __init__(
        self, draw: Callable[[], tuple[list[int], list[int]]], batch: int, rng: np.random.Generator
    ) -> None:
        self._draw, self._batch, self._rng = draw, batch, rng
        self._ready: list[tuple[np.ndarray, np.ndarray]] = []

    def block(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Source ids and labels of :data:`BUFFERED` batches, made from as many pairs as they hold."""
        pairs = [self._draw() for _ in range(BUFFERED * self._batch)]
        pairs.sort(key=lambda pair: (len(pair[0]), len(pair[1])))
        found = []
        for k in self._rng.permutation(BUFFERED):
            chosen = pairs[k * self._batch : (k + 1) * self._batch]
            targets = pad([target for _, target in chosen])
            found.append(
                (pad([source for source, _ in chosen]), np.where(targets == PAD, IGNORED, targets))
            )
        return found

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """Source ids and labels of one batch."""
        if not self._ready:
            self._ready = self.block()
        return self._ready.pop()


def word_lists(count: int = WORDS_EACH) -> dict[str, list[str]]:
    """The words the base is trained on, by language."""
    lists = {}
    for language in LANGUAGES:
        found = words(language, count // 2 if language in FORMS_ONLY else count)
        lists[language] = [word for word in found if len(word.encode()) <= 40]
    return lists


def train(
    out: Path,
    seed: int = 0,
    steps: int = 3000,
    batch: int = 96,
    peak: float = 2e-3,
    threads: int = 1,
    log_every: int = 100,
) -> dict[str, Any]:
    """Train a base and save it in ``out`` with ``training.json``; returns what that file holds."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    lists = word_lists()
    sampler = LineSampler(lists, SHARES, rng)
    batches = Batches(lambda: denoising_pair(sampler.line(), rng), batch, rng)
    model = new_model().train()
    parameters = sum(p.numel() for p in model.parameters())
    words_in_all = sum(map(len, lists.values()))
    print(f"{parameters:,} parameters, {words_in_all:,} words, {len(lists)} languages", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01, foreach=True
    )
    warmup = min(300, steps // 10 + 1)
    began, recent = time.monotonic(), []
    curve: list[tuple[int, float]] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warmup)
        curriculum(sampler, step / steps)
        source, target = map(torch.from_numpy, batches.next())
        loss = model(input_ids=source, attention_mask=(source != PAD).long(), labels=target).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % log_every == 0 or step + 1 == steps:
            curve.append((step + 1, round(float(np.mean(recent)), 4)))
            recent = []
            minutes = (time.monotonic() - began) / 60
            print(f"step {step + 1} loss {curve[-1][1]:.4f} minutes {minutes:.1f}", flush=True)
        if (step + 1) % 1000 == 0:
            _save(model, out)
    report = {
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "learning_rate": peak,
        "threads": threads,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "parameters": parameters,
        "words": words_in_all,
        "languages": list(LANGUAGES),
        "final_loss": curve[-1][1] if curve else None,
        "loss": curve,
    }
    _save(model, out)
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _save(model: Any, out: Path) -> None:
    """Save a half-precision copy; training goes on in single precision."""
    import copy

    import torch

    half = copy.deepcopy(model).to(torch.float16)
    half.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(arguments)
    train(
        chosen.out,
        seed=chosen.seed,
        steps=chosen.steps,
        batch=chosen.batch,
        peak=chosen.learning_rate,
        threads=chosen.threads,
    )


if __name__ == "__main__":
    main()
