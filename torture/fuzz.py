"""Inputs that nobody should write, to everything that reads: what comes back is right, or one of flix's own errors."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import flix
from flix.core.adapter.stream import BLANK
from torture.bounded import Tally, WrongError, peak
from torture.inputs import LEAVES, NAMES, VALUES, changed, damaged, packed, unpacked, yaml_texts
from torture.savers import adapter, configuration

CHUNK = 2000
"""Inputs of one run of hypothesis, which remembers all that it has tried."""


class Target(NamedTuple):
    """Something that reads: the inputs, and a call that raises where one is refused or goes wrong."""

    inputs: st.SearchStrategy[Any]
    call: Callable[[Any], None]


def same(a: flix.Adapter, b: flix.Adapter) -> bool:
    """Whether two adapters are one."""
    return (
        a.config.to_dict() == b.config.to_dict()
        and dict(a.layers) == dict(b.layers)
        and a.tensors.keys() == b.tensors.keys()
        and all(np.array_equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    )


def _adapter_bytes(room: Path) -> Target:
    """A file that was damaged is refused, or says what it said."""
    flix.save_adapter(adapter(1), room)
    file = room / "flix.safetensors"
    whole, right = file.read_bytes(), flix.load_adapter(room)

    def call(data: bytes) -> None:
        file.write_bytes(data)
        if not same(flix.load_adapter(room), right):
            raise WrongError("a damaged file was read as another adapter")

    return Target(damaged(whole), call)


def _adapter_texts(room: Path) -> Target:
    """A description that a stranger wrote is refused, or describes the tensors that are there."""
    flix.save_adapter(adapter(1), room)
    file = room / "flix.safetensors"
    header, body = unpacked(file.read_bytes())
    texts = {**header["__metadata__"], "digest": BLANK}

    @st.composite
    def inputs(draw: st.DrawFn) -> bytes:
        new = {**header, "__metadata__": texts}
        if draw(st.integers(0, 3)):
            key = draw(st.sampled_from(sorted(texts)))
            try:
                value = draw(changed(json.loads(texts[key])))
            except ValueError:
                value = draw(NAMES)
            text = value if isinstance(value, str) else json.dumps(value)
            new["__metadata__"] = {**texts, key: text}
        else:
            new = draw(changed(new))
        data = packed(new, body)  # a stranger knows how digests are made
        return data.replace(BLANK.encode(), hashlib.sha256(data).hexdigest().encode(), 1)

    def call(data: bytes) -> None:
        file.write_bytes(data)
        found = flix.load_adapter(room)
        flix.Adapter(found.config, found.layers, found.tensors)

    return Target(inputs(), call)


def _peft(room: Path) -> Target:
    """A LoRA's folder."""
    from safetensors.numpy import save_file

    names = [f"base_model.model.{layer}.lora_{side}.weight" for layer in "qk" for side in "AB"]
    tensors = {n: np.ones((2, 6) if "_A" in n else (5, 2), np.float32) for n in names}
    save_file(tensors, room / "adapter_model.safetensors")
    header, body = unpacked((room / "adapter_model.safetensors").read_bytes())
    plain: dict[str, Any] = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "k"], "use_rslora": False, "use_dora": False,
        "rank_pattern": {"k": 2}, "alpha_pattern": {"k": 8}, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None,
        "base_model_name_or_path": "x", "task_type": None, "init_lora_weights": True, "layers_to_transform": None,
    }  # fmt: skip

    @st.composite
    def inputs(draw: st.DrawFn) -> tuple[str, bytes]:
        kind = draw(st.integers(0, 3))
        settings_ = draw(changed(plain)) if kind != 1 else plain
        data = packed(draw(changed(header)), body) if kind in (1, 2) else packed(header, body)
        return json.dumps(settings_), draw(damaged(data)) if kind == 3 else data

    def call(value: tuple[str, bytes]) -> None:
        (room / "adapter_config.json").write_text(
            value[0], encoding="utf-8", errors="surrogatepass"
        )
        (room / "adapter_model.safetensors").write_bytes(value[1])
        found = flix.from_peft({"x": room}, "g")
        if not all(np.isfinite(value).all() for value in found.tensors.values()):
            raise WrongError("values that are not finite were imported")

    return Target(inputs(), call)


