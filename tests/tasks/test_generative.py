"""Tasks whose answers are written: tokens, labels, what is cut, and answers in mixed batches."""

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
    interval,
    load_base,
    load_tokenizer,
    make_task,
    packed,
    scores,
    unknown_notes,
)
from flix.tasks.task import IGNORED
from flix.transformers import FlixCollator
from tests.helpers.tasks import CHAT, collator_of, config_of

ROWS: list[dict[str, Any]] = [
    {"source": "gida", "target": "n0", "language": "hau", "task": "ner"},
    {"source": "nyumba kubwa", "target": "t11", "language": "swa", "task": "topic"},
    {"source": "", "target": "n2", "language": ["hau", "swa"], "task": "ner"},
]
PROMPT = "{task}/{language}: {source}"
KINDS = ["seq2seq", "causal"]


def task_of(kind: str, **settings: Any) -> Any:
    return make_task(kind, ByT5Tokenizer(), name="mixed", prompt=PROMPT, **settings)


def chat_tokenizer(template: str = CHAT) -> Any:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_seq2seq_reads_the_prompt_and_writes_the_target() -> None:
    tokenizer = ByT5Tokenizer()
    batch = TaskCollator([task_of("seq2seq")], tokenizer)(ROWS)
    for row, asked in enumerate(("ner/hau: gida", "topic/swa: nyumba kubwa", "ner/hau+swa: ")):
        length = int(batch["attention_mask"][row].sum())
        assert tokenizer.decode(batch["input_ids"][row, :length]) == asked + "</s>"
        labels = batch["labels"][row]
        assert tokenizer.decode(labels[labels != IGNORED]) == ROWS[row]["target"] + "</s>"


def test_causal_labels_cover_the_target_alone() -> None:
    tokenizer = ByT5Tokenizer()
    collate = TaskCollator([task_of("causal")], tokenizer)
    batch, prompts = collate(ROWS), collate.prompts()(ROWS)
    for row, asked in enumerate(("ner/hau: gida", "topic/swa: nyumba kubwa", "ner/hau+swa: ")):
        ids = batch["input_ids"][row, : int(batch["attention_mask"][row].sum())]
        assert tokenizer.decode(ids) == asked + ROWS[row]["target"] + "</s>"
        labels = batch["labels"][row]
        assert tokenizer.decode(labels[labels != IGNORED]) == ROWS[row]["target"] + "</s>"
        kept = prompts["attention_mask"][row].bool()
        assert kept[-1] and tokenizer.decode(prompts["input_ids"][row][kept]) == asked
    assert "labels" not in prompts


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_cut(kind: str) -> None:
    task = task_of(kind, max_source=5, max_target=2)
    row = {**ROWS[0], "target": "abcdef"}
    whole = ByT5Tokenizer()("ner/hau: gida").input_ids
    asked, read = task.prompt(row)["input_ids"], task.read(row)
    assert asked == ([*whole[:4], 1] if kind == "seq2seq" else whole[-6:-1])
    labels = [label for label in read["labels"] if label != IGNORED]
    assert labels == ByT5Tokenizer()("a").input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_source_and_target_are_texts(kind: str) -> None:
    task = make_task(kind, ByT5Tokenizer(), name="bare")
    row = {"source": "", "target": ""}
    assert len(task.prompt(row)["input_ids"]) == 1
    assert [i for i in task.read(row)["labels"] if i != IGNORED] == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_row_lacks_is_said(kind: str) -> None:
    task = task_of(kind)
    row = {"sorce": "a", "target": "b", "language": "hau", "task": "ner", "flix_where": "a.jsonl:3"}
    with pytest.raises(
        DataError, match=r"a.jsonl:3: prompt .* needs 'source' .did you mean 'sorce'"
    ):
        task.read(row)
    with pytest.raises(DataError, match=r"a.jsonl:3: no column 'source' .*it has: sorce, target"):
        make_task(kind, ByT5Tokenizer(), name="bare").read(row)
    with pytest.raises(DataError, match=r"column 'target' must hold text, got \['b'\]"):
        task.read({**ROWS[0], "target": ["b"]})
    with pytest.raises(DataError, match="column 'target' holds nothing"):
        task.read({**ROWS[0], "target": None})
    with pytest.raises(DataError, match="a single '}'"):
        make_task(kind, ByT5Tokenizer(), name="x", prompt="{source}}").read(ROWS[0])
    with pytest.raises(DataError, match="flix_task must be a number from 0 to 0, got 1"):
        TaskCollator([task], ByT5Tokenizer())([{**ROWS[0], "flix_task": 1}])


