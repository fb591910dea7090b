"""``flix export --all``: many compositions as LoRAs, with a map and one command line."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any, Literal

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

from flix import AdapterError, ConfigError, FeatureError  # noqa: E402
from flix.backends.torch import adapt, export_peft, export_peft_all, save  # noqa: E402
from flix.cli.app import app  # noqa: E402
from flix.cli.features import parse_combinations  # noqa: E402
from flix.core.peft.vllm import VLLM_RANKS  # noqa: E402
from tests.helpers.registry import config, registry  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import ask, batch, make, output, randomize  # noqa: E402


def run(folder: Path, *arguments: object) -> Any:
    common = ["export", folder / "adapter", "--base", folder / "base", *arguments]
    return CliRunner().invoke(app, list(map(str, common)))


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    make("llama").save_pretrained(tmp_path / "base")
    model = adapt(make("llama"), config())
    randomize(model)
    save(model, tmp_path / "adapter")
    return model.eval()


def test_every_combination_is_a_lora_that_peft_opens(llama: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    out = tmp_path / "loras"
    said = json.loads(
        run(tmp_path, "--all", "language=hau|swa,task=*", "--out", out, "--json").stdout
    )
    names = ["hau-ner", "hau-pos", "swa-ner", "swa-pos"]
    assert [lora["name"] for lora in said["loras"]] == names
    assert {p.name for p in out.iterdir()} == {*names, "loras.json"}
    assert json.loads((out / "loras.json").read_text())["command"] == said["command"]
    for name in names:
        language, task = name.split("-")
        row = {"language": language, "task": task}
        opened = peft.PeftModel.from_pretrained(make("llama"), out / name).double().eval()
        assert_close(
            output(opened(**batch("llama"))), ask(llama, "llama", [row] * 4), dtype="float32"
        )


def test_files_are_those_of_single_exports(llama: Any, tmp_path: Path) -> None:
    rows = {
        "one": {"language": "hau"},
        "two": {"language": {"hau": 0.5, "swa": 1.5}, "task": "ner"},
    }
    made = export_peft_all(llama, rows, tmp_path / "all", compress_to=2)
    for lora, row in zip(made.loras, rows.values(), strict=True):
        one = export_peft(llama, row, tmp_path / "one", compress_to=2)
        assert (one.rank, one.error) == (lora.export.rank, lora.export.error)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "all" / lora.name / file).read_bytes() == (
                tmp_path / "one" / file
            ).read_bytes()
    assert "1 were cut" in made.message


def test_what_is_said(llama: Any, tmp_path: Path) -> None:
    result = run(tmp_path, "--all", "language=hau,task=ner|pos", "--out", tmp_path / "loras")
    assert result.exit_code == 0
    assert "--max-loras 2 --max-cpu-loras 2 --lora-modules hau-ner=" in result.stdout
    assert f"map: {tmp_path}/loras/loras.json" in result.stdout


def test_a_file_of_combinations() -> None:
    assert parse_combinations(["language=*,task=ner"], registry())[0] == {
        "language": "hau",
        "task": "ner",
    }
    assert len(parse_combinations(["language=*,task=*"], registry())) == 8
    mixed = parse_combinations(["language=hau:0.5+swa|zul"], registry())
    assert mixed == [{"language": {"hau": 0.5, "swa": 1.0}}, {"language": "zul"}] or mixed[1] == {
        "language": {"zul": 1.0}
    }


def test_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cells.txt"
    file.write_text("# served\n\nlanguage=hau,task=ner\nlanguage=swa,task=*\n", encoding="utf-8")
    assert len(parse_combinations([f"@{file}"], registry())) == 3


@pytest.mark.parametrize(
    "texts,error,message",
    [
        (["language=hau", "language=hau"], FeatureError, "twice"),
        (["language=hau|hau"], FeatureError, "twice"),
        (["language=xxx"], FeatureError, "xxx"),
        (["langage=*"], FeatureError, "langage"),
        (["language=hau,language=swa"], FeatureError, "given twice"),
        (["@nowhere"], ConfigError, "cannot be read"),
        ([""], FeatureError, "names no combination"),
    ],
)
def test_mistakes_are_named(texts: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        parse_combinations(texts, registry())


def test_nothing_is_written_where_one_cannot_be(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="language=yor have rank 0"):
        export_peft_all(llama, [{"language": "hau"}, {"language": "yor"}], tmp_path / "x")
    with pytest.raises(ConfigError, match="at least one composition"):
        export_peft_all(llama, [], tmp_path / "x")
    with pytest.raises(ConfigError, match="a LoRA's name"):
        export_peft_all(llama, {"../y": {"language": "hau"}}, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    for arguments in ([], ["--all", "task=*", "--features", "task=ner"]):
        wrong = run(tmp_path, *arguments, "--out", tmp_path / "x")
        assert wrong.exit_code == 2 and "--features for one composition, or --all" in wrong.stderr


def _stand_in(monkeypatch: pytest.MonkeyPatch, ranks: Any, refuses: bool) -> None:
    """What vLLM's modules have of what is asked."""

    class Helper:
        @classmethod
        def from_local_dir(cls, folder: str, _: Any) -> Helper:
            assert (Path(folder) / "adapter_config.json").is_file()
            return cls()

        def validate_legal(self, settings: Any) -> None:
            assert settings["max_lora_rank"] in VLLM_RANKS
            if refuses:
                raise ValueError("no LoRAs today")

    parts = {
        "vllm": {},
        "vllm.config": {},
        "vllm.config.lora": {"LoRAConfig": dict, "MaxLoRARanks": Literal[ranks]},
        "vllm.lora": {},
        "vllm.lora.peft_helper": {"PEFTHelper": Helper},
    }
    for name, members in parts.items():
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    "ranks,refuses,said",
    [
        (VLLM_RANKS, False, []),
        ((*VLLM_RANKS, 1024), False, ["takes the ranks"]),
        (VLLM_RANKS, True, ["refuses hau: no LoRAs today"]),
    ],
)
def test_an_installed_vllm_is_asked(
    llama: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: Any,
    refuses: bool,
    said: list[str],
) -> None:
    _stand_in(monkeypatch, ranks, refuses)
    found = json.loads(
        run(tmp_path, "--all", "language=hau", "--out", tmp_path / "x", "--json").stdout
    )
    assert len(found["differs"]) == len(said)
    assert all(part in text for part, text in zip(said, found["differs"], strict=True))


def test_the_rules_of_an_installed_vllm_are_ours() -> None:
    lora = pytest.importorskip("vllm.config.lora")
    from typing import get_args

    assert tuple(sorted(get_args(lora.MaxLoRARanks))) == VLLM_RANKS
