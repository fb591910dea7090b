"""Adapted layers act where their parents would keep them from it: torch's fused encoder, DeBERTa's tables."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from torch import nn  # noqa: E402

from flix.backends.torch import adapt, merge, share_base  # noqa: E402
from flix.backends.torch.layer import flix_layers  # noqa: E402
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import randomize, routing  # noqa: E402

# torch's encoder


def _encoder(layers=2, **changes):
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, **changes)
    return nn.TransformerEncoder(block, layers).double()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_encoder_acts_in_evaluation(grad, activation, masked):
    model = adapt(_encoder(activation=activation), config())
    randomize(model, std=0.3)
    assert len(list(flix_layers(model))) == 8, "two linear layers of each block, two projections"
    rows = [*ROWS[:3], ROWS[0]]
    x, (ids, weights) = torch.randn(4, 7, 16).double(), routing(rows)
    mask = (torch.arange(7) >= torch.tensor([7, 3, 5, 6])[:, None]) if masked else None
    found = {}
    with torch.set_grad_enabled(grad):
        for training in (True, False):
            for _ in range(2):  # watched, and not
                y = model.train(training)(x, src_key_padding_mask=mask, flix_features=ids, flix_weights=weights)  # fmt: skip
            found[training] = y if mask is None else y.masked_fill(mask[..., None], 0.0)
    assert_close(found[False], found[True])
    for i, row in enumerate(rows):
        own = None if mask is None else mask[i : i + 1]
        alone = merge(model, row).train()(x[i : i + 1], src_key_padding_mask=own)
        assert_close(found[False][i : i + 1], alone if own is None else alone.masked_fill(own[..., None], 0.0))  # fmt: skip
    base = _encoder(activation=activation).train()(x, src_key_padding_mask=mask)
    assert_far(found[False][0], base[0])


def test_a_plain_encoder_has_its_fused_path_again(tmp_path):
    base = _encoder()
    before = [block.activation_relu_or_gelu for block in base.layers]
    assert base.use_nested_tensor
    model = adapt(copy.deepcopy(base), config(target_modules=["layers.1.linear1"]))
    assert model.layers[0].activation_relu_or_gelu == before[0], "no adapted layer inside"
    assert model.layers[1].activation_relu_or_gelu == 0
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.layers[1].activation_relu_or_gelu == 0
    assert not model.use_nested_tensor
    for plain in (merge(model, ROWS[0]), share_base(model)):
        assert plain.use_nested_tensor
        assert [block.activation_relu_or_gelu for block in plain.layers] == before
        assert not any(name.startswith("flix_") for m in plain.modules() for name in vars(m))


# DeBERTa's tables of positions


def _deberta(share, **changes):
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(0)
    settings = DebertaV2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=share, position_buckets=8,
        norm_rel_ebd="layer_norm", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    model = adapt(DebertaV2Model(settings).double().eval(), config(**changes))
    randomize(model, std=0.3)
    return model


MIXED = [ROWS[0], ROWS[1], ROWS[0], ROWS[2], ROWS[1], {"task": "ner"}]
TOKENS = torch.randint(3, 40, (6, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("share", [True, False])
def test_debertas_tables_act_as_each_row_needs(share):
    model, (ids, weights) = _deberta(share), routing(MIXED)
    mask = torch.ones_like(TOKENS)
    mask[1, 5:] = 0
    for training in (False, True):
        model.train(training)
        found = model(TOKENS, attention_mask=mask, flix_features=ids, flix_weights=weights)
        for i, row in enumerate(MIXED):
            merged = merge(model, row)
            alone = merged(TOKENS[i : i + 1], attention_mask=mask[i : i + 1]).last_hidden_state
            assert_close(found.last_hidden_state[i : i + 1], alone)


def test_gradients_through_debertas_tables_are_the_rows_together():
    model, (ids, weights) = _deberta(True), routing(MIXED)
    parameters = {f: model.flix_bank.parameter(f) for f in [("language", "swa"), ("task", "pos")]}

    def gradients(batches, wanted=False):
        model.zero_grad()
        own = weights.double().requires_grad_(wanted)
        for part in batches:
            y = model(TOKENS[part], flix_features=ids[part], flix_weights=own[part])
            y.last_hidden_state.square().sum().backward()
        return [p.grad.clone() for p in parameters.values()], own.grad

    each = [slice(i, i + 1) for i in range(len(MIXED))]
    (together, _), (apart, _) = gradients([slice(0, 6)]), gradients(each)
    (by_weight, found), (_, expected) = gradients([slice(0, 6)], True), gradients(each, True)
    for a, b, c in zip(together, apart, by_weight, strict=True):
        assert_close(a, b)
        assert_close(c, b)
    assert_close(found, expected)


def test_deberta_under_a_compiler():
    torch._dynamo.reset()
    model, (ids, weights) = _deberta(True, target_modules=["query_proj", "key_proj"]), routing(MIXED)  # fmt: skip
    expected = model(TOKENS, flix_features=ids, flix_weights=weights).last_hidden_state
    compiled = torch.compile(model, backend="eager")
    found = compiled(TOKENS, flix_features=ids, flix_weights=weights).last_hidden_state
    assert_close(found, expected)


def test_a_plain_deberta_has_its_own_attention_again():
    model = _deberta(True)
    assert any("disentangled_attention_bias" in vars(m) for m in model.modules())
    twin = pickle.loads(pickle.dumps(model))
    ids, weights = routing(MIXED)
    given = {"input_ids": TOKENS, "flix_features": ids, "flix_weights": weights}
    assert_close(twin(**given).last_hidden_state, model(**given).last_hidden_state)
    plain = merge(model, ROWS[0])
    assert not any("disentangled_attention_bias" in vars(m) for m in plain.modules())
