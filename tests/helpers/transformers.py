"""Tiny adapted models of transformers, rows with columns for their features, and trainers of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

import flix  # noqa: E402
from flix.backends.torch import adapt  # noqa: E402
from flix.backends.torch.heads import trained_heads  # noqa: E402
from flix.transformers import FlixCollator, FlixTrainer  # noqa: E402
from tests.helpers.registry import LANGUAGES, TASKS, registry  # noqa: E402
from tests.helpers.torch import live_pairs  # noqa: E402

torch.set_num_threads(1)

LENGTH = 6


def config(**changes: Any) -> flix.FlixConfig:
    settings: dict[str, Any] = {
        "registry": registry(),
        "ranks": flix.ranks.by_group(language=2, task=3),
        "feature_dropout": flix.FeatureDropout(p=0.3),
    }
    return flix.FlixConfig(**{**settings, **changes})


def classifier(**changes: Any) -> Any:
    """An adapted BERT with dropout in it, whose classifier head trains, too."""
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            initializer_range=0.2,
            hidden_dropout_prob=0.1,
            num_labels=3,
        )
    )
    adapt(model, config(**changes))
    model.classifier.requires_grad_(True)
    return model


def llama(**changes: Any) -> Any:
    """An adapted Llama."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
            pad_token_id=0,
            eos_token_id=None,
            bos_token_id=None,
        )
    )
    return adapt(model, config(**changes))


def t5(**changes: Any) -> Any:
    """An adapted T5."""
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )
    return adapt(model, config(**changes))


def row(
    language: Any = "hau", task: Any = "ner", tokens: int = 3, **columns: Any
) -> dict[str, Any]:
    return {"language": language, "task": task, "input_ids": list(range(1, tokens + 1)), **columns}


def rows(count: int = 20, labels: str = "class") -> list[dict[str, Any]]:
    """Rows with features, tokens and labels; the column ``text`` is of no use to a model."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for i in range(count):
        ids = torch.randint(1, 40, (LENGTH,), generator=generator).tolist()
        found.append(
            {
                "text": f"row {i}",
                "language": LANGUAGES[i % 4] if i % 7 else None,
                "task": TASKS[i % 2],
                "input_ids": ids,
                "labels": i % 3 if labels == "class" else ids,
            }
        )
    return found


def dataset(count: int = 20, labels: str = "class") -> Any:
    return datasets.Dataset.from_list(rows(count, labels))


def arguments(folder: Path, cls: Any = None, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return (cls or transformers.TrainingArguments)(**{**settings, **changes})


class Watched(FlixTrainer):
    """Keeps the ids of every batch that it trains on, in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[Any] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(inputs["flix_features"].clone())
        return super().training_step(model, inputs, *args, **kwargs)


def trainer(
    folder: Path, model: Any = None, data: Any = None, collator: Any = None, **changes: Any
) -> Any:
    """A FlixTrainer; keywords that TrainingArguments does not know go to the trainer."""
    own = {
        name: changes.pop(name)
        for name in (
            "eval_dataset",
            "compute_metrics",
            "loss_by_feature",
            "callbacks",
            "model_init",
        )
        if name in changes
    }
    cls = changes.pop("cls", Watched)
    kind = changes.pop("arguments_class", None)
    if model is None and "model_init" not in own:
        model = classifier()
    if collator is None:
        collator = FlixCollator(config() if model is None else model.flix_config, seed=5)
    made = cls(
        model=model,
        args=arguments(folder, kind, **changes),
        data_collator=collator,
        train_dataset=dataset() if data is None else data,
        **own,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def state(made: Any) -> dict[str, Any]:
    """Every trained value and every tensor of the optimizer, by name."""
    model = made.model
    found = {**live_pairs(model), **trained_heads(model)}
    held = made.optimizer.state_dict()["state"]
    found.update({f"{i}.{name}": v for i, s in held.items() for name, v in s.items()})
    return {name: torch.as_tensor(value).detach().clone() for name, value in found.items()}


def losses(made: Any, after: int = 0) -> list[dict[str, float]]:
    """What was logged after a step, but for times."""
    return [
        {k: v for k, v in entry.items() if "runtime" not in k and "second" not in k}
        for entry in made.state.log_history
        if entry["step"] > after and "train_loss" not in entry
    ]


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