def test_numbers_are_text_and_braces_are_braces() -> None:
    task = make_task("seq2seq", ByT5Tokenizer(), name="x", prompt="{{{source}}}")
    row = {"source": 3, "target": 0.5}
    assert task.tokenizer.decode(task.prompt(row)["input_ids"][:-1]) == "{3}"
    assert task.example(row) == ("3", "0.5")


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_another_model_is_refused(kind: str) -> None:
    with pytest.raises(DataError, match="do not belong together"):
        task_of(kind, vocabulary=20).read(ROWS[0])


def test_wrong_tasks_are_refused() -> None:
    with pytest.raises(
        flix.ConfigError, match=r"no kind 'seqseq' .did you mean 'seq2seq'.*: seq2seq, causal"
    ):
        task_of("seqseq")
    with pytest.raises(flix.ConfigError, match="seq2seq has no column 'messages'"):
        task_of("seq2seq", columns={"messages": "talk"})
    with pytest.raises(flix.ConfigError, match=r"causal has no column 'sorce' .did you mean"):
        task_of("causal", columns={"sorce": "a"})
    with pytest.raises(flix.ConfigError, match="seq2seq has no labels"):
        task_of("seq2seq", labels=["a"])
    with pytest.raises(flix.ConfigError, match="max_source must be a whole number of 2 or more"):
        task_of("seq2seq", max_source=1)
    with pytest.raises(flix.ConfigError, match="seq2seq and causal cannot be combined"):
        TaskCollator([task_of("seq2seq"), task_of("causal")], ByT5Tokenizer())
    with pytest.raises(flix.ConfigError, match="a model needs a task"):
        TaskCollator([], ByT5Tokenizer())


TALK = [
    {"role": "user", "content": "ina kwana"},
    {"role": "assistant", "content": "lafiya"},
    {"role": "user", "content": "gida?"},
    {"role": "assistant", "content": "nyumba"},
]


def test_every_turn_of_the_assistant_is_learned() -> None:
    tokenizer = chat_tokenizer()
    task = make_task("causal", tokenizer, name="chat", columns={"messages": "talk"})
    read = task.read({"talk": TALK})
    assert (
        tokenizer.decode(read["input_ids"])
        == "<user>ina kwana|<assistant>lafiya</s><user>gida?|<assistant>nyumba</s>"
    )
    kept = [i for i, label in zip(read["input_ids"], read["labels"], strict=True) if label == i]
    assert tokenizer.decode(kept) == "lafiya</s>nyumba</s>"
    assert all(label in (IGNORED, i) for i, label in zip(read["input_ids"], read["labels"], strict=True))  # fmt: skip
    prompt = tokenizer.decode(task.prompt({"talk": TALK})["input_ids"])
    assert prompt == "<user>ina kwana|<assistant>lafiya</s><user>gida?|<assistant>"
    assert task.example({"talk": TALK}) == (
        "user: ina kwana\nassistant: lafiya\nuser: gida?",
        "nyumba",
    )
    open_talk = {"talk": TALK[:3]}
    assert task.example(open_talk)[1] is None and not task.answered(open_talk)
    assert task.prompt(open_talk) == task.prompt({"talk": TALK})


def test_a_long_conversation_keeps_its_end() -> None:
    tokenizer = chat_tokenizer()
    task = make_task("causal", tokenizer, name="chat", columns={"messages": "talk"}, max_source=10, max_target=4)  # fmt: skip
    read = task.read({"talk": TALK})
    assert tokenizer.decode(read["input_ids"]) == "istant>nyumba</s>"
    assert len(read["input_ids"]) == len(read["labels"]) == 14
    learned = [i for i in read["labels"] if i != IGNORED]
    assert tokenizer.decode(learned) == "nyumba</s>" and read["input_ids"][-7:] == learned


