"""TRL's trainers patch a model's forward and call its backbone past it: their losses are those of the merged models."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
import torch.nn.functional as F  # noqa: E402

from flix import ConfigError, RoutingError  # noqa: E402
from flix.backends.torch import adapt, merge  # noqa: E402
from flix.transformers import FlixCollator, FlixTrainerMixin  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.torch import parameters_of, randomize  # noqa: E402
from tests.helpers.zoo import pretrained, tokenizer_of  # noqa: E402

NER, POS = {"language": "hau", "task": "ner"}, {"language": "swa", "task": "pos"}


class FlixSFT(FlixTrainerMixin, trl.SFTTrainer):
    pass


class FlixDPO(FlixTrainerMixin, trl.DPOTrainer):
    pass


def _model(**changes):
    model = adapt(pretrained("llama", dtype=torch.float32), config(**changes))
    randomize(model, std=0.3)
    return model


def _tokenizer():
    tokenizer = copy.deepcopy(tokenizer_of("llama"))
    tokenizer.eos_token = "w39"
    return tokenizer


def _plain(model, row):
    """The merged model, without the forward that the trainer has put on the adapted one."""
    model = copy.deepcopy(model)
    vars(model).pop("forward", None)
    return merge(model, row).eval()


def _settings(kind, folder, **changes):
    usual = {"max_steps": 2, "learning_rate": 0.0, "report_to": [], "use_cpu": True, "bf16": False}
    usual |= {"logging_steps": 1, "disable_tqdm": True, "per_device_train_batch_size": 4}
    return kind(output_dir=str(folder), **{**usual, **changes})


def _logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# Supervised fine-tuning


TEXTS = [[3, 9, 7, 5], [4, 4, 11, 30, 12], [8, 20, 21], [9, 10, 11, 12]]
ROWS = [NER, POS, POS, NER]


def _sft(tmp_path, model, padding_free=False, **changes):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    data = [{"input_ids": text, **row} for text, row in zip(TEXTS, ROWS, strict=True)]
    data = datasets.Dataset.from_list(data)
    inner = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
    return FlixSFT(
        model=model, args=_settings(trl.SFTConfig, tmp_path, **changes), train_dataset=data, eval_dataset=data,
        processing_class=_tokenizer(), data_collator=FlixCollator(model.flix_config, inner),
    )  # fmt: skip


@pytest.mark.parametrize("by_feature", [True, False])
def test_fine_tunings_losses_are_those_of_the_merged_models(tmp_path, by_feature):
    model = _model()
    trainer = _sft(tmp_path, model)
    trainer.loss_by_feature = by_feature
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.train()
    total = count = 0.0
    for text, row in zip(TEXTS, ROWS, strict=True):
        ids = torch.tensor([text])
        total += float(_plain(model, row)(input_ids=ids, labels=ids).loss) * (len(text) - 1)
        count += len(text) - 1
    assert evaluated == pytest.approx(total / count, rel=1e-4)
    assert _logged(trainer, "loss")[0] == pytest.approx(total / count, rel=1e-3)
    assert bool(_logged(trainer, "loss/task=pos")) == by_feature


def test_fine_tuning_trains_the_features_of_its_rows_alone(tmp_path):
    model = _model()
    before = {f: p.detach().clone() for f, p in parameters_of(model).items()}
    trainer = _sft(tmp_path, model, learning_rate=0.01, weight_decay=0.1)
    trainer.train()
    moved = {f for f, p in parameters_of(model).items() if not torch.equal(p, before[f])}
    assert moved == {("language", "hau"), ("language", "swa"), ("task", "ner"), ("task", "pos")}
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "flix.safetensors").exists()


def test_rows_joined_into_one_are_refused(tmp_path):
    trainer = _sft(tmp_path, _model(), padding_free=True)
    with pytest.raises(RoutingError, match="routes 4 rows, but the batch has 1 rows"):
        trainer.evaluate()


def test_an_adapted_head_is_refused_where_its_kernel_is_used_past_it(tmp_path):
    with pytest.raises(ConfigError, match="output head's kernel without calling it"):
        _sft(tmp_path, _model(target_modules=["q_proj", "lm_head"]))


# Preferences


PAIRS = [
    {"prompt": "w3 w9", "chosen": " w7 w5 w6", "rejected": " w8 w4", **NER},
    {"prompt": "w4 w11 w5", "chosen": " w30 w12", "rejected": " w10 w21 w3", **POS},
]


def _dpo(tmp_path, model, reference=None):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    data = datasets.Dataset.from_list(PAIRS)
    inner = DataCollatorForPreference(pad_token_id=0)
    return FlixDPO(
        model=model, ref_model=reference, args=_settings(trl.DPOConfig, tmp_path, max_steps=1), train_dataset=data,
        eval_dataset=data, processing_class=_tokenizer(), data_collator=FlixCollator(model.flix_config, inner),
    )  # fmt: skip


def _log_probability(model, prompt, answer):
    ids = torch.tensor([prompt + answer])
    scores = F.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
    return float(scores.gather(1, ids[0, 1:, None]).sum(0)) - float(
        scores[: len(prompt) - 1].gather(1, ids[0, 1 : len(prompt), None]).sum(0)
    )


def _expected(model, reference, batches):
    losses = []
    for pair in batches:
        row = {"language": pair["language"], "task": pair["task"]}
        own = _plain(model, row)
        other = _plain(reference, row) if hasattr(reference, "flix_state") else reference.eval()
        margin = 0.0
        for sign, answer in ((1, pair["chosen_ids"]), (-1, pair["rejected_ids"])):
            for factor, one in ((1, own), (-1, other)):
                margin += sign * factor * _log_probability(one, pair["prompt_ids"], answer)
        losses.append(-float(F.logsigmoid(torch.tensor(0.1 * margin, dtype=torch.float64))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("reference", ["base", "adapted"])
def test_preferences_losses_are_those_of_the_merged_models(tmp_path, reference):
    """By default the reference is the base, loaded from its folder; a copy of the model is routed as it is."""
    model = _model()
    other = None
    if reference == "adapted":
        other = copy.deepcopy(model)
        randomize(other, seed=5, std=0.3)
    trainer = _dpo(tmp_path, model, other)
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.train()
    kept = other if other is not None else pretrained("llama", dtype=torch.float32)
    expected = _expected(model, kept, list(trainer.train_dataset))
    assert abs(expected - 0.6931) > 1e-3, "the model and its reference must differ"
    assert evaluated == pytest.approx(expected, rel=1e-4)
    assert _logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-3)
