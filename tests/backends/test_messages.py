"""Every routing error says the rule, what was got, and the way out."""

from __future__ import annotations

import inspect

import pytest

import flix
from flix.backends import messages

CALL = "model(x, flix_features=ids)"
# {message: (arguments, the error, what it must name)}
CASES = {
    "not_adapted": (("save", 3), flix.TargetError, ["save", "int", "adapt(model, config)"]),
    "adapted_already": ((), flix.TargetError, ["adapted already", "add_feature"]),
    "weights_alone": ((), flix.RoutingError, ["flix_weights", "flix_features", "give both"]),
    "unrouted_model": ((CALL,), flix.RoutingError, [CALL, "disable(model)", "-1"]),
    "unrouted_layer": (
        ("proj", CALL, "routed(m)"),
        flix.RoutingError,
        ["'proj'", CALL, "routed(m)"],
    ),
    "swallowed": (("Block", "proj", CALL), flix.RoutingError, ["Block", "'proj'", CALL]),
    "kept_by_a_cache": (("proj", CALL), flix.RoutingError, ["'proj'", "cache", "nnx.remat", CALL]),
    "routed_from_around": (
        ("proj", CALL),
        flix.RoutingError,
        ["'proj'", "compiled", "make routing an input", CALL],
    ),
    "other_registry": (("proj", "A", "B"), flix.RoutingError, ["'proj'", "B, but", "for A"]),
    "traced_otherwise": (
        ("proj", "inside of disable", "outside of disable"),
        flix.RoutingError,
        ["'proj'", "traced inside of disable", "called outside of disable", "-1"],
    ),
    "changed_kernel": (
        ("quantize", "layer 'q'"),
        flix.TargetError,
        ["quantize", "layer 'q'", "merge(model, row)"],
    ),
    "other_lead": (("proj", (5, 2), (4, 2)), flix.RoutingError, ["'proj'", "[5, 2]", "[4, 2]"]),
    "doubtful_rows": (
        ("proj", (4,), (4,), "it is an expert"),
        flix.RoutingError,
        ["'proj'", "[4]", "it is an expert", "exclude_modules", "per token"],
    ),
    "bypassed": ((["a.q", "b.q"],), flix.TargetError, ["a.q, b.q", "exclude_modules=['q']"]),
    "no_experts": ((["a.down_proj"],), flix.TargetError, ["'a.down_proj'", "axis of experts"]),
    "no_rows_of_places": (("conv", [4, 3, 8], 2), flix.RoutingError, ["'conv'", "[4, 3, 8]"]),
    "no_batch": (("q", [3, 4]), flix.RoutingError, ["'q'", "[3, 4]", "one composition"]),
    "one_for_all": (
        ("attention.table.0",),
        flix.RoutingError,
        ["'attention.table.0'", "exclude_modules", "table"],
    ),
    "unlike_media": (
        ("vision.q", "image", [1], object()),
        flix.RoutingError,
        ["'vision.q'", "'image'", "row 1 without any"],
    ),
    "undropped": (
        (0.1, ["a.down_proj"]),
        flix.ConfigError,
        ["lora_dropout=0.1", "a.down_proj", "exclude_modules"],
    ),
    "rows_differ": (
        ((2, 3),),
        flix.ConfigError,
        ["row 2, position 3 differs from row 0, position 0", "'gather'"],
    ),
    "folded_in": (({"task": "ner"},), flix.RoutingError, ["'task': 'ner'", "unmerge(model)"]),
    "merged": (
        (((("task", "ner"), 1.0), (("task", "pos"), 0.5)), ((("language", "hau"), 1.0),)),
        flix.RoutingError,
        ["composition task=ner + task=pos x 0.5, then language=hau, for", "merged"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_say_what_is_wrong_and_what_to_do(name):
    arguments, kind, named = CASES[name]
    error = getattr(messages, name)(*arguments)
    assert type(error) is kind
    for part in named:
        assert part in str(error), (part, str(error))


def test_a_layer_without_features_says_whether_it_got_weights():
    assert "no routing is in force" in str(messages.without_features(None, "proj", CALL))
    assert "give both" in str(messages.without_features([1.0], "proj", CALL))


def test_a_shape_that_a_framework_does_not_know_is_shown_as_it_is():
    class Shape:
        def __str__(self):
            return "(None, 3)"

    assert "exclude_modules" in str(messages.other_lead("proj", (5,), (4,), ways_out=True))
    assert "leading shape (None, 3)" in str(messages.other_lead("proj", Shape(), (4,)))


def test_every_message_is_held_to_something_here():
    public = {n for n, _ in inspect.getmembers(messages, inspect.isfunction) if n[0] != "_"}
    own = {n for n in public if getattr(messages, n).__module__ == messages.__name__}
    assert own == {*CASES, "without_features", "not_finite"}