def test_conversations_that_cannot_be_learned_are_refused() -> None:
    bare = ByT5Tokenizer()
    with pytest.raises(ModelError, match=r"no chat template.*chat or instruct version"):
        make_task("causal", bare, name="chat", columns={"messages": "talk"})
    with pytest.raises(flix.ConfigError, match="messages: and prompt: exclude each other"):
        make_task("causal", bare, name="chat", columns={"messages": "talk"}, prompt="{talk}")
    task = make_task("causal", chat_tokenizer(), name="chat", columns={"messages": "talk"})
    for value, said in (
        ("hello", "must hold a list of messages"),
        ([], "must hold a list of messages"),
        ([{"role": "user"}], "message 0 must be"),
        ([{"role": "user", "content": None}], "column 'talk\\[0\\]' must hold text, got None"),
        (TALK[:1], "no turn of the assistant"),
    ):
        with pytest.raises(DataError, match=said):
            task.read({"talk": value})
    # A template that leaves out what the assistant thought once the conversation goes on.
    forgetful = chat_tokenizer(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] if loop.last else '...' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    task = make_task("causal", forgetful, name="chat", columns={"messages": "talk"})
    with pytest.raises(DataError, match="writes a conversation differently once it goes on"):
        task.read({"talk": TALK})
    strict = chat_tokenizer("{{ raise_exception('no system role here') }}")
    task = make_task("causal", strict, name="chat", columns={"messages": "talk"})
    with pytest.raises(DataError, match=r"the chat template refuses .*no system role here"):
        task.read({"talk": TALK})


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_mixed_batches_are_those_of_each_row_alone(
    writers: dict[str, Path], kind: str
) -> None:
    folder = str(writers["t5" if kind == "seq2seq" else "llama"])
    tokenizer = load_tokenizer(folder)
    task = make_task(kind, tokenizer, name="mixed", prompt=PROMPT)
    model = load_base(folder, [task])
    torch.manual_seed(1)
    model = adapt(model, config_of())
    with torch.no_grad():
        for parameter in model.flix_bank.parameters():
            parameter.normal_(0, 1)
    collator = collator_of(model.flix_config, TaskCollator([task], tokenizer))
    rows = [{**row, "source": row["source"] * n} for n in (1, 3) for row in ROWS]
    told: list[int] = []
    model.train()
    found = answers(model, [task], rows, collator, batch_size=4, max_new_tokens=6, on_progress=told.append)  # fmt: skip
    assert told == [4, 6] and model.training
    alone = [answers(model, [task], [row], collator, max_new_tokens=6)[0] for row in rows]
    assert found == alone
    assert len({answer.output for answer in found}) > 1
    assert [a.source for a in found] == [row["source"] for row in rows]
    # transformers' own way, for one of them.
    routing = model.flix_config.registry.encode([{"language": "swa", "task": "topic"}])
    ids = torch.tensor([task.prompt(rows[1])["input_ids"]])
    model.eval()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), flix_features=routing, max_new_tokens=6, do_sample=False, pad_token_id=0)  # fmt: skip
    out = out if kind == "seq2seq" else out[:, ids.shape[1] :]
    assert tokenizer.decode(out[0], skip_special_tokens=True).strip() == found[1].output
    # Without a target there is an answer, and no right or wrong.
    bare = [{key: value for key, value in row.items() if key != "target"} for row in rows]
    unscored = answers(model, [task], bare, collator, max_new_tokens=6)
    assert [a.output for a in unscored] == [a.output for a in found]
    assert {(a.target, a.right) for a in unscored} == {(None, None)}
    with pytest.raises(DataError, match="answer 0 cannot be scored"):
        scores(kind, unscored)
    with pytest.raises(flix.ConfigError, match="needs a FlixCollator around a TaskCollator"):
        answers(model, [task], rows, FlixCollator(model.flix_config))
    assert answers(model, [task], [], collator) == []
    with pytest.raises(flix.ConfigError, match="the tasks that its collator was made with"):
        answers(model, [task, task], rows, collator)
    with pytest.raises(
        DataError, match=r"task 'mixed', the row whose text is 'a{50,}\.\.\.: no column"
    ):
        task.read({"text": "a" * 500})