def _registry(room: Path) -> Target:
    """Registries as users and files give them."""
    plain = flix.FeatureRegistry(
        {"language": ["hau", "swa"], "family": ["bantu"]},
        implies={("language", "swa"): [("family", "bantu")]},
    ).to_dict()
    groups = st.dictionaries(NAMES, st.lists(NAMES, max_size=5), max_size=4)
    files = changed(plain).map(lambda value: ("file", value))
    users = st.tuples(st.just("user"), st.one_of(groups, VALUES), st.one_of(st.just({}), VALUES))

    def call(value: tuple[Any, ...]) -> None:
        if value[0] == "file":
            made = flix.FeatureRegistry.from_dict(value[1])
        else:
            made = flix.FeatureRegistry(value[1], implies=value[2])
        if flix.FeatureRegistry.from_dict(json.loads(json.dumps(made.to_dict()))) != made:
            raise WrongError("a registry is another after a round trip")

    return Target(st.one_of(files, users), call)


def _config(room: Path) -> Target:
    """Configurations of files."""
    plain = configuration(
        rank_pattern={"q": 2},
        alpha={"task": 3.0},
        alpha_pattern={"v": {"task": 5.0}},
        feature_dropout=flix.FeatureDropout(p=0.2),
    ).to_dict()

    def call(value: Any) -> None:
        made = flix.FlixConfig.from_dict(value)
        if flix.FlixConfig.from_dict(json.loads(json.dumps(made.to_dict()))) != made:
            raise WrongError("a configuration is another after a round trip")

    return Target(changed(plain), call)


def _rows(room: Path) -> Target:
    """Rows to encode."""
    registry = flix.FeatureRegistry({"language": ["hau", "swa"], "task": ["ner", "pos"]})
    row = st.dictionaries(
        st.one_of(st.sampled_from(["language", "task"]), NAMES), VALUES, max_size=3
    )
    rows = st.one_of(st.lists(row, max_size=4), VALUES)
    policy = st.one_of(st.sampled_from(["error", "skip", "mean"]), VALUES)

    def call(value: tuple[Any, Any]) -> None:
        found = registry.encode(value[0], unknown=value[1])
        if not np.isfinite(found.weights).all() or found.ids.min(initial=0) < -1:
            raise WrongError("rows were encoded as what is no routing")

    return Target(st.tuples(rows, policy), call)


def _routing(room: Path) -> Target:
    """Arrays of ids and weights."""
    from flix.core.features.routing import as_array, check_routing

    registry = flix.FeatureRegistry({"language": ["hau", "swa"], "task": ["ner", "pos"]})
    dtypes = st.sampled_from(
        ["i1", "i4", "i8", "u8", "f4", "f8", "f2", "?", "U3", "O", "M8[s]", "c8"]
    )
    shapes = st.lists(st.integers(0, 3), max_size=4)

    @st.composite
    def arrays(draw: st.DrawFn) -> Any:
        if draw(st.integers(0, 3)) == 0:
            return draw(VALUES)
        shape, dtype = draw(shapes), draw(dtypes)
        values = [draw(LEAVES) for _ in range(min(4, int(np.prod(shape))))] or [0]
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            return np.resize(np.asarray(values, dtype=object).astype(dtype), shape)
        return np.zeros(shape, dtype)

    def call(value: tuple[Any, Any]) -> None:
        ids = as_array("ids", value[0])
        weights = None if value[1] is None else as_array("weights", value[1])
        check_routing(ids, weights, registry)
        if ids.dtype.kind not in "iu" or not ((ids >= -1) & (ids < len(registry))).all():
            raise WrongError("ids of no feature were taken")

    return Target(st.tuples(arrays(), st.one_of(st.none(), arrays())), call)


def _yaml(room: Path) -> Target:
    """Training configurations."""
    from flix.training.reading import parse_settings

    whole = (
        Path(__file__)
        .resolve()
        .parents[1]
        .joinpath("examples", "train.yaml")
        .read_text(encoding="utf-8")
    )
    plain = "\n".join(line for line in whole.splitlines() if line.partition("#")[0].strip())
    return Target(yaml_texts(plain), lambda text: void(parse_settings(text)))


def _jsonl(room: Path) -> Target:
    """Files of rows."""
    from flix.data.files import read_file
    from flix.data.loading import Reading

    file = room / "rows.jsonl"
    read = Reading({"source": "text", "target": "text"}, {"task": "up"}, {"language": "lang"})
    line = json.dumps({"source": "a", "target": "b", "lang": "hau"}).encode()
    texts = changed({"source": "a", "target": "b", "lang": ["hau", "swa"]}).map(
        lambda value: json.dumps(value).encode("utf-8", "surrogatepass")
    )
    lines = st.one_of(
        st.just(line), texts, damaged(line), st.just(b"[" * 3000), st.just(b"1" * 5000)
    )
    files = st.lists(lines, max_size=4).map(b"\n".join)

    def call(data: bytes) -> None:
        file.write_bytes(data)
        for where, record in read_file(file):
            read(record, where, {})

    return Target(files, call)


