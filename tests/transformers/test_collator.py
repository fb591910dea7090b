"""FlixCollator: columns to routing, dropout by step, segments to routing by token."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import flix  # noqa: E402
from flix.backends.torch import adapt  # noqa: E402
from flix.transformers import FlixCollator, pack  # noqa: E402
from tests.helpers.registry import registry  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.transformers import config, llama, row  # noqa: E402


def test_batches() -> None:
    rows = [
        row(),
        row(["swa", "yor"], None),
        row({"swa": 0.5, "yor": None, "hau": -2.0}, "pos"),
        row(None, None),
    ]
    before = repr(rows)
    batch = FlixCollator(registry())(rows)
    assert repr(rows) == before and set(batch) == {"input_ids", "flix_features", "flix_weights"}
    assert batch["flix_features"].dtype == torch.int64
    assert batch["flix_weights"].dtype == torch.float32
    wanted = registry().encode(
        [
            {"language": "hau", "task": "ner"},
            {"language": ["swa", "yor"]},
            {"language": {"swa": 0.5, "hau": -2.0}, "task": "pos"},
            {},
        ],
        width=4,
    )
    # Three features in a row are more than the usual two: twice as many entries.
    assert np.array_equal(batch["flix_features"].numpy(), wanted.ids)
    assert np.array_equal(batch["flix_weights"].numpy(), wanted.weights)


def test_width_is_fixed() -> None:
    collate = FlixCollator(registry())
    assert collate([row("hau", None)])["flix_features"].shape == (1, 2)
    assert collate([row(None, None)])["flix_features"].shape == (1, 2)
    assert collate([row(["hau", "swa", "yor"])])["flix_features"].shape == (1, 4)
    assert FlixCollator(registry(), width=3)([row()])["flix_features"].shape == (1, 3)
    with pytest.raises(flix.RoutingError, match=r"row 0: 3 features are active but width is 2"):
        FlixCollator(registry(), width=2)([row(["hau", "swa"])])


def test_the_base_collator_gets_the_rest() -> None:
    seen: list[Any] = []

    def base(rows: list[Any]) -> dict[str, Any]:
        seen.extend(rows)
        return {"made": len(rows)}

    batch = FlixCollator(registry(), base)([row(flix_row=(0, 0)), row()])
    assert seen == [{"input_ids": [1, 2, 3]}] * 2 and batch["made"] == 2
    assert batch["flix_features"].shape == (2, 2)


def tokenizer(folder: Any) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (folder / "vocab.txt").write_text("\n".join(words))
    return transformers.BertTokenizerFast(str(folder / "vocab.txt"))


@pytest.mark.parametrize("kind", ["padding", "token", "seq2seq"])
def test_with_the_collators_of_transformers(tmp_path: Any, kind: str) -> None:
    words = tokenizer(tmp_path)
    base = {
        "padding": transformers.DataCollatorWithPadding,
        "token": transformers.DataCollatorForTokenClassification,
        "seq2seq": transformers.DataCollatorForSeq2Seq,
    }[kind](words)
    collate = FlixCollator(registry(), base)
    assert collate.tokenizer is words
    labels = {} if kind == "padding" else {"labels": [1, 2]}
    long = {} if kind == "padding" else {"labels": [1, 2, 3, 4]}
    batch = collate([row(tokens=2, **labels), row("swa", tokens=4, **long)])
    assert batch["input_ids"].shape == (2, 4) and batch["attention_mask"].sum() == 6
    assert batch["flix_features"].tolist() == [[0, 4], [1, 4]]
    if labels:
        assert batch["labels"].shape == (2, 4)


def test_columns() -> None:
    collate = FlixCollator(registry(), columns={"language": "lang"})
    batch = collate([{"lang": "swa", "labels": 1}])
    assert batch["flix_features"].tolist() == [[1]] and batch["labels"].tolist() == [1]
    implied = flix.FeatureRegistry(
        {"language": ["hau", "fra"], "family": ["chadic", "romance"]},
        implies={("language", "hau"): [("family", "chadic")], ("language", "fra"): [("family", "romance")]},
    )  # fmt: skip
    # A group that languages bring along needs no column; one that is there is used.
    assert FlixCollator(implied)([{"language": "fra", "labels": 0}])["flix_features"].tolist() == [[1, 3, -1]]  # fmt: skip
    both = FlixCollator(implied)([{"language": "fra", "family": "chadic", "labels": 0}])
    assert both["flix_features"].tolist() == [[1, 2, 3]]
    with pytest.raises(flix.RoutingError, match="no feature column 'family'"):
        FlixCollator(implied, columns={"language": "language", "family": "family"})([{"language": "fra", "labels": 0}])  # fmt: skip


def test_unknown_features() -> None:
    with pytest.raises(flix.FeatureError, match=r"row 1: group 'language' has no feature 'swahili'"):  # fmt: skip
        FlixCollator(registry())([row(), row("swahili")])
    skip = FlixCollator(config(unknown="skip", feature_dropout=None))
    assert skip([row("xho")])["flix_features"].tolist() == [[4, -1]]
    strict = FlixCollator(config(unknown="skip", feature_dropout=None), unknown="error")
    with pytest.raises(flix.FeatureError):
        strict([row("xho")])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FlixCollator({"language": ["hau"]}), flix.ConfigError, "FlixConfig or a FeatureRegistry, got dict"),
        (lambda: FlixCollator(registry(), "x"), flix.ConfigError, "collator must be callable"),
        (lambda: FlixCollator(registry(), columns={"langage": "x"}), flix.FeatureError, "did you mean 'language'"),
        (lambda: FlixCollator(registry(), columns={"language": 1}), flix.ConfigError, "must be a name, got 1"),
        (lambda: FlixCollator(registry(), columns={}), flix.ConfigError, "columns must be"),
        (lambda: FlixCollator(registry(), width=0), flix.ConfigError, "width must be a whole number of 1 or more"),
        (lambda: FlixCollator(registry(), unknown="none"), flix.RoutingError, "unknown must be"),
        (lambda: FlixCollator(registry(), feature_dropout=0.2), flix.ConfigError, "must be a FeatureDropout"),
        (lambda: FlixCollator(registry(), feature_dropout=flix.FeatureDropout(per_group={"x": 0.1})), flix.FeatureError, "'x'"),
        (lambda: FlixCollator(registry())([("hau", 1)]), flix.RoutingError, "row 0.*mappings of columns, got tuple"),
        (lambda: FlixCollator(registry())([row(), {"language": "hau", "labels": 1}]), flix.RoutingError, "row 1 has no feature column 'task'"),
        (lambda: FlixCollator(registry())([{"langauge": "hau", "task": "ner"}]), flix.RoutingError, "did you mean 'langauge'"),
        (lambda: FlixCollator(registry())([{"labels": 1}]), flix.RoutingError, "none of the feature columns.*use FlixTrainer"),
        (lambda: FlixCollator(registry())([row(flix_features=[1])]), flix.RoutingError, "'flix_features' already"),
        (lambda: FlixCollator(registry())([row(3.0)]), flix.RoutingError, "row 0: group 'language' takes"),
    ],
)  # fmt: skip
def test_mistakes(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_dropout_by_step() -> None:
    rows = [row(["hau", "swa", "yor", "zul"][i % 4], ["ner", "pos"][i % 2]) for i in range(40)]
    collate = FlixCollator(config(), seed=9)
    plain = registry().encode([{"language": r["language"], "task": r["task"]} for r in rows])
    for step in (0, 3):
        wanted = flix.FeatureDropout(p=0.3)(plain, seed=9, step=step)
        found = collate(rows, step=step)
        assert np.array_equal(found["flix_features"].numpy(), wanted.ids)
        assert np.array_equal(found["flix_weights"].numpy(), wanted.weights)
        half = collate(rows[20:], step=step, first_row=20)["flix_features"]
        assert torch.equal(half, found["flix_features"][20:])
    mine = [{**r, "flix_row": (3, i)} for i, r in enumerate(rows)]
    assert torch.equal(collate(mine)["flix_features"], found["flix_features"])
    with pytest.raises(flix.RoutingError, match=r"row 0 does not carry its place.*evaluation\(\)"):
        collate(rows)
    calm = pickle.loads(pickle.dumps(collate.evaluation()))
    assert np.array_equal(calm(rows)["flix_features"].numpy(), plain.ids)
    assert collate.feature_dropout is not None
    off = FlixCollator(config(), feature_dropout=None)
    assert np.array_equal(off(rows)["flix_features"].numpy(), plain.ids)
    on = FlixCollator(registry(), feature_dropout=flix.FeatureDropout(p=1.0))
    assert (on(rows, step=0)["flix_features"] == -1).all()


def packed_rows() -> list[dict[str, Any]]:
    rows = [row("hau", "ner", 4), row(["swa", "yor"], "pos", 3), row("zul", None, 5), row("yor", "ner", 2)]  # fmt: skip
    return [{**r, "input_ids": [(5 * i + j) % 39 + 1 for j in range(len(r["input_ids"]))]} for i, r in enumerate(rows)]  # fmt: skip


def test_routing_by_token() -> None:
    rows = packed_rows()
    collate = FlixCollator(registry(), per_token=True)
    batch = collate(pack(rows, 8))
    ids, length = batch["flix_features"], 8
    assert ids.shape == (2, length, 4) and batch["flix_weights"].shape == ids.shape
    assert ids[0].tolist() == [[0, 4, -1, -1]] * 4 + [[1, 2, 5, -1]] * 3 + [[-1] * 4]
    assert ids[1, :5].tolist() == [[3, -1, -1, -1]] * 5
    assert "attention_mask" not in batch and batch["position_ids"].shape == (2, 8)
    # Segments told by a column of their own: code-switched text, whose positions go on.
    mixed = {"language": ["hau", "swa", "hau"], "task": ["pos"] * 3, "segments": [2, 1, 3], "input_ids": [1] * 6}  # fmt: skip
    found = collate([mixed])
    assert set(found) == {"input_ids", "flix_features", "flix_weights"}
    assert found["flix_features"][0, :, 0].tolist() == [0, 0, 1, 0, 0, 0]
    # A row that is not packed is one segment.
    assert collate([row("hau", "ner", 3)])["flix_features"].tolist() == [[[0, 4]] * 3]
    dropped = FlixCollator(registry(), per_token=True, feature_dropout=flix.FeatureDropout(p=0.5))
    masks = dropped(pack(rows, 8), step=1)["flix_features"]
    # A feature is dropped for all tokens of a row, or for none.
    for kept, all_ids in zip(masks, ids, strict=True):
        for feature in range(6):
            assert (kept == feature).sum() in (0, (all_ids == feature).sum())
    assert not torch.equal(masks, ids)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"language": ["hau"], "task": ["ner", "pos"], "segments": [1, 1], "input_ids": [1, 2]}], "row 0.*each of the row's 2 segments"),
        ([{"language": ["hau"] * 2, "task": ["ner"] * 2, "segments": [1, 1], "input_ids": [1, 2, 3]}], "segments of 2 tokens in all, but the batch is 3 long"),
        ([{"language": ["hau"] * 2, "task": ["ner"] * 2, "segments": [0, 2], "input_ids": [1, 2]}], "row 0: segments must be positive"),
        ([{"language": "hau", "task": "ner", "labels": 1}], "needs a batch with input_ids"),
    ],
)  # fmt: skip
def test_packing_mistakes(rows: Any, message: str) -> None:
    with pytest.raises(flix.RoutingError, match=message):
        FlixCollator(registry(), per_token=True)(rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logits_are_those_of_the_rows(attention: str) -> None:
    """Two packed rows of two segments each, against every row alone, at random weights of the pairs."""
    from tests.helpers.torch import randomize

    model = llama().double().eval()
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    randomize(model)
    rows = packed_rows()
    collate = FlixCollator(model.flix_config.registry, per_token=True)
    together = pack(rows, 8)
    batch = collate(together)
    with torch.no_grad():
        packed = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    alone: list[Any] = []
    single = FlixCollator(model.flix_config.registry)
    for each in rows:
        with torch.no_grad():
            alone.append(model(**single([each])).logits[0])
    places = [(0, 0, 4), (0, 4, 7), (1, 0, 5), (1, 5, 7)]
    for wanted, (where, begin, end) in zip(alone, places, strict=True):
        assert_close(packed[where, begin:end], wanted, dtype="float32")


def test_packed_gradients_are_those_of_the_rows() -> None:
    """The summed loss of packed rows has the gradients of the rows' summed losses."""
    from tests.helpers.torch import live_pairs, randomize

    rows = packed_rows()

    def gradients(batches: list[Any]) -> dict[str, Any]:
        model = llama(feature_dropout=None).double()
        model.config.use_cache = False
        randomize(model)
        for batch in batches:
            model(**batch, num_items_in_batch=torch.tensor(1)).loss.backward()
        return {n: p.grad for n, p in live_pairs(model).items() if p.grad is not None}

    single = FlixCollator(registry())
    apart = gradients([single([{**r, "labels": r["input_ids"]}]) for r in rows])
    whole = gradients([FlixCollator(registry(), per_token=True)(pack(rows, 8))])
    assert apart.keys() == whole.keys()
    for name, value in apart.items():
        assert_close(whole[name], value, dtype="float32")


def test_config_rules_reach_the_collator() -> None:
    model = adapt(torch.nn.Sequential(torch.nn.Linear(2, 2)), config())
    collate = FlixCollator(model.flix_config)
    assert collate.feature_dropout == flix.FeatureDropout(p=0.3) and collate.unknown == "error"
