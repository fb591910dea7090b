"""FlixTrainer: what reaches the model, what its checkpoints hold, and that its modes train alike."""

from __future__ import annotations

import dataclasses
import inspect
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import flix  # noqa: E402
from flix.backends.torch import load  # noqa: E402
from flix.backends.torch.heads import trained_heads  # noqa: E402
from flix.transformers import FlixCollator, FlixTrainer  # noqa: E402
from tests.helpers.registry import registry  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import live_pairs, parameters_of  # noqa: E402
from tests.helpers.transformers import (  # noqa: E402
    arguments,
    classifier,
    dataset,
    llama,
    losses,
    rows,
    same,
    trainer,
)


def masks_of(made: Any) -> list[Any]:
    made.train()
    return [ids.numpy() for ids in made.seen]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_dropout_is_that_of_the_step(tmp_path: Path, accumulated: int) -> None:
    """Each micro-step's mask is what FeatureDropout gives for its number; two epochs of 7 micro-steps."""
    common = {
        "num_train_epochs": 2,
        "gradient_accumulation_steps": accumulated,
        "lr_scheduler_type": "constant",
    }
    found = masks_of(trainer(tmp_path, **common))
    model = classifier(feature_dropout=None)
    plain = masks_of(trainer(tmp_path, model, collator=FlixCollator(model.flix_config), **common))
    assert len(found) == len(plain) == 14
    for step, (ids, undropped) in enumerate(zip(found, plain, strict=True)):
        routing = flix.Routing(undropped.astype(np.int32), np.ones(undropped.shape, np.float32), registry())  # fmt: skip
        wanted = flix.FeatureDropout(p=0.3)(routing, seed=5, step=step)
        assert np.array_equal(ids, wanted.ids)
    assert not all(np.array_equal(a, b) for a, b in zip(found, plain, strict=True))
    workers = trainer(tmp_path, dataloader_num_workers=2, **common)
    assert all(np.array_equal(a, b) for a, b in zip(masks_of(workers), found, strict=True))


def test_evaluation_drops_nothing(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset=dataset(8), model=classifier(feature_dropout=flix.FeatureDropout(p=1.0)))  # fmt: skip
    for loader in (made.get_eval_dataloader(), made.get_test_dataloader(dataset(8))):
        batches = list(loader)
        assert len(batches) == 2
        for batch in batches:
            assert (batch["flix_features"] >= 0).any(1).all()
    assert all((batch["flix_features"] == -1).all() for batch in made.get_train_dataloader())
    found = made.evaluate()
    assert "eval_loss/task=ner" in found and "eval_loss/language=hau" in found


@pytest.mark.parametrize("kind", ["datasets", "list", "stream", "torch stream"])
@pytest.mark.parametrize("workers", [0, 2])
def test_columns_survive_pruning(tmp_path: Path, kind: str, workers: int) -> None:
    """remove_unused_columns is on, as by default: it takes ``text`` and leaves what routes."""
    data: Any = dataset()
    if kind == "list":
        data = rows()
    elif kind == "stream":
        data = dataset().to_iterable_dataset(num_shards=2)
    elif kind == "torch stream":
        data = Stream(rows())
    made = trainer(tmp_path, data=data, max_steps=3, dataloader_num_workers=workers)
    made.train()
    assert len(made.seen) == 3 and all(ids.shape == (3, 2) for ids in made.seen)
    again = trainer(tmp_path, data=data, max_steps=3, dataloader_num_workers=workers)
    again.train()
    assert all(torch.equal(a, b) for a, b in zip(made.seen, again.seen, strict=True))


class Stream(torch.utils.data.IterableDataset):  # type: ignore[misc]
    """Rows in order, shared out among workers."""

    def __init__(self, held: list[dict[str, Any]]) -> None:
        self.held = held

    def __iter__(self) -> Any:
        info = torch.utils.data.get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        yield from self.held[first::step]


def contents(file: Path) -> tuple[set[str], int]:
    """The names of a safetensors file's tensors, and the bytes of their values."""
    with open(file, "rb") as data:
        size = struct.unpack("<Q", data.read(8))[0]
        return set(json.loads(data.read(size))) - {"__metadata__"}, len(data.read())


