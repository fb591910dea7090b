"""Rows of classification, regression and tagging: labels, words that are lost, and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer

import flix
from flix.backends.torch import adapt
from flix.tasks import (
    DataError,
    ModelError,
    TaskCollator,
    answers,
    collect_labels,
    label_notes,
    load_base,
    make_task,
    train_heads,
    unknown_notes,
)
from flix.tasks.task import IGNORED
from tests.helpers.tasks import (
    HEADED_ROWS,
    collator_of,
    config_of,
    headed_tasks,
    piece_tokenizer,
    shaken,
)

NER, TOPIC, RATE, TEXT = headed_tasks(piece_tokenizer())


def test_tags_stand_at_each_words_first_piece() -> None:
    tokenizer = piece_tokenizer()
    read = NER.read(HEADED_ROWS[0])
    pieces = tokenizer.convert_ids_to_tokens(read["input_ids"])
    assert pieces == ["[CLS]", "ga", "##da", "b", "##a", "x", "##y", "##z", "[SEP]"]
    assert read["labels"] == [
        IGNORED,
        1,
        IGNORED,
        2,
        IGNORED,
        3,
        IGNORED,
        IGNORED,
        IGNORED,
    ]
    assert NER.prompt(HEADED_ROWS[0])["first"] == [1, 3, 5]
    assert NER.example(HEADED_ROWS[0]) == ("gada ba xyz", "B-PER I-PER O")


def test_words_that_are_lost_have_no_place() -> None:
    (short, *_) = headed_tasks(piece_tokenizer(), max_source=5)
    assert short.prompt(HEADED_ROWS[0])["first"] == [1, 3, None]
    assert [i for i in short.read(HEADED_ROWS[0])["labels"] if i != IGNORED] == [1, 2]
    # Words of which the tokenizer makes nothing, and rows without words.
    row = {"tokens": ["", "ba", " "], "tags": ["O", "O", "O"]}
    assert NER.prompt(row)["first"] == [None, 1, None]
    assert NER.prompt({"tokens": [], "tags": []}) == {"input_ids": [2, 3], "first": []}
    # What the tokenizer says of its model counts, too.
    tokenizer = piece_tokenizer()
    tokenizer.model_max_length = 4
    (capped, *_) = headed_tasks(tokenizer)
    assert len(capped.read(HEADED_ROWS[0])["input_ids"]) == 4


def test_byte_level_tokenizers_read_words_as_words() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghij"
    vocabulary = {piece: place for place, piece in enumerate(["Ġ", *letters, *("Ġ" + c for c in letters)])}  # fmt: skip
    merges = [("Ġ", c) for c in letters]
    for prefix in (False, True):
        inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
        task = make_task("tagging", tokenizer, name="ner", labels=["O"])
        read = task.prompt({"tokens": ["ab", "c", "dab"]})
        assert read["input_ids"] == tokenizer("ab c dab")["input_ids"]
        assert read["first"] == [0, 2, 3]


def test_labels_are_names() -> None:
    row = {"text": "ga", "target": "sport", "flix_where": "topic.jsonl:4"}
    assert TOPIC.read(row) == {"input_ids": [2, 55 + 2, 3], "labels": [1, IGNORED, IGNORED]}
    with pytest.raises(
        DataError, match=r"topic.jsonl:4: task 'topic' has no label 'sprot' .did you mean 'sport'"
    ):
        TOPIC.read({**row, "target": "sprot"})
    with pytest.raises(DataError, match=r"task 'ner' has no label 'X'.*B-LOC, B-PER"):
        NER.read({"tokens": ["a"], "tags": ["X"]})
    with pytest.raises(
        DataError,
        match=r"a.jsonl:2: 2 words in 'tokens' and 1 tags in 'tags'; each word has one tag",
    ):
        NER.read({"tokens": ["a", "b"], "tags": ["O"], "flix_where": "a.jsonl:2"})
    with pytest.raises(DataError, match=r"column 'tokens' must hold a list of texts, got 'a b'"):
        NER.read({"tokens": "a b", "tags": ["O"]})
    with pytest.raises(DataError, match=r"no column 'tags' .*did you mean 'tag'"):
        NER.read({"tokens": ["a"], "tag": ["O"]})
    rows = [{"target": 2}, {"target": "10"}, {"target": True}, {"target": "é"}]
    assert collect_labels("classification", rows) == ("10", "2", "true", "é")
    tagged = [{"words": ["a"], "t": ["O"]}, {"words": [], "t": []}, {"words": ["b"], "t": ["B-X"]}]
    assert collect_labels("tagging", tagged, {"t": "t", "tags": "t"}) == ("B-X", "O")
    assert collect_labels("regression", [{"target": 1}]) == ()
    with pytest.raises(DataError, match="column 'target' holds nothing"):
        collect_labels("classification", [{"target": None}])


def test_numbers_are_finite() -> None:
    assert RATE.read({"text": "ga", "target": "1e1"})["value"] == 10.0
    assert RATE.example({"text": "ga", "target": 0.25}) == ("ga", "0.25")
    for value in (float("nan"), "inf", "many", True, [1.0]):
        with pytest.raises(DataError, match="column 'target' must hold a finite number"):
            RATE.read({"text": "ga", "target": value})


@pytest.mark.parametrize("task", [TOPIC, RATE, TEXT])
def test_prompts_are_templates(task: Any) -> None:
    source = {} if task.kind == "masked" else {"target": "target"}
    labels = ["news", "sport"] if task.kind == "classification" else None
    made = make_task(task.kind, piece_tokenizer(), name="x", columns={"source": "text", **source}, prompt="{language} {text}", labels=labels)  # fmt: skip
    read = made.prompt({"text": "ga", "language": ["a", "b"]})["input_ids"]
    assert piece_tokenizer().convert_ids_to_tokens(read) == ["[CLS]", "a", "[UNK]", "b", "ga", "[SEP]"]  # fmt: skip


def test_tasks_that_cannot_be_are_refused() -> None:
    pieces = piece_tokenizer()
    with pytest.raises(
        ModelError,
        match=r"tagging needs a tokenizer that says which word .*ByT5Tokenizer.*does not",
    ):
        make_task("tagging", ByT5Tokenizer(), name="ner", labels=["O"])
    with pytest.raises(ModelError, match="the tokenizer has no mask token"):
        make_task("masked", ByT5Tokenizer(), name="text")
    with pytest.raises(flix.ConfigError, match="tagging needs the list of its labels"):
        make_task("tagging", pieces, name="ner")
    with pytest.raises(flix.ConfigError, match="classification needs the list of its labels"):
        make_task("classification", pieces, name="t", labels=[])
    with pytest.raises(flix.ConfigError, match=r"labels are names, each once; got 'a' in \['a', 'a'\]"):  # fmt: skip
        make_task("classification", pieces, name="t", labels=["a", "a"])
    with pytest.raises(flix.ConfigError, match="labels are names, each once; got 1"):
        make_task("classification", pieces, name="t", labels=[1])  # type: ignore[list-item]
    with pytest.raises(flix.ConfigError, match="regression has no labels"):
        make_task("regression", pieces, name="t", labels=["a"])
    with pytest.raises(flix.ConfigError, match="masked has no column 'target'"):
        make_task("masked", pieces, name="t", columns={"target": "x"})
    with pytest.raises(flix.ConfigError, match="takes no prompt"):
        make_task("tagging", pieces, name="t", labels=["O"], prompt="{tokens}")
    for task in (NER, TOPIC, RATE, TEXT):
        again = {**task.described(), "tokenizer": pieces}
        made = make_task(again.pop("kind"), again.pop("tokenizer"), **again)
        assert made == task


def test_a_tokenizer_of_another_model_is_refused() -> None:
    rows = {row["flix_task"]: row for row in HEADED_ROWS}
    for number, task in enumerate(headed_tasks(piece_tokenizer(), vocabulary=6)):
        with pytest.raises(DataError, match="do not belong together"):
            task.read(rows[number])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_answers_are_what_the_heads_say(encoders: dict[str, Path], kind: str) -> None:
    from flix.tasks import load_tokenizer

    tokenizer = load_tokenizer(str(encoders[kind]))
    tasks = headed_tasks(tokenizer, masked=kind == "bert", max_source=6)
    torch.manual_seed(1)
    model = train_heads(shaken(adapt(load_base(str(encoders[kind]), tasks), config_of())))
    rows = [row for row in HEADED_ROWS if row["flix_task"] < len(tasks)]
    collate = collator_of(config_of(), TaskCollator(tasks, tokenizer))
    found = answers(model, tasks, rows, collate, batch_size=3)
    alone = [answers(model, tasks, [row], collate)[0] for row in rows]
    for one, other in zip(found, alone, strict=True):
        assert (one.output, one.target, one.right) == (other.output, other.target, other.right)
    model.eval()
    out = model(**collate.evaluation()(rows))
    for place, (row, answer) in enumerate(zip(rows, found, strict=True)):
        task, logits = tasks[row["flix_task"]], out.logits[place].detach()
        if task.kind == "classification":
            chances = torch.softmax(logits[0, :2], -1).tolist()
            assert answer.detail["probabilities"] == pytest.approx(dict(zip(task.labels, chances, strict=True)), abs=1e-5)  # fmt: skip
            assert answer.output == task.labels[int(chances[1] > chances[0])]
            assert answer.right == (answer.output == row["target"])
        elif task.kind == "regression":
            assert answer.detail == {"value": pytest.approx(float(logits[0, 0]), abs=1e-5), "wanted": row["target"]}  # fmt: skip
            assert float(answer.output) == pytest.approx(answer.detail["value"], rel=1e-4)
            assert answer.right is None and answer.target == f"{row['target']:g}"
        elif task.kind == "tagging":
            first = task.prompt(row)["first"]
            said = [None if p is None else task.labels[int(logits[p, :4].argmax())] for p in first]
            assert answer.detail["tags"] == said and answer.detail["wanted"] == row["tags"]
            assert answer.detail["lost"] == said.count(None)
            assert answer.output == " ".join(tag or "?" for tag in said)
        else:
            labels = collate.evaluation()(rows)["labels"][place]
            kept = labels != IGNORED
            right = int((out.predicted[place][kept] == labels[kept]).sum())
            assert answer.detail["right"] == right and answer.detail["masked"] == int(kept.sum())
            assert answer.detail["loss"] == pytest.approx(float(out.row_losses[place].detach()) * int(kept.sum()), rel=1e-4)  # fmt: skip
            assert answer.target == tokenizer.decode(labels[kept])
    # Rows that do not say what is wanted are answered.
    bare = [{k: v for k, v in row.items() if k not in ("target", "tags")} for row in rows]
    asked = answers(model, tasks, bare, collate, batch_size=3)
    assert [a.output for a in asked] == [a.output for a in found]
    assert all(a.right is None for a in asked)
    assert all((a.target is None) == (tasks[r["flix_task"]].kind != "masked") for r, a in zip(rows, asked, strict=True))  # fmt: skip


def test_what_the_data_lack_is_said() -> None:
    tasks = [NER, TOPIC, RATE, TEXT]
    rows = HEADED_ROWS
    cells = [row["task"] for row in rows]
    assert unknown_notes(tasks, rows, cells) == []
    amharic = [{"text": "ሰላም ለዓለም", "target": "news", "flix_task": 1}, HEADED_ROWS[1]]
    (note,) = unknown_notes(tasks, amharic, ["amh", "swa"])
    assert "reads 2 of 4 pieces of amh as unknown, in 1 rows that were checked" in note
    short = headed_tasks(piece_tokenizer(), max_source=5)
    (note,) = unknown_notes(short, rows[:1] + rows[6:], ["ner", "ner"])
    assert note == (
        "task 'ner': words beyond the 5 tokens that are read, or of which the tokenizer makes nothing, get no tag and count "
        "as wrong: of ner 20.0 %"
    )
    # Labels that nobody can learn.
    notes = label_notes(NER, {"B-PER", "O"}, {"I-PER", "O"})
    assert notes == [
        "task 'ner': no training row has the labels I-PER, which evaluation rows have; they will be answered wrongly",
        "task 'ner': no row has the labels B-LOC",
    ]
    assert label_notes(TOPIC, {"news", "sport"}, set()) == label_notes(RATE, set(), set()) == []
