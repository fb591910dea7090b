"""nn.MultiheadAttention in files, copies, merged models and PEFT's LoRAs."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from flix import AdapterError, TargetError  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    adapt,
    add_feature,
    export_peft,
    import_peft,
    load,
    merge,
    merge_in_place,
    save,
    unmerge,
)
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.attention import (  # noqa: E402
    HEADS,
    IN,
    OUT,
    ROW,
    D,
    N,
    inputs,
    made,
    run,
)
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402


def test_files_copies_merging_and_growth(tmp_path):
    base, model = made()
    given = inputs("cross")
    expected = run(model, given, {})[0]
    save(model, tmp_path)
    fresh = load(copy.deepcopy(base), tmp_path).eval()
    assert_close(run(fresh, given, {})[0], expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(run(twin, given, {})[0], expected)
        with torch.no_grad():
            twin.attn.in_proj_weight.zero_()
        assert_far(run(twin, given, {})[0], expected)
    assert_close(run(model, given, {})[0], expected)
    rows = run(model, given, {}, rows=[ROW] * N)[0]
    merged = merge(model, ROW)
    assert type(merged.attn) is nn.MultiheadAttention
    assert merged.state_dict().keys() == base.state_dict().keys()
    kernel = model.attn.in_proj_weight
    merge_in_place(model, ROW)
    assert_close(model(*given)[0], rows)
    unmerge(model)
    assert model.attn.in_proj_weight is kernel
    assert_close(run(model, given, {})[0], expected)
    add_feature(model, "language", "fra", rank=2)
    assert_close(run(model, given, {})[0], expected)


def test_a_base_of_another_kernel_is_told(tmp_path):
    base, model = made(targets=["in_proj_weight"])
    save(model, tmp_path)
    with torch.no_grad():
        base.attn.in_proj_weight.mul_(2)
    with pytest.warns(UserWarning, match="trained on"):
        load(base, tmp_path)


def test_others_are_refused_by_name():
    class Own(nn.MultiheadAttention):
        pass

    kinds = {"sizes": nn.MultiheadAttention(D, HEADS, kdim=4), "own": Own(D, HEADS)}
    for name, message in (("sizes", "of other sizes"), ("own", "Own is a subclass")):
        model = nn.ModuleDict({name: kinds[name], "linear": nn.Linear(D, D)})
        with pytest.warns(UserWarning, match=rf"'{name}\.out_proj' .*{message}"):
            adapted = adapt(copy.deepcopy(model), config())
        assert [path for path, _ in flix_layers(adapted)] == ["linear"]
        with pytest.raises(TargetError, match=message):
            adapt(model, config(target_modules=["out_proj"]))
    with pytest.raises(TargetError, match="it is the whole model"):
        adapt(nn.MultiheadAttention(D, HEADS), config(target_modules=["out_proj"]))


def test_exported_packed_projections_open_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    base, model = made(targets=["in_proj_weight"])
    export_peft(model, ROW, tmp_path)
    served = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).double().eval()
    given = inputs("cross")
    expected = run(model, given, {}, rows=[ROW] * N)[0]
    assert_close(served(*given)[0], expected, dtype="float32")
    assert_far(base(*given)[0], expected)


def _loras(tmp_path, **changes):
    """Two LoRAs of PEFT's, and what they give."""
    peft = pytest.importorskip("peft")
    base, _ = made()
    expected = {}
    for number, language in enumerate(("hau", "swa")):
        torch.manual_seed(number)
        settings = peft.LoraConfig(
            r=2 + number, lora_alpha=3, target_modules=["attn"], init_lora_weights=False
        )
        lora = peft.get_peft_model(copy.deepcopy(base), settings).double().eval()
        if changes.get("out") is not None:
            with torch.no_grad():
                lora.get_parameter(
                    "base_model.model.attn.base_layer.out_proj.lora_B.default.weight"
                ).mul_(changes["out"])
        lora.save_pretrained(tmp_path / language)
        expected[language] = lora(*inputs("cross"))[0]
    return base, expected, {n: tmp_path / n for n in expected}


def test_pefts_loras_of_packed_projections_become_features(tmp_path):
    base, expected, folders = _loras(tmp_path, out=0)
    model = import_peft(base, folders, group="language").eval()
    assert [path for path, _ in flix_layers(model)] == [IN]
    encoded = model.flix_config.registry.encode([{"language": n} for n in ("hau", "swa")] * 2)
    found = model(*inputs("cross"), flix_features=encoded)[0]
    for row, name in enumerate(("hau", "swa")):
        assert_close(found[row], expected[name][row], dtype="float32")


def test_outputs_projections_that_peft_adds_twice_are_refused(tmp_path):
    """PEFT 0.21 merges the LoRA of out_proj by hand, and lets out_proj merge itself after that."""
    _, model = made()
    with pytest.raises(AdapterError, match=r"'attn\.out_proj' is .*PEFT \(0\.21\) adds twice"):
        export_peft(model, ROW, tmp_path / "out")
    base, expected, folders = _loras(tmp_path)
    with pytest.raises(AdapterError, match=r"'attn\.out_proj' is .*PEFT \(0\.21\) adds twice"):
        import_peft(copy.deepcopy(base), folders, group="language")
    # It does so still: else the refusal has had its day.
    from safetensors.torch import load_file

    tensors = load_file(folders["hau"] / "adapter_model.safetensors")
    with torch.no_grad():
        for path, stem in ((IN, "attn"), (f"{OUT}.weight", "attn.base_layer.out_proj")):
            a, b = (tensors[f"base_model.model.{stem}.lora_{s}.weight"].double() for s in "AB")
            base.get_parameter(path).add_(b @ a, alpha=3 if path != IN else 1.5)
    assert_close(base(*inputs("cross"))[0], expected["hau"], dtype="float32")
