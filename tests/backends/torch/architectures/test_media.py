"""Models that see and hear: each row under its own features, through windows, frames and two towers."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5")

from flix import AdapterError, RoutingError  # noqa: E402
from flix.backends.torch import adapt, export_peft, load, merge, routed, save  # noqa: E402
from tests.helpers.claims import over  # noqa: E402
from tests.helpers.media import MEDIA, make  # noqa: E402
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import (  # noqa: E402
    dense_model,
    live_pairs,
    output,
    project_back,
    randomize,
    routing,
)

ROW = {"language": "swa", "task": "pos"}


def over_media(*features):
    return over(MEDIA, *features, backend="media")


def adapted_of(name, **changes):
    changes = {"exclude_modules": MEDIA[name].excluded, **changes}
    model = adapt(make(name), config(**changes))
    randomize(model, std=0.2)
    return model.eval()


def run(model, name, rows=ROWS, **inputs):
    ids, weights = routing(rows)
    inputs = inputs or MEDIA[name].inputs(len(rows))
    return output(model(**inputs, flix_features=ids, flix_weights=weights))


def plain(model, name, rows=4):
    with torch.no_grad():
        return output(model(**MEDIA[name].inputs(rows)))


@over_media("mixed batch", "gradients")
def test_mixed_batch_equals_dense_rows(name):
    base, model = make(name), adapted_of(name)
    ids, weights = routing()
    inputs = MEDIA[name].inputs(len(ROWS))
    expected, leaves, _ = dense_model(base, model, ids, weights, inputs)
    for _ in range(2):  # the second call is not watched
        found = run(model, name)
        assert_close(found, expected)
    assert_far(found, plain(base, name))
    project_back(found)
    project_back(expected)
    for pair, parameter in live_pairs(model).items():
        wanted = leaves[pair].grad
        if wanted is None or parameter.grad is None:
            assert all(g is None or not g.any() for g in (wanted, parameter.grad)), pair
        else:
            assert_close(parameter.grad, wanted, name=pair)


@over_media("save and load")
def test_an_adapter_loads_into_a_fresh_model(name, tmp_path):
    model = adapted_of(name)
    save(model, tmp_path)
    with torch.no_grad():
        assert_close(run(load(make(name), tmp_path).eval(), name), run(model, name))


@over_media("merge", "routed")
def test_a_merged_model_is_what_one_composition_gives(name):
    model = adapted_of(name)
    merged = plain(merge(model, ROW), name, 2)
    with torch.no_grad(), routed(model, ROW):
        assert_close(output(model(**MEDIA[name].inputs(2))), merged)
        assert_close(run(model, name, [ROW] * 2), merged)
    assert_far(plain(make(name), name, 2), merged)


@over_media("PEFT")
def test_an_exported_composition_opens_in_peft(name, tmp_path):
    peft = pytest.importorskip("peft")
    changes = {}
    if name == "siglip":  # torch's own attention pools its images
        changes["exclude_modules"] = ["head.attention.out_proj"]
        with pytest.raises(AdapterError, match=r"head\.attention\.out_proj' .*twice"):
            export_peft(adapted_of(name), ROW, tmp_path)
    model = adapted_of(name, **changes)
    with torch.no_grad():  # files are in float32; SAM makes much of a little
        for parameter in model.flix_bank.parameters():
            parameter.copy_(parameter.bfloat16())
    export_peft(model, ROW, tmp_path)
    served = peft.PeftModel.from_pretrained(make(name), tmp_path).double().eval()
    with torch.no_grad():
        expected = run(model, name, [ROW] * 2)
        assert_close(plain(served.get_base_model(), name, 2), expected, dtype="float32")
    assert_far(plain(make(name), name, 2), expected)


def _gradients(model, name):
    model.zero_grad()
    project_back(run(model, name))
    return {n: p.grad.clone() for n, p in live_pairs(model).items() if p.grad is not None}


# The others' classes have no checkpointing.
@over([n for n in MEDIA if n not in ("convnext",)], "checkpointing", backend="media")
def test_activation_checkpointing_gives_the_plain_gradients(name):
    model = adapted_of(name).train()
    plain = _gradients(model, name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    layer = next(m for m in model.modules() if hasattr(m, "flix_A"))
    layer.register_forward_hook(lambda *_: calls.append(1))
    found = _gradients(model, name)
    assert found.keys() == plain.keys()
    for pair, gradient in plain.items():
        assert_close(found[pair], gradient, name=pair)


@over(["vit", "swin", "clip", "wav2vec2"], "torch.compile", backend="media")
@pytest.mark.slow
def test_a_compiled_model_gives_the_plain_result(name):
    model = adapted_of(name)
    expected = run(model, name)
    project_back(expected)
    gradients = {n: p.grad.clone() for n, p in live_pairs(model).items() if p.grad is not None}
    model.zero_grad()
    found = run(torch.compile(model, backend="eager"), name)
    assert_close(found, expected)
    project_back(found)
    for pair, gradient in gradients.items():
        assert_close(live_pairs(model)[pair].grad, gradient, name=pair)


def test_windows_of_other_images_than_the_first_are_right():
    """What a first call told holds for images of other sizes, and for other numbers of rows."""
    from tests.helpers.media import _images

    model = adapted_of("swin")
    run(model, "swin")
    for size, rows in ((20, ROWS[:3]), (36, ROWS * 2), (44, ROWS[:2]), (36, ROWS[:1])):
        inputs = _images(size)(len(rows))
        with torch.no_grad():
            found = run(model, "swin", rows, **inputs)
            for i, row in enumerate(rows):
                one = {name: value[i : i + 1] for name, value in inputs.items()}
                expected = merge(model, row)(**one).logits if row else make("swin")(**one).logits
                assert_close(found[i : i + 1], expected)


def test_windows_that_were_never_followed_are_refused():
    """A compiled forward is not watched: whose windows it has is not known until a plain one was."""
    model = adapted_of("swin")
    with pytest.raises(
        RoutingError,
        match=r"(q_proj|query)' got an input of leading shape \[64, 16\].*call the model once",
    ):
        run(torch.compile(model, backend="eager"), "swin")


def test_tables_that_a_layer_makes_for_all_rows_and_a_model_indexes_are_refused():
    """Swin v2 makes its bias from one table of positions, and takes its entries by index."""
    model = adapt(make("swinv2"), config())
    randomize(model)
    with pytest.raises(
        RoutingError,
        match=r"bias_mlp\.0' gets one input for all.*exclude_modules='\.\*..bcontinuous",
    ):
        run(model, "swinv2")
    with routed(model, ROW), torch.no_grad():
        assert_close(
            output(model(**MEDIA["swinv2"].inputs(2))), plain(merge(model, ROW), "swinv2", 2)
        )


@pytest.mark.parametrize("positional", [False, True])
def test_images_that_are_not_one_for_each_row_are_refused(positional):
    """Two images in one row and none in another are as many as the rows."""
    model = adapted_of("llava")
    run(model, "llava")
    inputs = MEDIA["llava"].inputs(len(ROWS))
    inputs["input_ids"][1:3] = torch.where(
        inputs["input_ids"][1:3] == 45, 5, inputs["input_ids"][1:3]
    )
    message = r"'model\.vision_tower\.\S*q_proj' gets as many.*'image'.*row 1, row 2 without any"
    with pytest.raises(RoutingError, match=message):
        if positional:
            ids, weights = routing()
            given = inputs["input_ids"], inputs["pixel_values"]
            model(*given, flix_features=ids, flix_weights=weights)
        else:
            run(model, "llava", **inputs)
    with pytest.raises(RoutingError, match=message):  # the first call, too
        run(adapted_of("llava"), "llava", **inputs)


def test_rows_without_images_are_right_where_no_layer_of_images_is_adapted():
    pytest.importorskip("transformers")
    model = adapt(make("llava"), config(exclude_modules=r".*(vision_tower|projector).*"))
    randomize(model)
    inputs = MEDIA["llava"].inputs(len(ROWS))
    # Row 0 has two images, row 1 none.
    inputs["input_ids"] = torch.cat([inputs["input_ids"], inputs["input_ids"]], 1)
    inputs["input_ids"][1] = 7
    inputs["input_ids"][2:, 23:] = 7
    found = run(model.eval(), "llava", **inputs)
    alone = {**inputs, "pixel_values": inputs["pixel_values"][3:]}
    alone["input_ids"] = inputs["input_ids"][3:]
    assert_close(found[3:], output(make("llava")(**alone)))  # ROWS[3] has no features
    alone = {"pixel_values": inputs["pixel_values"][:2], "input_ids": inputs["input_ids"][:1]}
    assert_close(found[:1], output(merge(model, ROWS[0])(**alone)))


def test_towers_run_alone_and_other_numbers_of_images_are_refused():
    model = adapted_of("clip")
    inputs = MEDIA["clip"].inputs(4)
    ids, weights = routing()
    with pytest.raises(
        RoutingError, match=r"vision_model\S*' got an input of leading shape \[3, 1[67]\]"
    ):
        model(
            input_ids=inputs["input_ids"],
            pixel_values=inputs["pixel_values"][:3],
            flix_features=ids,
            flix_weights=weights,
        )
    merged = merge(model, ROW)
    with torch.no_grad(), routed(model, ROW):
        found = model.get_image_features(pixel_values=inputs["pixel_values"])
        expected = merged.get_image_features(pixel_values=inputs["pixel_values"])
        assert_close(
            found[0] if isinstance(found, tuple) else getattr(found, "pooler_output", found),
            expected[0]
            if isinstance(expected, tuple)
            else getattr(expected, "pooler_output", expected),
        )


def test_a_copy_keeps_what_is_known_of_its_layers():
    model = adapted_of("swin")
    expected = run(model, "swin")
    assert_close(run(copy.deepcopy(model), "swin"), expected)


def test_images_that_are_joined_in_one_row_are_refused_by_name():
    """Pixtral puts the patches of all images into one row, whose attention is masked."""
    import transformers

    settings = copy.deepcopy(MEDIA["llava"].settings[1])
    settings["vision_config"] |= {"model_type": "pixtral", "head_dim": 8}
    torch.manual_seed(0)
    base = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(**settings, vision_feature_select_strategy="full")
    )
    model = adapt(base.double().eval(), config())
    inputs = {**MEDIA["llava"].inputs(4), "image_sizes": torch.tensor([[16, 16]] * 4)}
    with pytest.raises(RoutingError, match=r"vision_tower\S*q_proj' got .*\[1, 64\].*gathered"):
        run(model, "llava", **inputs)
    randomize(model)
    with torch.no_grad(), routed(model, ROW):
        assert_close(output(model(**inputs)), output(merge(model, ROW)(**inputs)))
