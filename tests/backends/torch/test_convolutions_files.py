"""Convolutions in files, copies, merged models and PEFT's LoRAs."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from flix import AdapterError, load_adapter  # noqa: E402
from flix.backends.torch import (  # noqa: E402
    export_peft,
    import_peft,
    load,
    merge,
    merge_in_place,
    save,
    unmerge,
)
from tests.helpers.convolutions import (  # noqa: E402
    ROW,
    SETTINGS,
    Net,
    drawn,
    made,
    run,
)
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402


def test_files_copies_and_merged_models(tmp_path):
    model, x = made("padded")
    expected = run(model, x)
    save(model, tmp_path)
    torch.manual_seed(0)
    fresh = load(Net(2, **SETTINGS["padded"][1]).double(), tmp_path).eval()
    assert_close(run(fresh, x), expected)
    stored = load_adapter(tmp_path)
    assert stored.layers["conv"].d_in == 18 and stored.layers["conv"].kind == "linear"
    assert stored.base is not None and stored.base.fingerprint is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(run(twin, x), expected)
    merged = merge(model, ROW)
    assert type(merged.conv) is nn.Conv2d and type(merged) is Net
    rows = run(model, x, [ROW] * 4)
    assert_close(merged(x), rows)
    kernel = model.conv.weight
    merge_in_place(model, ROW)
    assert_close(model(x), rows)
    unmerge(model)
    assert model.conv.weight is kernel
    assert_close(run(model, x), expected)


def test_a_base_of_another_kernel_is_told(tmp_path):
    model, _ = made()
    save(model, tmp_path)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="fingerprint|trained on"):
        load(Net(2, **SETTINGS["plain"][1]).double(), tmp_path)


@pytest.mark.parametrize("name", ["plain", "padded", "patches", "points", "sound", "film"])
def test_an_exported_composition_opens_in_peft(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, x = made(name)
    export_peft(model, ROW, tmp_path)
    torch.manual_seed(0)
    places, settings = SETTINGS[name]
    served = (
        peft.PeftModel.from_pretrained(Net(places, **settings).double(), tmp_path).double().eval()
    )
    expected = run(model, x, [ROW] * 4)
    assert_close(served(x), expected, dtype="float32")
    with served.disable_adapter():
        assert_far(served(x), expected)


@pytest.mark.parametrize("name", ["dilated", "reflected"])
def test_what_peft_would_compute_otherwise_is_not_exported(name, tmp_path):
    model, _ = made(name)
    with pytest.raises(
        AdapterError, match=r"'conv' is a convolution with (dilation|padding_mode)="
    ):
        export_peft(model, ROW, tmp_path)
    assert not list(tmp_path.iterdir())


def test_pefts_loras_of_convolutions_become_features(tmp_path):
    peft = pytest.importorskip("peft")
    x, expected = drawn(2), {}
    for number, language in enumerate(("hau", "swa")):
        torch.manual_seed(0)
        settings = peft.LoraConfig(
            r=3 + number, lora_alpha=5, target_modules=["conv", "out"], init_lora_weights=False
        )
        lora = peft.get_peft_model(Net(2, **SETTINGS["padded"][1]).double(), settings).double()
        lora.save_pretrained(tmp_path / language)
        expected[language] = lora.eval()(x)
    torch.manual_seed(0)
    folders = {language: tmp_path / language for language in expected}
    model = import_peft(Net(2, **SETTINGS["padded"][1]).double(), folders, group="language").eval()
    encoded = model.flix_config.registry.encode([{"language": n} for n in ("hau", "swa")])
    found = model(x[:2], flix_features=encoded)
    assert_close(found[0], expected["hau"][0], dtype="float32")
    assert_close(found[1], expected["swa"][1], dtype="float32")


def test_an_exported_file_has_pefts_form(tmp_path):
    from safetensors.numpy import load_file

    model, _ = made("padded")
    report = export_peft(model, ROW, tmp_path, compress_to=2)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.conv.lora_A.weight"].shape == (report.rank, 3, 3, 2)
    assert tensors["base_model.model.conv.lora_B.weight"].shape == (5, report.rank, 1, 1)
    assert "conv" in json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
