"""Exported programs: torch.export of merged and of adapted models, and ONNX of merged ones."""

from __future__ import annotations

import io
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flix.backends.torch import adapt, merge, remove_feature  # noqa: E402
from tests.helpers.registry import ROWS, config  # noqa: E402
from tests.helpers.tolerance import assert_close, assert_far  # noqa: E402
from tests.helpers.torch import make, output, randomize, routing  # noqa: E402

ROW = {"language": {"hau": 0.5, "swa": 1.0}, "task": "pos"}
BATCH, LENGTH = torch.export.Dim("batch"), torch.export.Dim("length", max=64)
SHAPES = ((2, 5), (7, 13), (1, 30))


class Plain(torch.nn.Sequential):
    """Tensors in, a tensor out."""

    def forward(self, input_ids: Any) -> Any:
        return output(self[0](input_ids=input_ids, use_cache=False))


class Routed(torch.nn.Sequential):
    """Tensors and routing in, a tensor out."""

    def forward(self, input_ids: Any, flix_features: Any, flix_weights: Any) -> Any:
        return output(
            self[0](
                input_ids=input_ids,
                flix_features=flix_features,
                flix_weights=flix_weights,
                use_cache=False,
            )
        )


def _adapted(name: str, strategy: str = "auto", **changes: Any) -> Any:
    model = adapt(make(name, torch.float32), config(**changes), strategy=strategy)
    randomize(model)
    return model.eval()


def tokens(rows: int, length: int) -> Any:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(1, 40, (rows, length), generator=generator)


def routed(rows: int) -> tuple[Any, Any]:
    ids, weights = routing([ROWS[-1 - i % len(ROWS)] for i in range(rows - 1)] + [ROW])
    return ids, weights.float()


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_merged_model_is_exported_for_any_batch_and_length(name):
    model = _adapted(name)
    program = torch.export.export(
        Plain(merge(model, ROW)), (tokens(4, 9),), dynamic_shapes=({0: BATCH, 1: LENGTH},)
    )
    for rows, length in SHAPES:
        ids, weights = routing([ROW] * rows)
        with torch.no_grad():
            inputs = {"input_ids": tokens(rows, length)}
            wanted = output(model(**inputs, flix_features=ids, flix_weights=weights.float()))
            found = program.module()(tokens(rows, length))
            assert_close(found, wanted)
            assert_far(found, output(make(name, torch.float32).eval()(**inputs)), at_least=1e-2)


@pytest.mark.parametrize(
    ("name", "strategy", "targets"),
    [
        ("llama", "gather", ["embed_tokens", "q_proj"]),
        ("gpt2", "masked", ["c_attn"]),
    ],
)
def test_an_adapted_model_is_exported_with_routing_as_an_input(name, strategy, targets):
    model = _adapted(name, strategy, target_modules=targets)
    width = routing(ROWS)[0].shape[1]
    program = torch.export.export(
        Routed(model),
        (tokens(4, 9), *routed(4)),
        dynamic_shapes=({0: BATCH, 1: LENGTH}, {0: BATCH}, {0: BATCH}),
    )
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    loaded = torch.export.load(saved).module()
    for rows, length in SHAPES:
        ids, weights = (torch.nn.functional.pad(t, (0, width - t.shape[1]), value=v)
                        for t, v in zip(routed(rows), (-1, 0.0), strict=True))  # fmt: skip
        inputs = {"input_ids": tokens(rows, length)}
        with torch.no_grad():
            wanted = output(model(**inputs, flix_features=ids, flix_weights=weights))
            found = loaded(inputs["input_ids"], ids, weights)
            unrouted = output(model(**inputs, flix_features=torch.full_like(ids, -1)))
        assert_close(found, wanted)
        assert_far(found, unrouted, at_least=1e-2)


def test_auto_decides_by_length_so_its_program_needs_a_range_on_one_side():
    """Compiled graphs gather from 8 positions a row and mask below: one program cannot do both."""
    model = _adapted("bert", target_modules=["query"])
    inputs = (tokens(4, 9), *routed(4))

    def export(length: Any) -> Any:
        dims = ({0: BATCH, 1: length}, {0: BATCH}, {0: BATCH})
        return torch.export.export(Routed(model), inputs, dynamic_shapes=dims)

    with pytest.raises(Exception, match="min=8"):
        export(LENGTH)
    program = export(torch.export.Dim("length", min=8, max=64)).module()
    ids, weights = routed(4)
    with torch.no_grad():
        wanted = output(model(tokens(4, 20), flix_features=ids, flix_weights=weights))
        assert_close(program(tokens(4, 20), ids, weights), wanted)


def test_a_merged_decoder_runs_in_onnxruntime(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = _adapted("gpt2")
    program = torch.onnx.export(
        Plain(merge(model, ROW)).eval(),
        (tokens(4, 9),),
        dynamo=True,
        verbose=False,
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_shapes=({0: BATCH, 1: LENGTH},),
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    for rows, length in SHAPES:
        (found,) = session.run(["logits"], {"input_ids": tokens(rows, length).numpy()})
        ids, weights = routing([ROW] * rows)
        inputs = {"input_ids": tokens(rows, length)}
        with torch.no_grad():
            wanted = output(model(**inputs, flix_features=ids, flix_weights=weights.float()))
            plain = output(make("gpt2", torch.float32).eval()(**inputs))
        assert_close(torch.from_numpy(found), wanted)
        assert_far(torch.from_numpy(found), plain, at_least=1e-2)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_model_compiles_after_a_removal_and_makes_nan_of_the_removed_id(weight):
    torch._dynamo.reset()
    model = remove_feature(
        adapt(torch.nn.Sequential(torch.nn.Linear(4, 3)), config()), "language", "swa"
    )
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    registry, x = model.flix_config.registry, torch.randn(2, 4)
    ids = torch.full((2, 1), registry.id("language", "hau"))
    weights = torch.tensor([[1.0], [weight]])
    with torch.no_grad():
        assert_close(
            run(x, flix_features=ids, flix_weights=weights),
            model(x, flix_features=ids, flix_weights=weights),
        )
        for bad in (*registry.removed_ids, len(registry)):
            ids[1] = bad
            y = run(x, flix_features=ids, flix_weights=weights)
            assert y[0].isfinite().all() and y[1].isnan().all()
