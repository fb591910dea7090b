"""`import flix` is light, and each backend imports its own framework alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

FRAMEWORKS = ("torch", "jax", "flax", "tensorflow", "keras", "transformers", "peft", "datasets")


def _run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.timed
def test_import_flix_takes_under_300_ms_and_loads_no_framework():
    # Processor time: what else the machine does meanwhile does not count.
    code = (
        "import sys, time; start = time.process_time(); import flix; "
        "print(time.process_time() - start); "
        f"print([name for name in {FRAMEWORKS!r} if name in sys.modules])"
    )
    _run(code)  # compiles the bytecode
    seconds, loaded = zip(*(_run(code).splitlines() for _ in range(5)), strict=True)
    assert set(loaded) == {"[]"}
    assert min(map(float, seconds)) < 0.3


def test_core_works_where_no_framework_can_be_imported():
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {FRAMEWORKS!r}:\n"
        "            raise ImportError(f'{name} is not to be had')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import flix\n"
        "registry = flix.FeatureRegistry({'language': ['hau'], 'task': ['ner']})\n"
        "config = flix.FlixConfig(registry=registry, ranks=flix.ranks.uniform(2))\n"
        "print(registry.encode([{'language': 'hau'}]).ids.tolist())\n"
        "try:\n"
        "    flix.backends.get('torch')\n"
        "except flix.MissingFrameworkError as error:\n"
        "    print(error)\n"
    )
    first, second = _run(code).splitlines()
    assert first == "[[0]]"
    assert "needs PyTorch" in second and 'pip install "flix-peft[torch]"' in second


def test_unknown_backends_are_named():
    import flix

    with pytest.raises(flix.FlixError, match=r"no backend 'troch' .did you mean 'torch'"):
        flix.backends.get("troch")
    assert "torch" in flix.backends.available()
