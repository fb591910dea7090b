"""Names: one Unicode form, nothing that cannot be seen, and a warning of those that look alike."""

from __future__ import annotations

import json
import sys
import unicodedata
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import flix
from flix import FeatureError, FeatureRegistry
from flix.core.adapter.adapter import LayerShape, tensor_name
from flix.core.adapter.changes import growing
from flix.core.features.names import LONGEST, alike, folded, normal_group, normal_name

NFC, NFD = "español", "espan\u0303ol"


def test_one_text_is_one_name_wherever_it_is_given():
    made = FeatureRegistry({"gro\u0308ße": [NFD, "klein"], "task": ["ner"]}, {("task", "ner"): [("größe", NFC)]})  # fmt: skip
    assert made.features[0] == ("größe", NFC) and made.groups == ("größe", "task")
    for group in ("größe", "gro\u0308ße"):
        for name in (NFC, NFD):
            assert made.id(group, name) == 0 and (group, name) in made
            assert made.encode([{group: name}]).ids.tolist() == [[0]]
            assert made.encode([{group: {name: 0.5}}]).weights.tolist() == [[0.5]]
            assert made.encode([{group: "x"}], unknown={"x": name}).ids.tolist() == [[0]]
            assert made.without_feature(group, name).removed == {("größe", NFC)}
            assert made.renamed(group, name, "neu").features[0] == ("größe", "neu")
            assert made.renamed(group, "klein", "e\u0301").id(group, "é") == 1
            assert made.subset([(group, name)]).features == (("größe", NFC),)
            assert flix.ranks.explicit({(group, name): 3, (group, "klein"): 2, "task": 1})(made)[made.features[0]] == 3  # fmt: skip
            assert flix.ranks.explicit({group: {name: 3, "klein": 2}, "task": 1})(made)[made.features[0]] == 3  # fmt: skip
        assert made.with_feature(group, "e\u0301").id(group, "é") == 3
        assert made.names(group) == (NFC, "klein")
        assert made.encode([{group: "klein"}], group_weights={group: 0.5}).weights.tolist() == [[0.5]]  # fmt: skip
        dropout = flix.FeatureDropout(0.0, per_group={group: 1.0})
        assert dropout(made.encode([{group: "klein"}]), seed=0, step=0).ids.tolist() == [[-1]]
        config = flix.FlixConfig(registry=made, ranks={group: 3, "task": 1}, rank_pattern={"q": {group: 2}})  # fmt: skip
        assert config.rank("q", ("größe", NFC)) == 2
        assert flix.FlixConfig.from_dict(config.to_dict()) == config
    two = made.encode([{"größe": unicodedata.normalize("NFKD", "x")}], unknown={"x": [NFD, NFC]})
    assert two.weights.tolist() == [[1.0]]
    data = made.to_dict()
    data["features"][0] = ["gro\u0308ße", NFD]
    assert FeatureRegistry.from_dict(data) == made


