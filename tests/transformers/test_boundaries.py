"""Models that do not keep packed texts apart are refused before they train on them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("transformers")

import flix  # noqa: E402
from flix import ConfigError  # noqa: E402
from flix.backends.torch import adapt  # noqa: E402
from flix.transformers import FlixCollator, FlixTrainer, pack  # noqa: E402
from flix.transformers.boundaries import BoundaryCheck  # noqa: E402

REGISTRY = flix.FeatureRegistry({"language": ["hau", "swa"]})
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**SIZES, intermediate_size=32),
    "gpt2": lambda: tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2),
    "opt": lambda: tf.OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16),
    "bloom": lambda: tf.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2),
    "mamba": lambda: tf.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4),
}  # fmt: skip
APART = ("llama", "gpt2")


def rows(length=12):
    texts = [{"input_ids": [*range(3, 3 + n)], "language": name} for n, name in ((5, "hau"), (4, "swa"), (6, "hau"))]  # fmt: skip
    return pack(texts, length)


def adapted(name):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]())
    left_out = ["dt_proj"] if name == "mamba" else []
    return adapt(model, flix.FlixConfig(registry=REGISTRY, ranks=2, exclude_modules=left_out))


def trainer(name, tmp_path, data):
    args = tf.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, remove_unused_columns=False
    )  # fmt: skip
    collator = FlixCollator(REGISTRY, per_token=True)
    return FlixTrainer(adapted(name), args, train_dataset=data, data_collator=collator)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_train_or_are_refused(name, tmp_path):
    made = trainer(name, tmp_path, rows())
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    if name in APART:
        made.train()
        assert made.state.global_step == 2
        return
    with pytest.raises(ConfigError, match="does not keep packed texts apart"):
        made.train()
    assert all(torch.equal(p, before[n]) for n, p in made.model.named_parameters())


def test_rows_of_one_text_are_no_packed_ones(tmp_path):
    one = [{**row, "language": ["hau"]} for row in pack([{"input_ids": [*range(3, 11)]}] * 4, 8)]
    made = trainer("opt", tmp_path, one)
    made.train()
    assert made.state.global_step == 2


def test_it_is_tried_once_and_leaves_the_model_alone():
    model, calls = adapted("llama").train(), []
    model.config.use_cache = False  # as FlixTrainer does
    model.register_forward_hook(lambda *_: calls.append(model.training))
    batch, check = FlixCollator(REGISTRY, per_token=True)(rows()), BoundaryCheck()
    state = torch.get_rng_state()
    check(model, batch)
    check(model, batch)
    assert calls == [False, False] and model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    model.config.use_cache = True  # with a cache, a packed row is one text
    with pytest.raises(ConfigError, match="does not keep packed texts apart"):
        BoundaryCheck()(model, batch)
    del calls[2:]
    padded = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    BoundaryCheck()(model, padded)
    assert len(calls) == 2
