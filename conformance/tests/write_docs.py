"""Write what the documentation takes from the code: the table of checks, the table of mutants, the example backend."""

from __future__ import annotations

from pathlib import Path

from flix_conformance.checks import CHECKS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLE = ROOT / "conformance" / "example_backend" / "src" / "flix_numpy"


def checks() -> str:
    """The table of checks."""
    rows = [f"| `{c.name}` | {c.rule} |" for c in CHECKS.values()]
    return "\n".join(["| check | rule |", "|---|---|", *rows])


def example(name: str) -> str:
    """A file of the example backend, as a block of code."""
    return f"```python\n{(EXAMPLE / name).read_text(encoding='utf-8').strip()}\n```"


def parts() -> dict[tuple[str, str], str]:
    """{(page, name of the part): text}."""
    from test_mutants import table

    return {
        ("conformance.md", "checks"): checks(),
        ("conformance.md", "mutants"): table(),
        ("write-a-backend.md", "example"): example("__init__.py"),
        ("write-a-backend.md", "harness"): example("conformance.py"),
    }


def ends(name: str) -> tuple[str, str]:
    """The comments that a part stands between."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def shown(page: str, name: str) -> str:
    """A part as the page has it."""
    begin, end = ends(name)
    return (DOCS / page).read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip()


def write() -> None:
    """Bring the pages up to date."""
    for (page, name), text in parts().items():
        begin, end = ends(name)
        path = DOCS / page
        before, _, rest = path.read_text(encoding="utf-8").partition(begin)
        after = rest.partition(end)[2]
        path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    write()