@pytest.mark.parametrize(("group", "name"), [("größe", NFC), ("gro\u0308ße", NFD)])
def test_configurations_and_adapters_know_a_feature_by_either_form(group, name):
    registry = FeatureRegistry({"größe": [NFC, "klein"]})
    alpha = {("größe", NFC): 4.0, ("größe", "klein"): 4.0}
    config = flix.FlixConfig(registry=registry, ranks=2, alpha=alpha)
    grown = config.with_feature(group, name + "2", rank=3)
    assert grown.ranks["größe", NFC + "2"] == 3 and grown.alpha["größe", NFC + "2"] == 4.0
    gone = config.without_feature(group, name)
    assert gone.registry.live == (("größe", "klein"),) and gone.ranks["größe", NFC] == 0
    assert gone.with_feature(group, name, rank=5).ranks["größe", NFC] == 5
    assert config.with_renamed(group, "klein", name + "3").ranks["größe", NFC + "3"] == 2
    assert config.with_renamed(group, name, "neu").registry.features[0] == ("größe", "neu")
    layers = {"q": LayerShape(d_in=3, d_out=2)}
    values = {("größe", n): (np.full((2, 3), i), np.ones((2, 2))) for i, n in enumerate([NFC, "klein"])}  # fmt: skip
    tensors = {tensor_name("q", part, f): v[k].astype("f4") for f, v in values.items() for k, part in enumerate("AB")}  # fmt: skip
    adapter = flix.Adapter(config, layers, tensors)
    assert (adapter.pair("q", (group, name))[0] == 0).all()
    assert flix.select_features(adapter, {group: name}).config.registry.features == (("größe", NFC),)  # fmt: skip
    assert flix.rename_feature(adapter, group, name, "neu").pair("q", ("größe", "neu"))[0].shape == (2, 3)  # fmt: skip
    assert flix.remove_feature(adapter, group, name).config.registry.live == (("größe", "klein"),)
    grows = growing(config, group, name + "4", init_from=name)
    assert grows.feature == ("größe", NFC + "4") and grows.origins == (("größe", NFC),)


def test_files_of_before_whose_names_are_in_another_form_are_read(tmp_path):
    registry = FeatureRegistry({"größe": [NFC, "klein"]})
    config = flix.FlixConfig(registry=registry, ranks=1)
    draw = np.random.default_rng(0)
    tensors = {
        tensor_name("q\u0308", part, f): draw.normal(size=shape).astype("f4")
        for f in registry.features
        for part, shape in (("A", (1, 3)), ("B", (2, 1)))
    }
    made = flix.Adapter(config, {"q\u0308": LayerShape(d_in=3, d_out=2)}, tensors)
    flix.save_adapter(made, tmp_path)
    path = tmp_path / "flix.safetensors"
    with safe_open(path, "np") as file:
        metadata = file.metadata()
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def other(text):
        return text.replace("größe", "gro\u0308ße").replace(NFC, NFD)

    said = {"format": "flix", "version": 1, "config": json.loads(other(metadata["config"])), "layers": json.loads(metadata["layers"])}  # fmt: skip
    (tmp_path / "flix_config.json").write_text(json.dumps(said))
    save_file({other(k): v for k, v in held.items()}, path)
    found = flix.load_adapter(tmp_path)
    assert found.config == config
    for feature in registry.features:
        for one, two in zip(found.pair("q\u0308", feature), made.pair("q\u0308", feature), strict=True):  # fmt: skip
            assert np.array_equal(one, two)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureRegistry({"g": [NFC, NFD]}), "occurs twice in group 'g'.*NFC"),
        (lambda: FeatureRegistry({"größe": ["a"], "gro\u0308ße": ["b"]}), "the group 'größe' occurs twice"),
        (lambda: FeatureRegistry({"g": [NFC]}).with_feature("g", NFD), "occurs twice"),
        (lambda: FeatureRegistry({"größe": ["a"]}).with_group("gro\u0308ße", ["b"]), "exists already"),
        (lambda: FeatureRegistry({"g": [NFC, "x"]}).renamed("g", "x", NFD), "exists; choose another"),
        (lambda: FeatureRegistry({"g": [NFC, "x"]}, {("g", NFC): [("g", "x")], ("g", NFD): []}), "given twice"),
        (lambda: FeatureRegistry({"g": ["a"]}).encode([], unknown={NFC: "a", NFD: "a"}), "two Unicode forms"),
        (lambda: flix.FeatureDropout(0.0, per_group={"größe": 0.1, "gro\u0308ße": 0.2}), "two Unicode forms"),
        (
            lambda: flix.ranks.explicit({"g": {NFC: 1, NFD: 2}})(FeatureRegistry({"g": [NFC]})),
            "give g=español twice",
        ),
        (
            lambda: flix.ranks.explicit({("g", "a"): 1, "g=a": 2})(FeatureRegistry({"g": ["a"]})),
            "give g=a twice",
        ),
    ],
)  # fmt: skip
def test_two_forms_of_one_name_are_one_name_given_twice(make, message):
    with pytest.raises(flix.FlixError, match=message):
        make()


