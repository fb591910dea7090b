"""Whisper cuts and repeats the rows of a batch by itself: each gets, token for token, what its composition gives."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix import RoutingError  # noqa: E402
from flix.backends.torch import adapt, disable, merge, routed  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.torch import randomize, routing  # noqa: E402

ROWS = [{"language": "hau"}, {"language": "swa", "task": "pos"}, {"task": "ner"}, {"language": "hau"}]  # fmt: skip
UNEQUAL = [40, 100, 75, 100]  # frames; a piece has 40


def _model(**changes):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    settings = WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=20,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, init_std=0.3,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(settings).double().eval()
    for name, value in {"no_timestamps_token_id": 50, "is_multilingual": False, "return_timestamps": True, **changes}.items():  # fmt: skip
        setattr(model.generation_config, name, value)
    model = adapt(model, config())
    randomize(model, std=0.3)
    return model.eval()


def _audio():
    frames = torch.arange(100)
    mask = (frames < torch.tensor(UNEQUAL)[:, None]).long()
    audio = torch.randn(4, 8, 100, generator=torch.Generator().manual_seed(2)).double()
    return audio * mask[:, None], mask


def _held_to_merge(model, each=1, frames=100, **arguments):
    """Each row of a mixed batch against the same batch under its composition alone."""
    audio, mask = (whole[..., :frames] for whole in _audio())
    ids, weights = routing(ROWS)
    given = {"attention_mask": mask, "max_new_tokens": 5, **arguments}
    torch.manual_seed(1)
    found = model.generate(audio, flix_features=ids, flix_weights=weights, **given)
    other = 0
    for i, row in enumerate(ROWS):
        torch.manual_seed(1)
        alone = merge(model, row).generate(audio, **given)
        for j in range(each * i, each * (i + 1)):
            length = max(found.shape[1], alone.shape[1])
            mine, its = (
                torch.nn.functional.pad(t, (0, length - t.shape[1])) for t in (found, alone)
            )
            assert torch.equal(mine[j], its[j]), (i, j)
            other += not torch.equal(mine, its)
    assert other, "the compositions must differ"
    return found


def test_long_audio_of_unequal_lengths():
    _held_to_merge(_model())


@pytest.mark.parametrize("way", [{"num_beams": 2}, {"cache_implementation": "static"}])
def test_long_audio_by_beams_and_with_static_caches(way):
    _held_to_merge(_model(), **way)


def test_several_sequences_of_a_row_are_its_own():
    # Of one choice only, samples are the greedy tokens.
    way = {"do_sample": True, "top_k": 1, "num_return_sequences": 2, "temperature": 1.0}
    found = _held_to_merge(_model(), each=2, **way)
    assert len(found) == 2 * len(ROWS)


def test_pieces_that_came_out_badly_are_decoded_again_under_their_own_rows(monkeypatch):
    model, seen = _model(), []

    def badly(self, sequence, outputs, index, *args):
        """The second and third of four at the first temperature, then the second of two."""
        seen.append((args[-1], index))
        return (args[-1], index) in {(0.0, 1), (0.0, 2), (0.1, 1)}, False

    monkeypatch.setattr(type(model).flix_plain, "_need_fallback", badly)
    _held_to_merge(model, frames=40, temperature=(0.0, 0.1, 0.2), logprob_threshold=-1.0, top_k=1)
    assert seen[:7] == [*((0.0, i) for i in range(4)), (0.1, 0), (0.1, 1), (0.2, 0)]
    _held_to_merge(model, temperature=(0.0, 0.1, 0.2), logprob_threshold=-1.0, top_k=1)


def test_the_language_is_found_under_each_rows_features():
    changes = {"is_multilingual": True, "lang_to_id": {f"<|l{i}|>": 20 + i for i in range(20)}}
    model = _model(**changes, task_to_id={"transcribe": 45, "translate": 46})
    assert len(_held_to_merge(model, task="transcribe").unique(dim=0)) > 1
    audio, _ = _audio()
    with pytest.raises(RoutingError, match="called without routing"):
        model.generate(audio, max_new_tokens=5)


def test_one_composition_for_all_and_the_base_alone():
    model = _model()
    audio, mask = _audio()
    given = {"attention_mask": mask, "max_new_tokens": 5}
    with routed(model, ROWS[1]):
        assert torch.equal(model.generate(audio, **given), merge(model, ROWS[1]).generate(audio, **given))  # fmt: skip
    with disable(model):
        base = model.generate(audio, **given)
    assert torch.equal(base, model.generate(audio, flix_features=torch.full((4, 1), -1), **given))
    with pytest.raises(RoutingError, match="routes 3 rows, but the batch has 4 rows"):
        model.generate(audio, flix_features=torch.zeros(3, 1, dtype=torch.int64), **given)
