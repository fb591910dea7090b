"""Losses by feature: their parts, their sums, and what the trainers log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flix.transformers import FlixCollator, FlixSeq2SeqTrainer, FlixTrainer, pack  # noqa: E402
from flix.transformers.losses import FeatureLosses, unreduced  # noqa: E402
from tests.helpers.registry import registry  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.transformers import classifier, dataset, llama, rows, t5, trainer  # noqa: E402

F = torch.nn.functional


def test_parts_of_the_usual_losses() -> None:
    """Weighted by their counts, the parts give what the models of transformers return."""
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0, :2] = -100
    for shifted in (False, True):
        losses, counts = unreduced(logits, labels, shifted=shifted)
        one, two = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
        wanted = F.cross_entropy(one.reshape(-1, 7), two.reshape(-1))
        assert_close((losses * counts).sum() / counts.sum(), wanted)
        assert losses.shape == counts.shape == two.shape
    scores, classes = torch.randn(4, 3), torch.tensor([0, 2, -100, 1])
    losses, counts = unreduced(scores, classes, shifted=True)
    assert_close((losses * counts).sum() / 3, F.cross_entropy(scores, classes))
    several = torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    losses, counts = unreduced(scores, several, shifted=False)
    assert_close(losses.mean(), F.binary_cross_entropy_with_logits(scores, several))
    value = torch.randn(4)
    for guess, wanted in ((scores[:, :1], value), (scores[:, 0], value), (scores[:, :1], value[:, None])):  # fmt: skip
        losses, counts = unreduced(guess, wanted, shifted=False)
        assert_close(losses.mean(), F.mse_loss(guess.flatten(), wanted.flatten()))
    losses, _ = unreduced(scores, several, shifted=False, problem_type="regression")
    assert_close(losses.mean(), F.mse_loss(scores, several))
    assert unreduced(logits, torch.zeros(3, dtype=torch.long), shifted=False) is None
    assert unreduced(scores, torch.zeros(3, 3), shifted=False) is None
    assert unreduced(torch.randn(0, 4, 7), torch.zeros(0, 4, dtype=torch.long), shifted=True)[0].shape == (0, 3)  # fmt: skip


def test_sums() -> None:
    held = FeatureLosses(registry())
    losses = torch.tensor([[1.0, 3.0], [5.0, float("nan")]])
    counts = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    ids = torch.tensor([[0, 4, -1], [0, 5, 1]])
    weights = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.5, 0.0]])
    assert held.add(losses, counts, ids, weights)
    found = held.take("cpu")
    # Weighted by tokens; a weight of 0 (swa) takes no part; what did not act is not there.
    assert found == {"language=hau": 3.0, "task=ner": 2.0, "task=pos": 5.0}
    assert held.take("cpu") == {}
    by_token = torch.tensor([[[0], [0], [1]], [[-1], [1], [1]]])
    assert held.add(losses, counts, by_token, None)  # shifted: one position fewer than ids
    assert held.take("cpu") == {"language=hau": 2.0}
    assert not held.add(losses, counts, torch.zeros(2, 5, 1, dtype=torch.long), None)
    assert not held.add(losses, counts, torch.zeros(3, 1, dtype=torch.long), None)
    assert held.add(
        losses[:0], counts[:0], ids[:0], weights[:0]
    )  # a process that is left without a row
    assert held.take("cpu") == {}
    doubled = FeatureLosses(registry())
    doubled.add(losses, counts, ids, weights)
    assert doubled.take("cpu", lambda t: 2 * t) == found


def by_feature(entry: dict[str, float], prefix: str = "loss/") -> dict[str, float]:
    return {k.removeprefix(prefix): v for k, v in entry.items() if k.startswith(prefix)}


def recomputed(model: Any, batches: list[Any], shift: bool) -> dict[str, float]:
    """By hand: every label's loss, given to the features of its row."""
    sums: dict[str, list[float]] = {}
    for batch in batches:
        with torch.no_grad():
            logits = model.eval()(**batch).logits
        labels = batch["labels"]
        for row in range(len(labels)):
            scores, wanted = (logits[row, :-1], labels[row, 1:]) if shift else (logits[row], labels[row])  # fmt: skip
            scores, wanted = scores.reshape(-1, scores.shape[-1]), wanted.reshape(-1)
            losses = F.cross_entropy(scores, wanted, reduction="none").tolist()
            for feature in batch["flix_features"][row].tolist():
                if feature >= 0:
                    name = "=".join(registry().features[feature])
                    sums.setdefault(name, []).extend(losses)
    return {name: sum(values) / len(values) for name, values in sums.items()}


