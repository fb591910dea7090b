"""Whose rows a layer's input holds: right, or refused with the layer's name; never by a size that happens to fit."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from torch import nn  # noqa: E402

from flix import RoutingError  # noqa: E402
from flix.backends.torch import FlixLinear, adapt, merge  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.tolerance import assert_close  # noqa: E402
from tests.helpers.torch import randomize, routing  # noqa: E402

ROWS = [{"language": "hau"}, {"language": "swa"}, {"language": "hau"}, {"language": "swa"}]
DOUBT = "not known whose rows these are.*leave the layer out when adapting .exclude_modules."


def _ids(rows=ROWS):
    return routing(rows)[0]


def _adapted(model, **changes):
    torch.manual_seed(0)
    model = adapt(model.double(), config(**changes))
    randomize(model, std=0.3)
    return model.eval()


class Mixture(nn.Module):
    """Experts of one linear layer or two, which get the tokens whose ids leave their number."""

    def __init__(self, name, pick="index", deep=False):
        super().__init__()
        self.name, self.pick = name, pick
        self.emb = nn.Embedding(20, 6)
        made = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) if deep else nn.Linear(6, 6) for _ in range(2)]  # fmt: skip
        setattr(self, name, nn.ModuleList(made))

    def forward(self, input_ids):
        x = self.emb(input_ids)
        flat, which = x.reshape(-1, 6), input_ids.reshape(-1) % 2
        out = torch.zeros_like(flat)
        for number, expert in enumerate(getattr(self, self.name)):
            mask = which == number
            if self.pick == "mask":
                out[mask] = expert(flat[mask])
            elif self.pick == "select":
                chosen = mask.nonzero()[:, 0]
                out.index_add_(0, chosen, expert(flat.index_select(0, chosen)))
            else:
                chosen = mask.nonzero()[:, 0]
                out.index_add_(0, chosen, expert(flat[chosen]))
        return out.view_as(x)


# As many tokens for each expert as the batch has rows; then as many as it has tokens.
FITTING = [
    torch.tensor([[0, 2], [4, 6], [1, 3], [5, 7]]),
    torch.tensor([[0, 2], [4, 6], [2, 8], [6, 4]]),
]


@pytest.mark.parametrize("tokens", FITTING, ids=["rows", "all"])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("pick", ["index", "mask", "select"])
def test_experts_are_refused_where_their_sizes_fit(pick, deep, tokens):
    model = _adapted(Mixture("experts", pick, deep))
    for _ in range(2):
        with pytest.raises(RoutingError, match=rf"'experts\.0.*{DOUBT}"):
            model(input_ids=tokens, flix_features=_ids())


@pytest.mark.parametrize("pick", ["index", "mask", "select"])
def test_experts_of_any_name_are_known_by_what_they_get(pick):
    model = _adapted(Mixture("branches", pick))
    for tokens in (FITTING[0], FITTING[0].flip(0)):
        with pytest.raises(RoutingError, match=rf"'branches\.[01]'.*{DOUBT}"):
            model(tokens, flix_features=_ids())


@pytest.mark.parametrize("name", ["experts", "branches"])
def test_one_composition_is_never_in_doubt(name):
    model = _adapted(Mixture(name))
    for rows in (1, 3):
        for tokens in (torch.arange(8).expand(rows, 8), torch.arange(8 * rows).view(rows, 8) % 20):
            for row in ROWS[:2]:
                found = model(input_ids=tokens, flix_features=_ids([row] * rows))
                assert_close(found, merge(model, row)(tokens))


def test_one_composition_trains_what_the_rows_together_do():
    model, tokens = _adapted(Mixture("experts")), torch.arange(24).view(3, 8) % 20
    parameter = model.flix_bank.parameter(("language", "hau"))
    model(input_ids=tokens, flix_features=_ids(ROWS[:1] * 3)).square().sum().backward()
    together, parameter.grad = parameter.grad, None
    for row in tokens:
        model(input_ids=row[None], flix_features=_ids(ROWS[:1])).square().sum().backward()
    assert_close(together, parameter.grad)


def test_weights_that_want_gradients_keep_their_rows_apart():
    model, tokens = _adapted(Mixture("experts")), torch.arange(24).view(3, 8) % 20
    weights = torch.ones(3, 1, requires_grad=True)
    with pytest.raises(RoutingError, match="exclude_modules"):
        model(input_ids=tokens, flix_features=_ids(ROWS[:1] * 3), flix_weights=weights)


def test_left_out_experts_are_the_way_out():
    model = _adapted(nn.ModuleDict({"q": nn.Linear(6, 6), "moe": Mixture("experts")}), exclude_modules=["experts.0", "experts.1"])  # fmt: skip
    assert [path for path, m in model.named_modules() if isinstance(m, FlixLinear)] == ["q"]


def test_shared_and_dense_experts_see_every_token():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
            self.shared_expert = nn.Linear(6, 6)

        def forward(self, x):
            shared = self.shared_expert(x.reshape(-1, 6)).view_as(x)
            return shared + sum(expert(x) for expert in self.experts)

    model, x = _adapted(Dense()), torch.randn(4, 5, 6).double()
    found = model(x, flix_features=_ids())
    for i, row in enumerate(ROWS):
        assert_close(found[i : i + 1], merge(model, row)(x[i : i + 1]))


def test_what_was_seen_gathered_stays_refused():
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(6, 6)

        def forward(self, x, count):
            return self.part(x.flatten(0, 1).narrow(0, 0, count))  # no index that could be seen

    model, x = _adapted(Some()), torch.randn(4, 5, 6).double()
    with pytest.raises(RoutingError, match=r"leading shape \[7\]"):
        model(x, 7, flix_features=_ids())
    for fitting in (4, 20):
        with pytest.raises(RoutingError, match="'part'"):
            model(x, fitting, flix_features=_ids())


def test_poolers_get_one_position_of_each_row():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(6, 6)

        def forward(self, x, last):
            first = self.dense(x[:, 0])
            by_mask = self.dense(x[torch.arange(5) == last[:, None]])
            return first + self.dense(x[torch.arange(len(x)), last]) + by_mask

    model, x = _adapted(Pooled()), torch.randn(4, 5, 6).double()
    last = torch.tensor([4, 0, 2, 1])
    found = model(x, last, flix_features=_ids())
    for i, row in enumerate(ROWS):
        assert_close(found[i : i + 1], merge(model, row)(x[i : i + 1], last[i : i + 1]))


# The sequence first


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x):
        return self.proj(x.transpose(0, 1)).transpose(0, 1)


def test_layers_that_were_seen_time_first_stay_refused_when_sizes_agree():
    model = _adapted(TimeFirst())
    for length in (5, 4):
        with pytest.raises(RoutingError, match=r"'proj'.*exclude_modules"):
            model(torch.randn(4, length, 6).double(), flix_features=_ids())
    x = torch.randn(4, 4, 6).double()
    assert_close(model(x, flix_features=_ids(ROWS[:1] * 4)), merge(model, ROWS[0])(x))


@pytest.mark.parametrize("turn", ["transpose", "permute"])
def test_a_first_batch_as_long_as_it_has_rows_is_known_by_what_was_done_to_it(turn):
    class Turned(TimeFirst):
        def forward(self, x):
            x = torch.tanh(x.permute(1, 0, 2) if turn == "permute" else x.transpose(0, 1))
            return self.proj(x + 1).transpose(0, 1)

    x = torch.randn(4, 4, 6).double()
    for first in (None, 1):
        model = _adapted(Turned())
        if first:  # seen with one row, then with several
            alone = model(x[:1], flix_features=_ids(ROWS[:1]))
            assert_close(alone, merge(model, ROWS[0])(x[:1]))
        for _ in range(2):
            with pytest.raises(RoutingError, match=r"'proj'.*exclude_modules"):
                model(x, flix_features=_ids())


def test_what_is_turned_back_before_a_layer_is_in_no_doubt():
    class Back(TimeFirst):
        def forward(self, x):
            return self.proj(torch.tanh(x.transpose(0, 1)).transpose(0, 1))

    model, x = _adapted(Back()), torch.randn(4, 4, 6).double()
    found = model(x, flix_features=_ids())
    for i, row in enumerate(ROWS):
        assert_close(found[i : i + 1], merge(model, row)(x[i : i + 1]))


def test_a_mistake_in_the_number_of_rows_leaves_nothing_behind():
    model = _adapted(nn.Sequential(nn.Linear(6, 6)))
    x = torch.randn(5, 4, 6).double()
    with pytest.raises(RoutingError, match=r"leading shape \[5, 4\]"):
        model(x, flix_features=_ids())
    five = [*ROWS, ROWS[0]]
    found = model(x, flix_features=_ids(five))
    for i, row in enumerate(five):
        assert_close(found[i : i + 1], merge(model, row)(x[i : i + 1]))


def test_torchs_blocks_say_that_the_sequence_comes_first():
    block = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0)
    model = _adapted(nn.TransformerEncoder(block, 1, enable_nested_tensor=False))
    x = torch.randn(4, 4, 8).double()
    with pytest.raises(RoutingError, match=r"linear1.*batch_first=False"):
        model(x, flix_features=_ids())
    assert_close(model(x, flix_features=_ids(ROWS[:1] * 4)), merge(model, ROWS[0])(x))


# One row for all


class Tables(nn.Module):
    """Tables of positions as models have them: ``[1, S]`` through an embedding, and through a linear layer."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(20, 6), nn.Embedding(9, 6)
        self.table, self.proj = nn.Parameter(torch.randn(1, 9, 6)), nn.Linear(6, 6)

    def forward(self, input_ids):
        length = input_ids.shape[1]
        places = self.places(torch.arange(length)[None])
        return self.words(input_ids) + places + self.proj(self.table[:, :length])


