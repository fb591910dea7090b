"""An adapted model in numbers, as people read them."""

from __future__ import annotations

from flix.core.adapter.summary import Summary


def test_a_summary_is_a_line_and_a_table():
    found = Summary(
        layers=("a.q", "emb"),
        total=12_345,
        trainable=617,
        features={("language", "hau"): 1600, ("task", "ner"): 17},
        ranks={("language", "hau"): 8, ("task", "ner"): 0},
    )
    assert found.line == "2 adapted layers; 617 trainable of 12,345 parameters (5.00%)"
    assert str(found).splitlines() == [
        found.line,
        "feature       rank  parameters",
        "language=hau     8       1,600",
        "task=ner         0          17",
    ]


def test_a_model_without_parameters_has_no_share():
    found = Summary((), 0, 0, {}, {})
    assert str(found).splitlines() == [
        "0 adapted layers; 0 trainable of 0 parameters (0.00%)",
        "feature  rank  parameters",
    ]
