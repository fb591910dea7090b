"""Tables of addresses: what they say, that they are made once, and that those of CUDA graphs go with the bank."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from flix import ConfigError  # noqa: E402
from flix.backends.torch import FlixLinear, adapt  # noqa: E402
from flix.backends.torch.kernels import tables  # noqa: E402
from flix.backends.torch.parameters import InForce  # noqa: E402
from tests.helpers.kernels import INTERPRETED, layer_of, step_of  # noqa: E402
from tests.helpers.registry import config  # noqa: E402
from tests.helpers.torch import routing  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_tables(monkeypatch):
    monkeypatch.setattr(tables, "_tables", type(tables._tables)())


def _bank(ranks=(2, 3), sizes=(5, 7)):
    """Features' parts of one parameter each, as layers have them."""
    vectors = [torch.nn.Parameter(torch.zeros(r * sum(sizes))) for r in ranks]
    split = [v.detach().split([r * d for d in sizes]) for v, r in zip(vectors, ranks, strict=True)]
    return vectors, *([parts[side].view(-1, sizes[side]) for parts in split] for side in (0, 1))


def test_a_table_gives_the_address_of_every_bank_row():
    _, a, b = _bank()
    table = tables.bank_table(a, b, CPU)
    for at, side in zip(table.at, (a, b), strict=True):
        assert at.tolist()[: table.rows] == [row.data_ptr() for part in side for row in part]
    assert table.first.tolist()[: table.rows] == [0, 0, 2, 2, 2]
    assert table.ranks.tolist()[: table.rows] == [2, 2, 3, 3, 3]
    assert (table.rows, table.widest) == (5, 3)


def test_a_table_is_made_once_and_the_oldest_go(monkeypatch):
    monkeypatch.setattr(tables, "_KEPT", 2)
    banks = [_bank() for _ in range(3)]
    made = [tables.bank_table(a, b, CPU) for _, a, b in banks[:2]]
    assert tables.bank_table(*banks[0][1:], CPU) is made[0]
    tables.bank_table(*banks[2][1:], CPU)
    assert len(tables._tables) == 2 and made[0] in list(tables._tables.values())
    assert all(table is not made[1] for table in tables._tables.values())


def test_copies_live_as_long_as_their_table_and_are_not_kept():
    _, a, b = _bank()
    turned = [part.t().contiguous().t() for part in b]
    table = tables.bank_table(a, turned, CPU)
    assert not tables._tables
    copies = table.held[len(a) :]
    assert table.at[1].tolist()[: table.rows] == [row.data_ptr() for p in copies for row in p]


def _in_force():
    """Vectors put in force in one layer ``[7, 5]`` whose features have rank 2."""
    bank = FlixLinear(5, 7, config=config(ranks=2, alpha=None), name="layer").flix_state.bank
    return lambda vectors: InForce(bank, vectors, SimpleNamespace(vectors=lambda _: vectors), False)


def test_memory_that_is_used_again_is_not_taken_for_what_lay_there():
    in_force, first, second = _in_force(), torch.zeros(24), torch.zeros(24)
    halves = [v.view(torch.float16)[:24] for v in (first, second)]
    for vectors in (
        {0: first, 1: second},
        {1: first, 2: second},
        {0: halves[0], 1: halves[1]},
    ):
        table, value = tables.layer_table(in_force(vectors), 0, (1,), CPU), vectors[1]
        at = value.data_ptr()
        assert (table.dtype, table.rows) == (value.dtype, 2)
        assert table.at[0].tolist()[:2] == [at, at + 5 * value.itemsize]
        assert table.at[1].tolist()[:2] == [at + 10 * value.itemsize, at + 17 * value.itemsize]


def test_one_upload_makes_the_tables_of_all_layers_of_a_layout(monkeypatch):
    uploads = []
    upload = tables.upload
    monkeypatch.setattr(tables, "upload", lambda *given: uploads.append(given) or upload(*given))
    layers = torch.nn.Sequential(
        torch.nn.Embedding(9, 6), *(torch.nn.Linear(6, 6) for _ in range(4))
    )
    pattern = {"2": {"task": 1}}
    model = adapt(layers, config(alpha=None, rank_pattern=pattern, target_modules=".*"))
    bank = model.flix_state.bank
    found, layout = InForce(bank, [0, 1, 4], None, False), bank.layout
    for active in ((0, 4), (1, 4)):
        del uploads[:]
        for place, layer in enumerate(layers):
            if isinstance(layer, torch.nn.Embedding):
                continue
            table = tables.layer_table(found, place, active, CPU)
            assert table is tables.layer_table(found, place, active, CPU)
            ranks = [layout.rank(i, place) for i in active]
            for at, side, size in zip(
                table.at, found.values(active, place, CPU), (6, 6), strict=True
            ):
                parts = [p.view(r, size) for p, r in zip(side, ranks, strict=True)]
                assert at.tolist()[: table.rows] == [row.data_ptr() for p in parts for row in p]
            assert table.ranks.tolist()[: table.rows] == [r for r in ranks for _ in range(r)]
            assert (table.rows, table.widest) == (sum(ranks), max(ranks))
            assert all(t.storage_offset() % 2 == 0 for t in (*table.at, table.ranks, table.first))
        assert len(uploads) == 2  # layer "2" has ranks of its own


@pytest.mark.parametrize("other", [torch.zeros(24, dtype=torch.bfloat16), torch.zeros(48)[::2]])
def test_copies_of_vectors_that_are_not_alike_live_as_long_as_their_table(other):
    table = tables.layer_table(_in_force()({0: torch.zeros(24), 1: other}), 0, (0, 1), CPU)
    a, _, copies = table.held
    for at, side in zip(table.at, (copies[: len(a)], copies[len(a) :]), strict=True):
        assert at.tolist()[: table.rows] == [row.data_ptr() for part in side for row in part]
    assert table.dtype == torch.float32 and all(part.is_contiguous() for part in copies)


def test_tables_of_cuda_graphs_go_with_the_bank(monkeypatch):
    vectors, a, b = _bank()
    found = tables.bank_table(a, b, CPU)
    monkeypatch.setattr(tables, "_capturing", lambda device: True)
    for _ in range(3):
        assert tables.bank_table(a, b, CPU) is found
    tables._tables.clear()  # as many other tables would do
    assert [list(held.values()) for held in tables._captured.values()] == [[found]]
    del a, b
    gc.collect()
    assert len(tables._captured) == 1  # the parameters live, so a graph may run
    del vectors
    gc.collect()
    assert len(tables._captured) == 0


def test_a_graph_is_not_captured_before_its_tables_are_made(monkeypatch):
    _, a, b = _bank()
    monkeypatch.setattr(tables, "_capturing", lambda device: True)
    with pytest.raises(ConfigError, match=r"run the model once before torch.cuda.graph"):
        tables.bank_table(a, b, CPU)


@pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="no CUDA device; test_triton_kernels.py runs this module in Triton's interpreter",
)
def test_tables_are_made_once():
    layer = layer_of("fused", 12, 9)
    run = lambda: step_of(layer, (4, 6, 12), *routing())  # noqa: E731
    run()
    kept = tables._of_layouts[layer.flix_state.bank.layout]
    before = dict(kept)
    run()
    assert before and dict(kept) == before
