"""LoRA folders in PEFT's format, made by hand: what is read, how it becomes an adapter, and what is refused."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

import flix
from flix import AdapterError, ConfigError, FeatureError, from_peft
from flix.core.adapter.composition import delta
from flix.core.peft.importing import read_peft

STEM = "base_model.model."
DRAW = np.random.default_rng(0)
RANKS = {"a.q": 4, "a.v": 2, "emb": 4}


def pairs(ranks=None, dtype="f4"):
    made = {}
    for path, rank in (ranks or RANKS).items():
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if path == "emb"
            else ("lora_A.weight", "lora_B.weight")
        )
        for name, shape in zip(names, ((rank, 6), (5, rank)), strict=True):
            made[f"{STEM}{path}.{name}"] = DRAW.normal(size=shape).astype(dtype)
    return made


def folder(path, tensors=None, **settings):
    path.mkdir(exist_ok=True)
    tensors = pairs() if tensors is None else tensors
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    ranks = {
        name.removeprefix(STEM).split(".lora_")[0]: t.shape[0]
        for name, t in tensors.items()
        if name.endswith(("lora_A.weight", "lora_embedding_A"))
    }
    unlike = {path: rank for path, rank in ranks.items() if rank != config["r"]}
    config.setdefault("rank_pattern", unlike)
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def updates(lora):
    """The update of each layer as PEFT computes it."""
    return {
        path: lora.scales[path] * b.astype(float) @ a.astype(float)
        for path, (a, b) in lora.pairs.items()
    }


def same(adapter, lora, feature, rtol=1e-6):
    for path, wanted in updates(lora).items():
        found = delta(adapter, path, ((feature, 1.0),))
        np.testing.assert_allclose(found, wanted, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (2.0, 4.0, 2.0)),
        ({"use_rslora": True}, (4.0, 8 / math.sqrt(2), 4.0)),
        ({"alpha_pattern": {"q": 3.0, ".*": 1.0}}, (0.75, 0.5, 0.25)),
        ({"alpha_pattern": {"^a.q": 3.0, "mb": 1.0}}, (0.75, 4.0, 2.0)),
        ({"lora_alpha": 0}, (0.0, 0.0, 0.0)),
        ({"lora_alpha": -4}, (-1.0, -2.0, -1.0)),
        ({"alpha_pattern": {"q": -3.0}}, (-0.75, 4.0, 2.0)),
    ],
)
def test_scales_and_ranks_by_layer(tmp_path, settings, scales):
    lora = read_peft(folder(tmp_path / "l", **settings))
    assert tuple(lora.scales[path] for path in RANKS) == pytest.approx(scales)
    assert lora.kinds == {"a.q": "linear", "a.v": "linear", "emb": "embedding"}
    adapter = from_peft({"ner": tmp_path / "l"}, "task")
    same(adapter, lora, ("task", "ner"))
    assert {p: adapter.config.rank(p, ("task", "ner")) for p in RANKS} == RANKS
    for path, scale in lora.scales.items():
        a, b = adapter.pair(path, ("task", "ner"))
        assert np.array_equal(a, lora.pairs[path][0])
        # Scales are the configuration's; the sign alone goes into B.
        assert np.array_equal(b, np.sign(scale) * lora.pairs[path][1])
        if scale:
            assert adapter.config.scale(path, ("task", "ner")) == pytest.approx(abs(scale))


def test_a_dropout_that_all_have_is_kept(tmp_path):
    """Training goes on with it; where LoRAs differ, or drop all, no rate speaks for all."""
    for name, rate in (("a", 0.1), ("b", 0.1), ("c", 0.2), ("d", 1.0), ("e", None)):
        folder(tmp_path / name, lora_dropout=rate)
    read = {
        n: from_peft({m: tmp_path / m for m in n}, "task").config.lora_dropout
        for n in ("a", "ab", "ac", "d", "e")
    }
    assert read == {"a": 0.1, "ab": 0.1, "ac": 0.0, "d": 0.0, "e": 0.0}
    folder(tmp_path / "f", lora_dropout="much")
    with pytest.raises(
        AdapterError, match="rate lora_dropout must be a number from 0 to 1, got 'much'"
    ):
        from_peft({"f": tmp_path / "f"}, "task")


def test_several_become_a_group_and_survive_a_save(tmp_path):
    first = folder(tmp_path / "one", use_rslora=True)
    second = folder(tmp_path / "two", pairs({"a.q": 3, "b.k": 1}), r=3, alpha_pattern={"k": 5})
    adapter = from_peft({"swa": first, "hau": second}, "language")
    flix.save_adapter(adapter, tmp_path / "saved")
    for found in (adapter, flix.load_adapter(tmp_path / "saved")):
        assert found.config.registry.features == (("language", "swa"), ("language", "hau"))
        assert set(found.layers) == {*RANKS, "b.k"}
        assert found.config.rank("emb", ("language", "hau")) == 0
        assert found.config.rank("b.k", ("language", "swa")) == 0
        same(found, read_peft(first), ("language", "swa"))
        same(found, read_peft(second), ("language", "hau"))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_dtypes(tmp_path, dtype):
    adapter = from_peft({"x": folder(tmp_path / "l", pairs(dtype=dtype))}, "task")
    same(adapter, read_peft(tmp_path / "l"), ("task", "x"))
    kinds = {str(t.dtype) for t in adapter.tensors.values()}
    assert kinds == {"float64" if dtype == "f8" else "float32"}


def test_bfloat16(tmp_path):
    exact = {n: (t.view("u4") & 0xFFFF0000).view("f4") for n, t in pairs().items()}
    path = folder(tmp_path / "l", exact)
    header, body = {}, b""
    for name, tensor in exact.items():
        raw = (tensor.view("u4") >> 16).astype("<u2").tobytes()
        offsets = [len(body), len(body) + len(raw)]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        body += raw
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + body
    (path / "adapter_model.safetensors").write_bytes(data)
    lora = read_peft(path)
    assert np.array_equal(lora.pairs["a.q"][0], exact[f"{STEM}a.q.lora_A.weight"])
    assert np.array_equal(lora.pairs["emb"][1], exact[f"{STEM}emb.lora_embedding_B"])


def test_names_without_peft_s_prefix(tmp_path):
    bare = {name.removeprefix(STEM): tensor for name, tensor in pairs().items()}
    assert set(read_peft(folder(tmp_path / "l", bare)).pairs) == set(RANKS)


def test_a_frozen_copy_of_the_embedding_is_passed_over(tmp_path):
    tensors = {**pairs(), f"{STEM}emb.base_layer.weight": np.zeros((6, 5), "f4")}
    assert set(read_peft(folder(tmp_path / "l", tensors)).pairs) == set(RANKS)


def test_whole_modules_are_refused_or_left_out(tmp_path):
    head = {f"{STEM}score.weight": np.zeros((2, 5), "f4"), "steps": np.zeros(1, "i8")}
    path = folder(tmp_path / "l", {**pairs(), **head}, modules_to_save=["score"])
    with pytest.raises(AdapterError, match=r"score\.weight.*skip_modules=True"):
        read_peft(path)
    assert set(read_peft(path, skip_modules=True).pairs) == set(RANKS)
    assert set(from_peft({"x": path}, "task", skip_modules=True).layers) == set(RANKS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'; need 'LORA'"),
        ({"bias": "all"}, "trained biases"),
        ({"use_dora": True}, "use_dora is set, DoRA"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"arrow_config": {"top_k": 3}}, "routes among experts"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"target_parameters": "w"}, "target_parameters must be a list of names, got 'w'"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"lora_alpha": "much"}, "lora_alpha must be a finite number, got 'much'"),
        ({"lora_alpha": "8"}, "lora_alpha must be a finite number, got '8'"),
        ({"lora_alpha": True}, "lora_alpha must be a finite number, got True"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
        ({"lora_alpha": None}, "lora_alpha must be a finite number, got None"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern"),
        ({"alpha_pattern": [2]}, r"alpha_pattern is \{pattern: number\}"),
        (
            {"alpha_pattern": {"q": False}},
            r"alpha_pattern\['q'\] must be a finite number, got False",
        ),
        ({"alpha_pattern": {"(q+)+": 2}}, "an unbounded repeat inside another"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
        ({"use_rslora": 1}, "use_rslora must be true or false, got 1"),
        (
            {"r": 3, "rank_pattern": {"v": 2}},
            r"'a\.q' has rank 4 in its tensors, and 3 by adapter_config\.json",
        ),
        ({"r": 4.0}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"rank_pattern": {}}, r"'a\.v' has rank 2 in its tensors, and 4"),
        (
            {"rank_pattern": {"v": 2, "q": 0}},
            r"rank_pattern\['q'\] must be a whole number of 1 or more, got 0",
        ),
    ],
)
def test_what_is_no_plain_lora_or_says_nonsense(tmp_path, settings, message):
    with pytest.raises(AdapterError, match=message):
        read_peft(folder(tmp_path / "l", **settings))


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(AdapterError, match=r"it has no adapter_config\.json"):
        read_peft(tmp_path)
    path = folder(tmp_path / "l")
    data = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(data[:-5])
    with pytest.raises(AdapterError, match="damaged"):
        read_peft(path)
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin is a pickle, which is not read"):
        read_peft(path)
    for text in ("{", '{"r": 1, "r": 2}', '{"r": NaN}', "[" * 10**5, '{"peft_type": "LORA", "r": 1' + "0" * 5000 + "}"):  # fmt: skip
        (path / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=r"adapter_config\.json' is damaged"):
            read_peft(path)
    (path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="no LoRA"):
        read_peft(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{STEM}a.q.lora_B.weight": None}, r"'a\.q' needs lora_A.*'A': \[4, 6\]"),
        ({f"{STEM}a.q.lora_B.weight": np.zeros((5, 3), "f4")}, r"'B': \[5, 3\]"),
        ({f"{STEM}a.q.lora_B.weight": np.zeros((5, 4, 1, 1), "f4")}, r"\[5, 4, 1, 1\]"),
        ({f"{STEM}a.q.lora_A.weight": np.zeros((4, 6), "i8")}, "lora_A.*must be one of F16"),
        (dict.fromkeys(pairs()), "holds no low-rank pair"),
        (
            {f"{STEM}a.q.lora_B.weight": np.full((5, 4), np.nan, "f4")},
            r"q\.lora_B\.weight' holds values that are NaN",
        ),
        (
            {f"{STEM}emb.lora_embedding_A": np.full((4, 6), np.inf, "f2")},
            "lora_embedding_A' holds values that are NaN",
        ),
        ({"a.q.lora_A.weight": np.zeros((4, 6), "f4")}, r"'a\.q' twice, under two names"),
    ],
)
def test_ill_formed_tensors(tmp_path, changes, message):
    tensors = {n: t for n, t in {**pairs(), **changes}.items() if t is not None}
    with pytest.raises(AdapterError, match=message):
        read_peft(folder(tmp_path / "l", tensors))


def test_loras_of_different_models(tmp_path):
    other = {
        f"{STEM}a.q.lora_A.weight": np.zeros((4, 9), "f4"),
        f"{STEM}a.q.lora_B.weight": np.zeros((5, 4), "f4"),
    }
    folders = {"one": folder(tmp_path / "one"), "two": folder(tmp_path / "two", other)}
    with pytest.raises(AdapterError, match=r"'two': layer 'a\.q' is linear 9 -> 5, but linear 6"):
        from_peft(folders, "task")


@pytest.mark.parametrize(
    ("alpha", "patterns", "layer"),
    [
        (1e200, {"emb": 8}, "a.q"),
        (1e200, {"emb": 1e200, "q": 8, "v": 4}, "emb"),
        (8, {"v": -1e-200}, "a.v"),
    ],
)
def test_scales_that_no_value_bears(tmp_path, alpha, patterns, layer):
    """What a scale makes of a layer's B must neither overflow nor vanish."""
    lora = folder(tmp_path / "a", lora_alpha=alpha, alpha_pattern=patterns)
    with pytest.raises(AdapterError, match=rf"layer '{layer}' has the scale .* float32 cannot"):
        from_peft({"x": lora}, "g")


def test_a_scale_that_takes_a_factor_beyond_its_dtype_is_refused(tmp_path):
    large = {n: t * np.float32(1e30) if n.endswith("lora_embedding_B") else t for n, t in pairs().items()}  # fmt: skip
    path = folder(tmp_path / "l", large, alpha_pattern={"emb": 1e12})
    with pytest.raises(
        AdapterError,
        match=r"layer 'emb' has the scale 2\.5e\+11, and float32 cannot hold",
    ):
        from_peft({"x": path}, "task")


def test_arguments(tmp_path):
    path = folder(tmp_path / "l")
    for wrong in (path, str(path), {}, [path]):
        with pytest.raises(ConfigError, match=r"takes \{feature: folder\}"):
            from_peft(wrong, "task")
    with pytest.raises(FeatureError, match=r"without '\."):
        from_peft({"ner": path}, "a.b")