class InOrder(FlixTrainer):
    """Trains on the rows in their order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)


@pytest.mark.parametrize("kind", ["class", "causal", "seq2seq"])
def test_logs(tmp_path: Path, kind: str) -> None:
    model = {"class": classifier, "causal": llama, "seq2seq": t5}[kind](feature_dropout=None)
    data = dataset(12, "class" if kind == "class" else "tokens")
    made = trainer(
        tmp_path,
        model,
        data,
        eval_dataset=data,
        max_steps=4,
        logging_steps=2,
        learning_rate=0.0,
        cls=InOrder,
    )
    batches = list(made.get_eval_dataloader())
    wanted = recomputed(model, batches, kind == "causal")
    found = by_feature(made.evaluate(), "eval_loss/")
    assert found == pytest.approx(wanted, rel=1e-4)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    made.train()
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry, half in zip(logs, (slice(0, 6), slice(6, 12)), strict=True):
        part = trainer(tmp_path, model, data.select(range(12)[half]), eval_dataset=data.select(range(12)[half]))  # fmt: skip
        mine = recomputed(model, list(part.get_eval_dataloader()), kind == "causal")
        assert by_feature(entry) == pytest.approx(mine, rel=1e-4)
        # The mean over a group that every row names, weighted by its rows, is the loss itself.
        # (Older releases divide the sum of a causal model's losses by one label a row too many.)
        whole = sum(by_feature(entry)[f"task={task}"] for task in ("ner", "pos")) / 2
        if kind != "causal" or hasattr(made, "_loss_shifts_labels"):
            assert whole == pytest.approx(entry["loss"], rel=1e-4)


def test_packed_logs(tmp_path: Path) -> None:
    model = llama(feature_dropout=None)
    model.config.use_cache = True  # the trainer switches it off: packed rows need it
    packed = pack([{**r, "language": r["language"] or "yor"} for r in rows(12, "tokens")], 14)
    collator = FlixCollator(model.flix_config, per_token=True)
    made = trainer(tmp_path, model, packed, collator, eval_dataset=packed, max_steps=2)
    made.train()
    found = by_feature(made.evaluate(), "eval_loss/")
    assert set(found) == {f"{g}={n}" for g, n in registry().features}
    one = FlixCollator(model.flix_config)
    flat = [one([{k: v for k, v in r.items() if k != "text"}]) for r in [{**r, "language": r["language"] or "yor"} for r in rows(12, "tokens")]]  # fmt: skip
    assert found == pytest.approx(recomputed(model, flat, True), rel=1e-3)


def test_option_and_unusual_models(tmp_path: Path) -> None:
    quiet = trainer(tmp_path, max_steps=1, loss_by_feature=False, eval_dataset=dataset(4))
    quiet.train()
    assert not any("loss/" in key for entry in quiet.state.log_history for key in entry)
    assert not by_feature(quiet.evaluate(), "eval_loss/")

    class Own(type(quiet)):  # type: ignore[misc]
        def row_losses(self, inputs: Any, outputs: Any) -> Any:
            return torch.full((len(inputs["labels"]),), 2.5), torch.ones(len(inputs["labels"]))

    own = trainer(tmp_path, cls=Own, max_steps=1)
    own.train()
    logged = by_feature(own.state.log_history[0])
    assert logged and set(logged.values()) == {2.5}


def test_seq2seq_generates_under_its_features(tmp_path: Path) -> None:
    """predict_with_generate gives each row the tokens that it gets alone."""
    from tests.helpers.torch import randomize

    model = t5(feature_dropout=None)
    randomize(model, std=0.5)
    data = dataset(6, "tokens")
    made = trainer(
        tmp_path,
        model,
        data,
        cls=FlixSeq2SeqTrainer,
        arguments_class=transformers.Seq2SeqTrainingArguments,
        predict_with_generate=True,
        generation_max_length=8,
    )
    found = made.predict(data)
    collate = FlixCollator(model.flix_config)
    outputs = []
    for row in rows(6, "tokens"):
        batch = collate([{k: v for k, v in row.items() if k not in ("text", "labels")}])
        outputs.append(model.generate(**batch, max_length=8)[0].tolist())
    assert [[t for t in p.tolist() if t >= 0][: len(o)] for p, o in zip(found.predictions, outputs, strict=True)] == outputs  # fmt: skip
    assert len({tuple(o) for o in outputs}) > 1
    made.train()