BAD = {
    "eng ": "ends with a blank, U+0020 (SPACE)",
    " eng": "begins with a blank",
    "eng\u00a0": "U+00A0 (NO-BREAK SPACE)",
    "\u3000eng": "U+3000 (IDEOGRAPHIC SPACE)",
    " ": "blank",
    "en\tg": "U+0009 (a control character) at place 2",
    "eng\n": "U+000A (a control character)",
    "en\x00g": "U+0000 (a control character)",
    "en\x7fg": "U+007F (a control character)",
    "en\x85g": "U+0085 (a control character)",
    "en\u200bg": "U+200B (ZERO WIDTH SPACE)",
    "en\u200dg": "U+200D (ZERO WIDTH JOINER)",
    "می\u200cخواهم": "U+200C (ZERO WIDTH NON-JOINER)",
    "\ufeffeng": "U+FEFF (ZERO WIDTH NO-BREAK SPACE)",
    "e\u00adng": "U+00AD (SOFT HYPHEN)",
    "\u202eeng": "U+202E (RIGHT-TO-LEFT OVERRIDE)",
    "en\u2066g": "U+2066 (LEFT-TO-RIGHT ISOLATE)",
    "en\u2028g": "U+2028 (LINE SEPARATOR)",
    "en\u034fg": "U+034F (COMBINING GRAPHEME JOINER)",
    "❤\ufe0f": "U+FE0F (VARIATION SELECTOR-16)",
    "eng\U000e0041": "U+E0041 (TAG LATIN CAPITAL LETTER A)",
    "\u3164": "U+3164 (HANGUL FILLER)",
    "en\u2800g": "U+2800 (BRAILLE PATTERN BLANK)",
    "en\udc80g": "U+DC80 (half of a surrogate pair)",
    "en\uffffg": "U+FFFF (unassigned)",
    "en\u0378g": "U+0378 (unassigned)",
    "x" * (LONGEST + 1): "has 1001 characters, at most 1000",
}


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_what_cannot_be_seen_is_refused_by_name_everywhere(name):
    good = FeatureRegistry({"language": ["eng", "hau"], "task": ["ner"]})
    config = flix.FlixConfig(registry=good, ranks=2)
    data = good.to_dict()
    data["features"][0] = ["language", name]
    groups = {**good.to_dict(), "groups": ["language", name]}
    for make in (
        lambda: FeatureRegistry({"language": [name]}),
        lambda: FeatureRegistry({name: ["eng"]}),
        lambda: FeatureRegistry({"language": ["eng"]}, {("language", "eng"): [("language", name)]}),
        lambda: FeatureRegistry.from_dict(data),
        lambda: FeatureRegistry.from_dict(groups),
        lambda: good.with_feature("language", name),
        lambda: good.with_group(name, ["a"]),
        lambda: good.renamed("language", "eng", name),
        lambda: good.id("language", name),
        lambda: good.ids_of(name),
        *(
            lambda policy=policy: good.encode([{"task": "ner", "language": name}], unknown=policy)
            for policy in ("error", "skip", "mean", {"x": "eng"})
        ),
        lambda: good.encode([{"language": {name: 0.5}}], unknown="skip"),
        lambda: good.encode([{"language": ["eng", name]}], unknown="skip"),
        lambda: good.encode([{name: "eng"}], unknown="skip"),
        lambda: good.encode([], unknown={name: "eng"}),
        lambda: good.encode([], group_weights={name: 1.0}),
        lambda: flix.FlixConfig(registry=good, ranks=2, unknown={name: "eng"}),
        lambda: flix.FeatureDropout(per_group={name: 0.1}),
        lambda: flix.ranks.explicit({"language": {name: 2}, "task": 1})(good),
        lambda: config.with_feature("language", name, rank=1),
    ):
        with pytest.raises(FeatureError) as caught:
            make()
        assert BAD[name] in str(caught.value)
        str(caught.value).encode("utf-8")  # the message can be printed


