"""The arms' configuration, and a study that is stopped in time."""

import time
from pathlib import Path

import pytest

from benchmarks.gpu_study import arms
from benchmarks.gpu_study.__main__ import main, rates_of
from flix.core.errors import SettingsError
from flix.study.jobs import Job


def config(rates=None, **more):
    given = {"timed": False, "dry": False, **more}
    return arms.config_of(Path("words"), Path("base"), rates or {}, 3, 1600, arms.Sizes(), **given)


def test_arms_and_claims_are_those_of_settle_on_another_base():
    made = config({"lora-compute": 3e-3})
    rate = {n: a["settings"]["training"]["learning_rate"] for n, a in made["arms"].items()}
    assert rate == {"flix": 1e-3, "lora-parameters": 0.5e-3, "lora-compute": 3e-3}
    assert made["arms"]["lora-parameters"]["lora"] == {"equal_parameters": "flix"}
    assert all(arm["leave_out"] == ["task=denoise"] for arm in made["arms"].values())
    assert len(made["claims"]) == 2 and made["seeds"] == [3]
    words, layer = made["common"]
    assert Path(words).is_absolute() and words.endswith("words/last_word.yaml")
    assert layer["model"].endswith("base") and layer["training"]["steps"] == 1600
    assert layer["evaluation"]["limit"] == 20 and "device" not in layer["training"]


def test_a_timed_run_logs_its_last_step():
    layer = config(timed=True)["common"][1]
    assert layer["training"]["log_every"] * 5 == 1600 and layer["evaluation"]["limit"] == 4
    assert arms.Sizes().timed % 5 == arms.TINY.timed % 5 == 0
    assert config(timed=True, dry=True)["common"][1]["training"]["device"] == "cpu"


def test_rates_are_read_or_refused():
    assert rates_of(["flix=2e-3", "lora-compute=0.01"]) == {"flix": 2e-3, "lora-compute": 0.01}
    for text in ("flix", "=1e-3", "flix=fast", "flix=0", "flix=nan", "flix=1e3"):
        with pytest.raises(SettingsError, match="--rate: must be ARM=RATE"):
            rates_of([text])
    with pytest.raises(SettingsError, match="there is no arm 'lora'; the arms are: flix, lora-"):
        config({"lora": 1e-3})


def test_what_is_told_is_kept_with_its_time(capsys):
    seen, job = arms.Timed(), Job("flix, seed 0", Path("x"), 5)
    follow = seen.follow([job])
    follow(job, {"event": "training", "step": 0, "steps": 5})
    follow(job, {"event": "step", "step": 1, "steps": 5, "loss": 2.0})
    assert [one.event["event"] for one in seen.told] == ["training", "step"]
    assert 0 <= seen.told[0].at <= seen.told[1].at < 10 and seen.told[0].run == "flix, seed 0"
    assert "flix, seed 0: step 1/5, loss 2.000" in capsys.readouterr().out


def test_it_is_stopped_at_the_time_and_again_if_it_goes_on():
    began, stops = time.monotonic(), 0
    with pytest.raises(arms.TimeUp), arms.stopped_at(began + 0.1, again=1.0):
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            stops += 1  # well before the next one, on a busy machine too
        time.sleep(60)
    assert stops == 1 and time.monotonic() - began < 50
    with arms.stopped_at(time.monotonic() + 0.2):
        pass
    time.sleep(0.3)  # no longer


def test_mistakes_are_one_line(tmp_path, capsys):
    pytest.importorskip("torch")
    words = str(tmp_path / "none")
    for more, told in (
        ([], "fingerprint.json: cannot be read"),
        (["--minutes", "2"], "--minutes: must be between 4 and 600"),
        (["--rate", "flux=1e-3"], "there is no arm 'flux'"),
    ):
        out = ["--out", str(tmp_path / "out")]
        assert main([words, *out, "--dry-run", *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and told in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