def _cli(room: Path) -> Target:
    """Command lines: each ends with 0 or 2, and one line of error."""
    from typer.testing import CliRunner

    from flix.cli.app import app

    flix.save_adapter(adapter(1), room / "adapter")
    (room / "binary").write_bytes(bytes(range(256)))
    (room / "empty").write_bytes(b"")
    (room / "folder").mkdir()
    runner, out = CliRunner(), str(room / "out")
    paths = [
        str(room / name)
        for name in ("adapter", "binary", "empty", "folder", "absent", "adapter/flix.safetensors")
    ]
    features = [
        "language=hau",
        "language=hau,task=ner",
        "language:hau",
        "task=",
        "=",
        "language=typo",
        "language=hau:nan",
        "language=hau:0.5+swa:1e99",
        "x=y",
    ]
    options = [
        "--features",
        "--out",
        "--force",
        "--json",
        "--group",
        "--from",
        "--layers",
        "--explain",
        "--length",
        "--device",
        "--conflicts",
        "--help",
        "--typo",
    ]
    words = st.one_of(
        st.sampled_from(paths + features + options + [out, "g", "peft", "-1", "0", "9" * 40]), NAMES
    )
    commands = st.sampled_from(
        ["plan", "inspect", "share", "combine", "import", "backends", "typo"]
    )
    usual = st.sampled_from(
        [["inspect", paths[0]], ["share", paths[0], "--features", "language=hau", "--out", out, "--force"],
         ["combine", paths[0], paths[0], "--out", out], ["plan", paths[0]], ["import", f"x={paths[0]}", "--group", "g", "--out", out]]
    )  # fmt: skip
    lines = st.tuples(
        st.one_of(usual, commands.map(lambda c: [c])), st.lists(words, max_size=5)
    ).map(lambda p: p[0] + p[1])

    def call(line: list[str]) -> None:
        done = runner.invoke(app, line)
        shutil.rmtree(out, ignore_errors=True)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        if done.exit_code not in (0, 2) or "Traceback" in done.output:
            raise WrongError(f"exit code {done.exit_code}")
        if done.exit_code:
            raise flix.FlixError("refused")

    return Target(lines, call)


def void(_: Any) -> None:
    """Nothing of something."""


TARGETS: dict[str, Callable[[Path], Target]] = {
    "an adapter's bytes": _adapter_bytes,
    "an adapter's description": _adapter_texts,
    "a LoRA of PEFT": _peft,
    "registries": _registry,
    "configurations": _config,
    "rows": _rows,
    "ids and weights": _routing,
    "training YAML": _yaml,
    "JSONL": _jsonl,
    "command lines": _cli,
}


def fuzz(name: str, count: int, first: int) -> dict[str, Any]:
    """So many inputs of one target."""
    memory = (
        Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    )  # files there cost no disk
    tally = Tally()
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        target = TARGETS[name](Path(folder))
        gc.collect()
        before = peak()
        for chunk in range(-(-count // CHUNK)):
            size = min(CHUNK, count - chunk * CHUNK)

            @seed(first * 1_000_003 + chunk)
            @settings(
                max_examples=size, database=None, deadline=None, suppress_health_check=list(HealthCheck),
                phases=(Phase.generate,),
            )  # fmt: skip
            @given(target.inputs)
            def one(value: Any) -> None:
                tally.call(target.call, value)

            one()
        return tally.row(name, before)


def run(count: int, only: list[str], seed: int = 0) -> list[dict[str, Any]]:
    """All targets, each in a process of its own, whose memory is then its own."""
    found = []
    for name in TARGETS:
        if only and name not in only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "found.json")
            words = [name, str(count), str(seed), str(out)]
            done = subprocess.run([sys.executable, "-W", "ignore", "-m", "torture.fuzz", *words])
            made: dict[str, Any] = {
                "what": name,
                "wrong": {f"the process ended with {done.returncode}": 1},
            }
            if out.exists():
                made = json.loads(out.read_text(encoding="utf-8"))
        shown = {key: value for key, value in made.items() if key != "examples"}
        print(f"fuzz: {shown}", flush=True)
        found.append(made)
    return found


def main() -> None:
    """What :func:`run` starts."""
    name, count, first, out = sys.argv[1:]
    Path(out).write_text(json.dumps(fuzz(name, int(count), int(first))), encoding="utf-8")


if __name__ == "__main__":
    main()