@pytest.mark.parametrize(
    "name", ["two words", "日本語", "🙂", "x.y", "a:b+c", "o\u0308", "ნ", "हिन्दी", "a'b", "x" * LONGEST, "e\u0323\u0301"]
)  # fmt: skip
def test_what_can_be_seen_is_a_name(name):
    kept = normal_name("g", name)
    assert kept == unicodedata.normalize("NFC", name) == normal_name("g", kept)
    assert FeatureRegistry({"g": [name]}).encode([{"g": name}]).ids.tolist() == [[0]]
    if "." not in name:
        assert normal_group(name) == kept


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=12))
def test_a_kept_name_stays_as_it_is_and_can_be_written(text):
    try:
        kept = normal_name("g", text)
    except FeatureError as error:
        str(error).encode("utf-8")
        return
    assert normal_name("g", kept) == kept and kept.strip() == kept
    kept.encode("utf-8")


LOOK_ALIKE = [("eng", "Eng"), ("eng", "ENG"), ("fi", "ﬁ"), ("Å", "å"), ("ｅｎｇ", "eng"), ("straße", "STRASSE"), ("x²", "x2")]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), LOOK_ALIKE)
def test_names_that_differ_in_case_or_by_compatibility_get_a_warning(one, other):
    shown = f"'{one}' and '{other}' differ only in case or by compatibility"
    with pytest.warns(UserWarning, match="group 'g': " + shown) as caught:
        both = FeatureRegistry({"g": [one, other]})
    assert caught[0].filename == __file__  # at the user's line
    with pytest.warns(UserWarning, match=shown):
        FeatureRegistry.from_dict(both.to_dict())
    first = FeatureRegistry({"g": [one, "z"], "h": ["a"]})
    with pytest.warns(UserWarning, match=shown):
        assert len(first.with_feature("g", other)) == 4
    with pytest.warns(UserWarning, match=shown):
        first.renamed("g", "z", other)
    with pytest.warns(UserWarning, match=shown):
        first.union(FeatureRegistry({"g": [other]}))
    with pytest.warns(UserWarning, match="the groups " + shown):
        FeatureRegistry({one: ["a"], other: ["b"]})
    with pytest.warns(UserWarning, match="the groups " + shown):
        FeatureRegistry({one: ["a"]}).with_group(other, ["b"])
    # A name that only stands in for a known one, without a word about it, is the trap itself.
    with pytest.warns(UserWarning, match=f"no feature '{other}', but '{one}'"):
        assert first.encode([{"g": other}], unknown="skip").ids.tolist() == [[-1]]
    with pytest.raises(FeatureError, match=f"did you mean '{one}'"):
        first.encode([{"g": other}])


def test_a_warning_is_of_new_names_alone_and_only_within_a_group():
    with pytest.warns(UserWarning):
        old = FeatureRegistry({"g": ["eng", "Eng", "hau"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old.with_feature("g", "swa").without_feature("g", "hau").with_implications({})
        old.with_group("h", ["ENG"]).subset([("g", "eng")])
        FeatureRegistry({"g": ["eng"], "h": ["Eng"]})
        old.encode([{"g": "zul"}], unknown="skip")
    many = {"g": [form(f"n{i}") for i in range(50) for form in (str.lower, str.upper)]}
    with pytest.warns(UserWarning, match=r"50 in all") as caught:
        FeatureRegistry(many)
    assert len(caught) == 1


def test_folding():
    assert [*alike(["a", "b", "A", "ａ"])] == [("a", "A"), ("a", "ａ")]
    for code in range(sys.maxunicode + 1):
        if not 0xD800 <= code < 0xE000:
            once = folded(chr(code))
            assert folded(once) == once
