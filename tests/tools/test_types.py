"""What make types calls a fault."""

from __future__ import annotations

from tools.types import judged, public, unknown

LISTED = (
    "# flix\nflix.load(path, rename=)\nflix.ranks\n\n# flix_conformance\nflix_conformance.Case\n"
)


def report(**known: bool) -> dict:
    said = [{"message": "no annotation\n  inferred"}]
    symbols = [
        {"name": f"flix.{name}", "isTypeKnown": whole, "diagnostics": [] if whole else said}
        for name, whole in known.items()
    ]
    return {"typeCompleteness": {"symbols": symbols}}


def test_names_are_read_without_their_parameters():
    assert public(LISTED) == {"flix.load", "flix.ranks"}


def test_a_public_name_without_a_type_is_found_and_a_private_one_is_not():
    found = unknown(report(load=False, ranks=True, inner=False), public(LISTED))
    assert found == {"flix.load": "no annotation"}
    assert judged(found, {}) == ["flix.load: no annotation"]


def test_a_reason_holds_for_as_long_as_it_is_needed():
    known = {"flix.load": "its framework has no types"}
    assert judged({"flix.load": "no annotation"}, known) == []
    assert judged({}, known) == ["flix.load: known, take it off the list"]
