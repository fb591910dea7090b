"""The base: its size, its batches, and what its record says."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.gpu_study import pretraining
from benchmarks.gpu_study.lines import Blocks
from benchmarks.gpu_study.pretraining import LEAST, MOST, SIZE, TINY, Pretraining, parameters_of
from benchmarks.gpu_study.words import Unlabelled
from flix.core.errors import TrainingError
from flix.study.words import Pair
from tools.pretrain import BUFFERED
from tools.tokens import IGNORED, decode

ROWS = {
    "deu": (Pair("Ha_s g_hen", "Haus gehen"), Pair("sch_n", "schön")),
    "kat": (Pair("დ_და", "დედა"),),
}
DATA = Unlabelled(ROWS, "0" * 64, 7)


def test_the_base_has_10_to_30_million_parameters():
    assert LEAST <= parameters_of(SIZE) <= MOST
    assert parameters_of(TINY) < 100_000


def blocks(seed=0, steps=40, batch=3):
    return Blocks(DATA.words(), ROWS, seed, steps, batch)


def test_batches_follow_from_the_seed_and_the_number_of_the_block():
    made = blocks()
    assert len(made) == 3 and len(made[0]) == BUFFERED
    for number in (0, 2):
        for one, other in zip(made[number], blocks()[number], strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert not np.array_equal(made[0][0][0], blocks(seed=1)[0][0][0])
    with pytest.raises(IndexError):
        made[3]


def test_lines_hold_words_of_the_rows_alone_numbers_aside(monkeypatch):
    from benchmarks.gpu_study import lines

    monkeypatch.setattr(lines, "denoising_pair", lambda line, rng: (lines.ids_of(line),) * 2)
    known = {"".join(sorted(w.lower())) for words in DATA.words().values() for w in words}
    seen = set()
    for source, labels in blocks(steps=160)[5]:
        texts = decode(np.where(labels == IGNORED, 0, labels))
        assert len(texts) == len(decode(source)) == 3
        seen |= {word.strip(",") for text in texts for word in text.split(" ")}
    parts = {part for word in seen for part in word.split("-") if not part.isdigit()}
    assert {"".join(sorted(part.lower())) for part in parts} <= known
    assert "დედა" in seen


def small(seconds=60.0, **more):
    return Pretraining(DATA, seconds, device="cpu", size=TINY, workers=0, batch=2, **more)


def test_a_base_is_saved_with_what_was_done(tmp_path):
    record = small(steps=3).run(tmp_path)
    json.dumps(record)
    assert record["steps"] == record["planned"] == 3 and record["tokens"] > 0
    assert record["parameters"] == parameters_of(TINY) and record["words"] == 4
    assert record["languages"] == ["deu", "kat"] and record["data"] == DATA.digest
    from flix.tasks import load_tokenizer

    assert load_tokenizer(str(tmp_path))("ა")["input_ids"] == [228, 134, 147, 1]
    again = small(steps=3).run(tmp_path / "again")
    assert again["loss"] == record["loss"]
    files = [folder / "model.safetensors" for folder in (tmp_path, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_time_bounds_the_steps_and_the_rate_falls_to_its_end(monkeypatch):
    clock = iter(np.arange(0.0, 1e6, 1.0))
    monkeypatch.setattr(pretraining.time, "monotonic", lambda: float(next(clock)))
    rates = []

    def noted(*given):
        rates.append(learning_rate(*given))
        return rates[-1]

    learning_rate = pretraining.learning_rate
    monkeypatch.setattr(pretraining, "learning_rate", noted)
    _, found = small()._trained(steps=1000, seconds=20.0)
    assert 10 <= found["steps"] < 25 and found["steps"] == len(rates)
    assert max(rates) > 5 * rates[-1]


def test_as_many_steps_are_planned_as_fit(monkeypatch):
    found = {"seconds_a_step": 0.5}
    monkeypatch.setattr(Pretraining, "_trained", lambda self, steps, seconds: (None, found))
    monkeypatch.setattr(pretraining.time, "monotonic", lambda: 110.0)
    assert small(100.0)._fitting(began=100.0) == int(0.97 * 90 / 0.5)


def test_a_loss_that_is_no_number_is_named():
    import torch

    with pytest.raises(TrainingError, match=r"the loss is nan at step 50; try a lower --pretr"):
        small()._logged(50, 100, [torch.tensor(float("nan"))])
