"""vLLM's rules, each broken by one LoRA."""

import json

import pytest

from flix.core.peft.vllm import VLLM_RANKS, check_vllm
from tests.helpers.loras import STEM, Q, lora


def check(made, **changes):
    return check_vllm(*made, **{"architecture": "LlamaForCausalLM", **changes})


def refused(report, rule, *found):
    """The one problem is this one, says what was found, and what to do; no flags come with it."""
    (problem,) = report.problems
    assert rule in problem.rule and all(text in problem.found for text in found), problem
    assert problem.remedy and not report.ok and report.flags == report.command == ""
    assert str(problem) in str(report)


@pytest.mark.parametrize("rank", [1, 2, 8, 9, 64, 257, 320, 321, 512])
def test_the_flags(rank):
    report = check(lora(rank), model="sw-ner", folder="out/sw-ner", base="my/base")
    needed = min(r for r in VLLM_RANKS if r >= rank)
    assert report.ok and report.max_lora_rank == needed and not report.notes
    assert (
        report.flags == f"--enable-lora --max-lora-rank {needed} --lora-modules sw-ner=out/sw-ner"
    )
    assert report.command == f"vllm serve my/base {report.flags}"
    assert '"model": "sw-ner"' in str(report) and report.command in str(report)
    assert report.to_dict()["command"] == report.command


def test_names_with_blanks_are_quoted():
    report = check(lora(), model="a", folder="my loras/a", base="my base")
    assert "--lora-modules 'a=my loras/a'" in report.flags and "'my base'" in report.command


def test_a_rank_too_large():
    report = check(lora(513))
    refused(report, "at most 512", "513")
    assert report.max_lora_rank is None and "compress_to=512" in str(report)


@pytest.mark.parametrize(
    ("settings", "rule", "found"),
    [
        ({"bias": "all"}, "no biases", "all"),
        ({"lora_bias": True}, "no biases", "lora_bias"),
        ({"modules_to_save": ["score", "embed_tokens"]}, "modules_to_save", "score, embed_tokens"),
        ({"use_dora": True}, "plain LoRA", "DoRA"),
        ({"alora_invocation_tokens": [1]}, "plain LoRA", "alora"),
        ({"layer_replication": [[0, 2]]}, "plain LoRA", "layer_replication"),
        ({"use_qalora": True}, "plain LoRA", "qalora"),
        ({"init_lora_weights": "pissa_niter_4"}, "PEFT started from", "pissa_niter_4"),
        ({"rank_pattern": {"q_proj": 4}}, "one rank", "q_proj"),
        ({"alpha_pattern": {"q_proj": 8}}, "one rank and one alpha", "alpha_pattern"),
        ({"r": 8}, "configuration's rank, 8", Q),
    ],
)
def test_settings_that_are_refused(settings, rule, found):
    refused(check(lora(4, **settings)), rule, found)


@pytest.mark.parametrize("settings", [{"init_lora_weights": "gaussian"}, {"use_rslora": True}])
def test_settings_that_are_served(settings):
    assert check(lora(4, **settings)).ok


def test_the_rank_counts_patterned_layers():
    config, shapes = lora(4)
    shapes[f"{STEM}{Q}.lora_A.weight"] = (20, 16)
    report = check((config, shapes))
    assert report.max_lora_rank == 32 and not report.ok


def test_tensors_of_another_kind():
    config, shapes = lora()
    shapes[f"{STEM}score.weight"] = (2, 16)
    refused(check((config, shapes)), "tensors are named", f"{STEM}score.weight")


def test_whole_modules_are_one_problem():
    config, shapes = lora(modules_to_save=["score"])
    shapes[f"{STEM}score.weight"] = (2, 16)
    refused(check((config, shapes)), "modules_to_save", "score")


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "BertModel", "XLMRobertaModel"])
def test_bases_that_take_no_lora(architecture):
    refused(check(lora(), architecture=architecture), "class for the base", architecture)


def test_encoder_decoders_are_refused():
    report = check(lora(), architecture="T5ForConditionalGeneration", encoder_decoder=True)
    refused(report, "is a decoder", "T5ForConditionalGeneration")
    assert str(report).startswith("vLLM would not serve it: its rule is that the base is a decoder")


@pytest.mark.parametrize("architecture", [None, "MyForCausalLM"])
def test_unknown_bases_are_left_to_the_user(architecture):
    report = check(lora(), architecture=architecture, base="my/base")
    assert report.ok and architecture in (None, "MyForCausalLM")
    assert (architecture or "my/base") in report.notes[0] and "note: " in str(report)


EMBEDDING = "model.embed_tokens"


def test_embeddings_and_heads_where_they_are_declared():
    made = lora(4, Q, "lm_head", embeddings=[EMBEDDING])
    assert check(made, vocabulary=40).ok
    refused(
        check(made, architecture="Gemma2ForCausalLM"), "besides linear", "embed_tokens, lm_head"
    )
    lately = check(made, architecture="Qwen3ForCausalLM")
    assert lately.ok and "2026" in lately.notes[0]
    unknown = check(made, architecture=None)
    assert unknown.ok and len(unknown.notes) == 2


def test_other_embeddings_are_refused():
    refused(check(lora(4, embeddings=["model.wpe"])), "besides linear", "model.wpe")


def test_the_vocabulary_counts():
    report = check(lora(4, embeddings=[EMBEDDING]), vocabulary=41)
    refused(report, "vocabulary exactly", "40", "41")
    refused(check(lora(4, "lm_head"), vocabulary=300_000), "at most 257,024", "300,000")
    assert check(lora(4), vocabulary=300_000).ok


def test_several_problems_are_all_said():
    report = check(lora(600, bias="all", use_dora=True))
    assert len(report.problems) == 3 and str(report).count("would not serve") == 3
    assert len(json.loads(json.dumps(report.to_dict()))["problems"]) == 3