def test_checkpoints_hold_no_base(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=2, save_steps=2, save_strategy="steps")
    made.train()
    folder = tmp_path / "checkpoint-2"
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "flix_config.json", "flix.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
        "trainer_state.json", "flix_checkpoint.json",
    }  # fmt: skip
    pairs, heads = live_pairs(made.model), trained_heads(made.model)
    trained = {**pairs, **heads}
    sizes = sum(4 * parameter.numel() for parameter in trained.values())
    names = {*pairs, *(f"trained.{name}" for name in heads)}
    assert contents(folder / "flix.safetensors") == (names, sizes)
    assert set(heads) == {"classifier.weight", "classifier.bias"}
    numbers = sum(parameter.numel() for parameter in trained.values())
    held = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    moments = sum(v.numel() for s in held.values() for k, v in s.items() if k != "step")
    assert 0 < moments <= 2 * numbers
    known = {id(p) for p in (*heads.values(), *parameters_of(made.model).values())}
    kinds = {n for n, p in made.model.named_parameters() if id(p) not in known}
    for path in folder.iterdir():
        text = path.read_bytes()
        assert not any(name.encode() in text for name in kinds), path.name


def test_save_model_and_load(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=3)
    made.train()
    made.save_model(str(tmp_path / "out"))
    torch.manual_seed(1)
    plain = transformers.BertForSequenceClassification(made.model.config)
    base = {n: p for n, p in made.model.state_dict().items() if n in plain.state_dict() and "classifier" not in n}  # fmt: skip
    plain.load_state_dict(base, strict=False)
    fresh = load(plain, tmp_path / "out")
    batch = made.data_collator.evaluation()(
        [{k: v for k, v in row.items() if k != "text"} for row in rows(4)]
    )
    with torch.no_grad():
        wanted = made.model.eval()(**batch).logits
        assert_close(fresh.eval()(**batch).logits, wanted)
    assert fresh.classifier.weight.requires_grad and not fresh.bert.pooler.dense.weight.requires_grad  # fmt: skip