@pytest.mark.parametrize("length", [3, 4])
def test_one_row_for_all_acts_as_each_row_needs(length):
    model = _adapted(Tables(), target_modules=["words", "places", "proj"])
    tokens = torch.arange(4 * length).view(4, length) % 20
    for given in ({"input_ids": tokens}, {}):
        found = model(*(() if given else (tokens,)), **given, flix_features=_ids())
        for i, row in enumerate(ROWS):
            assert_close(found[i : i + 1], merge(model, row)(tokens[i : i + 1]))


def _vision():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, intermediate_size=24, **sizes))  # fmt: skip


def _speech():
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 12}
    settings = Wav2Vec2Config(
        intermediate_size=24, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, **sizes,
    )  # fmt: skip
    return Wav2Vec2ForCTC(settings)


def _features():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    settings = WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=20,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    return WhisperForConditionalGeneration(settings)


@pytest.mark.parametrize(
    "make,name,shape",
    [
        (lambda: nn.Sequential(nn.Linear(6, 6)), None, (1, 6)),
        (lambda: nn.Sequential(nn.Linear(6, 6)), None, (1, 5, 6)),
        (_vision, "pixel_values", (1, 3, 16, 16)),
        (_speech, "input_values", (1, 800)),
        (_features, "input_features", (1, 8, 40)),
    ],
    ids=["vector", "sequence", "vision", "speech", "features"],
)
def test_one_input_row_with_four_rows_of_ids_is_a_mistake(make, name, shape):
    model, x = _adapted(make()), torch.randn(shape).double()
    ways = [((x,), {})] + ([((), {name: x})] if name else [])
    for args, kwargs in ways:
        with pytest.raises(RoutingError, match=r"routes 4 rows, but the batch has 1 rows"):
            model(*args, **kwargs, flix_features=_ids())
    if name:
        for args, kwargs in ways:
            extra = {"decoder_input_ids": torch.tensor([[3]])} if name == "input_features" else {}
            model(*args, **kwargs, **extra, flix_features=_ids(ROWS[:1]))  # as many rows as ids


def test_a_layer_by_hand_takes_as_many_rows_as_ids():
    layer = FlixLinear(6, 6, config=config())
    with pytest.raises(RoutingError, match=r"leading shape \[1\].*= \[4\]"):
        layer(torch.randn(1, 6), flix_features=_ids())


def test_more_rows_or_positions_of_equal_ids_than_the_input_has_are_refused():
    model = adapt(nn.Sequential(nn.Linear(8, 8)), config()).train()
    for shape, ids in (((1, 2, 8), (2, 1)), ((3, 4, 8), (4, 1)), ((3, 9, 8), (3, 10, 1))):
        with pytest.raises(RoutingError):
            model(torch.randn(shape), flix_features=torch.zeros(ids, dtype=torch.long))
        right = ids[:-1] if len(ids) == 3 else (shape[0],)
        fits = torch.zeros((*right[:1], *shape[1 : len(right)], 1), dtype=torch.long)
        assert model(torch.randn(shape), flix_features=fits).shape == shape
