"""Make what examples/train.yaml needs, offline: a tiny byte-level T5 and a toy data set.

    python examples/make_tiny.py
    flix plan examples/train.yaml
    flix train examples/train.yaml

The model has random weights: this shows how the pieces fit, not how well they work (``flix quickstart`` does that).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

WORDS = {
    "eng": [
        "water",
        "bread",
        "house",
        "river",
        "stone",
        "winter",
        "summer",
        "garden",
        "letter",
        "window",
    ],
    "swa": [
        "maji",
        "mkate",
        "nyumba",
        "mto",
        "jiwe",
        "baridi",
        "kiangazi",
        "bustani",
        "barua",
        "dirisha",
    ],
    "fin": [
        "vesi",
        "leipä",
        "talo",
        "joki",
        "kivi",
        "talvi",
        "kesä",
        "puutarha",
        "kirje",
        "ikkuna",
    ],
}
TASKS = {
    "upper": str.upper,
    "reverse": lambda word: word[::-1],
    "first": lambda word: word[0],
}


def make_model(folder: Path) -> None:
    """Save a T5 of some 40,000 parameters, and its tokenizer."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=384,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        dropout_rate=0.1,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)


def make_data(folder: Path) -> None:
    """Write one JSONL file a task, with the languages in a column, sizes unequal."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for task, act in TASKS.items():
        lines = []
        for number, (language, words) in enumerate(WORDS.items()):
            for _ in range(120 // (number + 1)):
                text = " ".join(draw.sample(words, 2))
                target = " ".join(act(word) for word in text.split())
                lines.append({"lang": language, "source": text, "target": target})
        draw.shuffle(lines)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    out = parser.parse_args().out
    make_model(out / "model")
    make_data(out / "data")
    (out / ".gitignore").write_text("*\n")
    print(f"model and data: {out}")