def test_best_model_comes_back(tmp_path: Path) -> None:
    """The best of three checkpoints is, by the metric, the second: its adapter and its head are loaded in the end."""
    metrics = iter([1.0, 3.0, 2.0])
    kept: dict[int, dict[str, Any]] = {}

    class Keep(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(
            self, args: Any, now: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            held = {**live_pairs(model), **trained_heads(model)}
            kept[now.global_step] = {n: p.detach().clone() for n, p in held.items()}

    made = trainer(
        tmp_path,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        greater_is_better=True,
        eval_dataset=dataset(8),
        compute_metrics=lambda _: {"quality": next(metrics)},
        callbacks=[Keep()],
    )
    made.train()
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    now = {**live_pairs(made.model), **trained_heads(made.model)}
    assert same(now, kept[4]) and not same(now, kept[6])
    assert not torch.equal(kept[4]["classifier.weight"], kept[6]["classifier.weight"])


def checkpointing(reentrant: bool) -> dict[str, Any]:
    """Activation checkpointing by the name that this transformers gives it."""
    known = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    name = "activation" if "activation_checkpointing" in known else "gradient"
    return {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": reentrant}}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"bf16": True}, id="bf16"),
        pytest.param(checkpointing(True), id="reentrant"),
        pytest.param(checkpointing(False), id="non-reentrant"),
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, id="compiled"),
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, id="aot", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_modes_train_alike(tmp_path: Path, changes: dict[str, Any]) -> None:
    targets = {"target_modules": ["q_proj", "down_proj"]}
    model = {"model": llama(**targets), "data": dataset(12, "tokens"), "max_steps": 3}
    plain = trainer(tmp_path, **model, remove_unused_columns=True)
    plain.train()
    other = trainer(tmp_path, **{**model, "model": llama(**targets)}, **changes)
    other.train()
    tolerance = 0.05 if "bf16" in changes else 1e-5
    for one, two in zip(losses(plain), losses(other), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=tolerance)
    for (name, one), two in zip(
        live_pairs(plain.model).items(), live_pairs(other.model).values(), strict=True
    ):
        if "bf16" not in changes:
            assert_close(two, one, times=100, name=name)
    moved = [{n for n, p in live_pairs(m.model).items() if ".B." in n and p.abs().max() > 0} for m in (plain, other)]  # fmt: skip
    assert moved[0] == moved[1] and len(moved[0]) >= 16


def test_absent_features_stay(tmp_path: Path) -> None:
    """Zulu is in no row: weight decay and momentum leave it bit for bit as it was, compiled or not."""
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        data = dataset().filter(lambda row: row["language"] != "zul")
        model = classifier(feature_dropout=None, target_modules=["query", "value"])
        before = {n: p.detach().clone() for n, p in live_pairs(model).items()}
        trainer(tmp_path, model, data, max_steps=4, **changes).train()
        for name, parameter in live_pairs(model).items():
            assert torch.equal(parameter, before[name]) == name.endswith("language.zul"), name


def test_all_features_decay_alike(tmp_path: Path) -> None:
    """The Trainer spares parameters whose names speak of biases or norms; features may have such names."""
    odd = flix.FeatureRegistry({"norm": ["bias", "layernorm"], "task": TASKS_ODD})
    model = classifier(registry=odd, ranks=2, feature_dropout=None)
    made = trainer(tmp_path, model)
    decayed = set(made.get_decay_parameter_names(model))
    known = {id(p) for p in parameters_of(model).values()}
    pairs = {n for n, p in model.named_parameters() if id(p) in known}
    assert len(pairs) == 4 and pairs <= decayed
    assert "classifier.weight" in decayed and "classifier.bias" not in decayed
    optimizer = made.create_optimizer()
    assert optimizer.defaults["fused"] is True
    assert {id(p) for p in optimizer.param_groups[0]["params"]} >= known


TASKS_ODD = ["rmsnorm", "x.bias"]


def test_predict(tmp_path: Path) -> None:
    made = trainer(tmp_path, compute_metrics=lambda p: {"mean": float(p.predictions.mean())})
    found = made.predict(dataset(6))
    assert found.predictions.shape == (6, 3) and "test_mean" in found.metrics
    batch = made.data_collator.evaluation()([{k: v for k, v in r.items() if k != "text"} for r in rows(6)])  # fmt: skip
    with torch.no_grad():
        wanted = made.model.eval()(**batch).logits.numpy()
    assert_close(found.predictions, wanted)


def test_mistakes(tmp_path: Path) -> None:
    plain = transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8, vocab_size=40))  # fmt: skip
    with pytest.raises(flix.TargetError, match=r"FlixTrainer needs an adapted model.*adapt\(model, config\)"):  # fmt: skip
        FlixTrainer(model=plain, args=arguments(tmp_path))
    with pytest.raises(flix.TargetError, match="FlixTrainer needs an adapted model"):
        FlixTrainer(model_init=lambda: plain, args=arguments(tmp_path))
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "flix.safetensors").touch()
    with pytest.raises(
        flix.ConfigError, match="holds no complete checkpoint; checkpoint-3: it has no"
    ):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    args = arguments(tmp_path)
    args.fsdp, args.fsdp_config = "full_shard", {"version": 1}
    with pytest.raises(flix.ConfigError, match=r"does not train with FSDP1.*\"version\": 2"):
        FlixTrainer(model=classifier(), args=args)
    if "batch_rebalance" in inspect.getsource(transformers.Trainer):
        made = trainer(tmp_path, data=rows(), train_sampling_strategy="batch_rebalance")
        with pytest.raises(flix.ConfigError, match="batch_rebalance"):
            made.get_train_dataloader()
    # The plain Trainer takes the columns away: the collator says so.
    usual = trainer(tmp_path, cls=transformers.Trainer, max_steps=1)
    with pytest.raises(flix.RoutingError, match=r"none of the feature columns language, task.*remove_unused_columns=False"):  # fmt: skip
        usual.train()
    usual = trainer(tmp_path, cls=transformers.Trainer, max_steps=1, data=dataset().remove_columns("text"), remove_unused_columns=False)  # fmt: skip
    with pytest.raises(flix.RoutingError, match="does not carry its place in the run"):
        usual.train()


def test_model_init(tmp_path: Path) -> None:
    made = trainer(tmp_path, model_init=lambda: classifier(), max_steps=2)
    made.train()
    assert losses(made)[-1]["step"] == 2