def test_scores_of_written_answers() -> None:
    from flix.tasks import Answer

    found = [Answer("a", "b ", "b", True), Answer("a", "cd", "ce", False)]
    assert list(scores("seq2seq", found)) == ["exact_match", "chrf"]
    assert scores("seq2seq", found)["exact_match"] == 50.0
    assert 0 < scores("causal", found)["chrf"] < 100
    with pytest.raises(DataError, match="no answers to score"):
        scores("seq2seq", [])
    many = [Answer("a", "b", "b", i % 4 == 0) for i in range(400)]
    low, high = interval("seq2seq", many, seed=1)
    # The normal approximation: 25 percent, give or take 1.96 standard errors of 2.165.
    assert low == pytest.approx(25 - 4.24, abs=0.6) and high == pytest.approx(25 + 4.24, abs=0.6)
    assert interval("seq2seq", many, seed=1) == (low, high)
    odd = many[:37]
    assert len({interval("seq2seq", odd, seed=seed) for seed in range(4)}) > 1


def test_packed_rows_have_the_losses_of_rows_alone(writers: dict[str, Path]) -> None:
    folder = str(writers["llama"])
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = CHAT
    tasks = [
        make_task("causal", tokenizer, name="ner", prompt=PROMPT),
        make_task("causal", tokenizer, name="chat", columns={"messages": "talk"}),
    ]
    model = adapt(load_base(folder, tasks), config_of())
    with torch.no_grad():
        for parameter in model.flix_bank.parameters():
            parameter.normal_(0, 0.3)
    rows: list[dict[str, Any]] = [{**row, "flix_task": 0} for row in ROWS]
    rows.append({"talk": TALK, "language": "swa", "task": "topic", "flix_task": 1})
    joined = packed(tasks, rows, ["language", "task"], 96)
    assert len(joined) < len(rows) and {len(row["input_ids"]) for row in joined} == {96}
    inner = TaskCollator(tasks, tokenizer)
    dense = FlixCollator(model.flix_config, inner, per_token=True, feature_dropout=None)(joined)
    assert "attention_mask" not in dense
    model.config.use_cache = False

    def summed(batch: Any) -> float:
        labels = batch["labels"]
        counted = int((labels[:, 1:] != IGNORED).sum())
        return float(model(**batch).loss.detach()) * counted

    alone = collator_of(model.flix_config, inner)
    expected = sum(summed(alone([row])) for row in rows)
    assert summed(dense) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(DataError, match="tokens do not fit in packed rows of 12"):
        packed(tasks, rows, ["language", "task"], 12)
    with pytest.raises(flix.ConfigError, match="packing is for causal tasks, not seq2seq"):
        packed([task_of("seq2seq")], rows, ["language"], 64)
    assert packed(tasks, [], ["language"], 64) == []


def test_targets_that_the_tokenizer_has_no_tokens_for() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "n0", "n1"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")  # fmt: skip
    task = make_task("seq2seq", tokenizer, name="ner")
    rows = [{"source": "a", "target": text} for text in ("n0", "n1", "n0 p", "n1")]
    (note,) = unknown_notes([task], rows, ["x"] * 3 + ["y"])
    assert "in 1 of 3 targets of x that were checked, such as 'n0 p'" in note
    with pytest.raises(DataError, match=r"no token for the targets of x: .*such as 'p'"):
        unknown_notes([task], [{"source": "a", "target": "p"}], ["x"])
    assert len(unknown_notes([task], [{"source": "a", "target": "p"}], ["x"], refuse=False)) == 1
    assert unknown_notes([task_of("seq2seq")], ROWS, ["x"] * 3) == []


def test_a_base_of_the_other_kind_is_refused(writers: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="is seq2seq, not causal; say kind: seq2seq"):
        load_base(str(writers["t5"]), [task_of("causal")])
    with pytest.raises(ModelError, match=r"the base model .* cannot be loaded"):
        load_base(str(writers["t5"].parent), [task_of("causal")])
