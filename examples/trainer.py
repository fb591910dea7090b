"""The Trainer with FLix features: columns say what a row activates, a run resumes, the best adapter is loaded.
Made-up data and random weights; runs offline, in seconds."""

import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import flix
from flix.backends.torch import adapt, load
from flix.transformers import FlixCollator, FlixTrainer

LANGUAGES, TASKS = ["hau", "swa", "yor"], ["topic", "sentiment"]
config = flix.FlixConfig(
    registry=flix.FeatureRegistry({"language": LANGUAGES, "task": TASKS}),
    ranks=flix.ranks.by_group(language=2, task=4),
    feature_dropout=flix.FeatureDropout(p=0.0, per_group={"language": 0.2}),
)


def rows(count, seed):
    """The label is whether the first token is even; in sentiment, whether it is odd."""
    draw, made = random.Random(seed), []
    for i in range(count):
        task, ids = TASKS[i % 2], [draw.randrange(1, 20) for _ in range(4)]
        label = (ids[0] + (task == "sentiment")) % 2
        made.append({"text": f"row {i}", "language": LANGUAGES[i % 3], "task": task, "input_ids": ids, "label": label})  # fmt: skip
    return Dataset.from_list(made)


def base():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, initializer_range=0.2)
    )  # fmt: skip


def trainer(folder):
    model = adapt(base(), config)
    model.classifier.requires_grad_(True)  # begins at random, so it trains, too
    arguments = TrainingArguments(
        folder, max_steps=150, per_device_train_batch_size=16, learning_rate=1e-2, logging_steps=50, eval_strategy="steps", eval_steps=50,
        save_steps=50, load_best_model_at_end=True, use_cpu=True, disable_tqdm=True, report_to=[],
    )  # fmt: skip
    return FlixTrainer(model, arguments, FlixCollator(config), rows(600, 1), rows(120, 2))


with tempfile.TemporaryDirectory() as folder:
    whole, again = trainer(f"{folder}/whole"), trainer(f"{folder}/again")
    whole.train()
    again.train(resume_from_checkpoint=f"{folder}/whole/checkpoint-100")  # as after a crash
    again.save_model(f"{folder}/adapter")
    print(sorted(path.name for path in Path(folder, "whole/checkpoint-100").iterdir()))
    loaded = load(base(), f"{folder}/adapter")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    print("loss by feature:", {k: round(v, 3) for k, v in again.evaluate().items() if "loss" in k})
