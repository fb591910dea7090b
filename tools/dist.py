"""Builds the wheels and source archives of flix and of its kit, and proves them: ``python -m tools.dist``.

Into ``dist/`` goes what an index would get. Then a new environment gets the wheels, and nothing of the clone: the
core's tests run there out of the unpacked source archive, whose ``flix/`` is taken away first, and ``flix inspect``
reads an adapter.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECTS = {"flix_peft": ROOT, "flix_conformance": ROOT / "conformance"}
TESTED = ("pytest>=8", "hypothesis>=6.100")
NEEDED = {
    "flix_peft": (
        "flix/py.typed",
        "flix/_built.py",
        "flix/core/strategy/table.json",
        "flix/quickstart/base/",
        "flix/report/templates/",
        ".dist-info/licenses/LICENSE",
    ),
    "flix_conformance": ("flix_conformance/py.typed", ".dist-info/licenses/LICENSE"),
}
"""What a wheel is broken without, though ``import`` does not notice."""
TOPS = {"flix_peft": {"flix"}, "flix_conformance": {"flix_conformance"}}
MADE = """
import flix, numpy, sys
from flix.core.adapter.adapter import LayerShape, expected_tensors
registry = flix.FeatureRegistry({"language": ["hau", "swa"], "task": ["ner"]})
config = flix.FlixConfig(registry=registry, ranks=flix.ranks.uniform(2))
layers = {"layer": LayerShape(4, 4)}
tensors = {n: numpy.ones(s, numpy.float32) for n, s in expected_tensors(config, layers)}
flix.save_adapter(flix.Adapter(config, layers, tensors), sys.argv[1])
print(flix.__file__, flix.__version__)
"""


def run(*command: str | Path, cwd: Path = ROOT, **extra: str) -> str:
    """What a command prints; where it fails, its output and its exit end this process."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, **extra},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if found.returncode:
        sys.exit(f"{found.stdout}\n{' '.join(map(str, command))} ended with {found.returncode}")
    return found.stdout


def faults(wheel: Path, project: str) -> list[str]:
    """What a wheel lacks, and what it holds beside its package."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    lacks = [f"{wheel.name} lacks {n}" for n in NEEDED[project] if not any(n in x for x in names)]
    tops = {name.partition("/")[0] for name in names}
    extra = {top for top in tops - TOPS[project] if not top.endswith(".dist-info")}
    return lacks + [f"{wheel.name} installs {top}/, too" for top in sorted(extra)]


def build(out: Path) -> dict[str, tuple[Path, Path]]:
    """Wheel and source archive of each project. The wheel is built from the archive, so that it lacks nothing."""
    shutil.rmtree(out, ignore_errors=True)
    made = {}
    for project, folder in PROJECTS.items():
        run(sys.executable, "-m", "build", "--outdir", out, folder)
        (wheel,) = out.glob(f"{project}-*.whl")
        (archive,) = out.glob(f"{project}-*.tar.gz")
        made[project] = wheel, archive
    files = [path for pair in made.values() for path in pair]
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    # Two short files of two backends may say the same (W002).
    run(sys.executable, "-m", "check_wheel_contents", "--ignore", "W002", *out.glob("*.whl"))
    if found := [fault for name, (wheel, _) in made.items() for fault in faults(wheel, name)]:
        sys.exit("\n".join(found))
    return made


def prove(made: dict[str, tuple[Path, Path]], python: str, work: Path, tests: str) -> list[str]:
    """Installs the wheels where nothing else is, and runs what needs no framework."""
    run(python, "-m", "venv", work / "venv")
    inside = work / "venv" / "bin" / "python"
    wheel, kit = made["flix_peft"][0], made["flix_conformance"][0]
    run(inside, "-m", "pip", "install", "--quiet", f"{wheel}[cli]", kit, *TESTED)
    run(inside, "-m", "pip", "check")
    said = [run(inside, "-c", MADE, work / "adapter", cwd=work).strip()]
    if str(work) not in said[0]:
        sys.exit(f"flix was imported from elsewhere: {said[0]}")
    said.append(run(work / "venv" / "bin" / "flix", "inspect", work / "adapter", cwd=work))
    with tarfile.open(made["flix_peft"][1]) as archive:
        archive.extractall(work / "source", filter="data")
    (tree,) = (work / "source").iterdir()
    shutil.rmtree(tree / "flix")
    found = run(inside, "-m", "pytest", "-q", tests, cwd=tree, FLIX_WITHOUT_FRAMEWORKS="1")
    said.append(found.strip().splitlines()[-1])
    listed = run(inside, "-m", "pytest", "--pyargs", "flix_conformance", "--help", cwd=work)
    if "--flix-backend" not in listed:
        sys.exit("the kit's options are not among pytest's")
    return said


def main() -> None:
    """Ends with an error where anything fails; ``--python`` chooses the interpreter that the wheels are tried with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="default: the one that runs this")
    parser.add_argument(
        "--smoke", action="store_true", help="of the core's tests, those of adapter files alone"
    )
    arguments = parser.parse_args()
    made = build(ROOT / "dist")
    with tempfile.TemporaryDirectory() as work:
        tests = "tests/core/adapter/test_files.py" if arguments.smoke else "tests/core"
        for line in prove(made, arguments.python, Path(work).resolve(), tests):
            print(line)
    for wheel, archive in made.values():
        print(f"dist/{wheel.name}  dist/{archive.name}")


if __name__ == "__main__":
    main()
