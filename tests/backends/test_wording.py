"""Every setting that users of PEFT know has an answer."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from flix import FlixConfig
from flix.core.config.wording import PEFT

peft = pytest.importorskip("peft")


def test_every_setting_of_peft_has_an_answer():
    own = {f.name for f in fields(FlixConfig)}
    theirs = {f.name for f in fields(peft.LoraConfig)}
    assert not set(PEFT) & own
    assert theirs - own <= set(PEFT), (
        "PEFT has settings that flix.core.config.wording does not know"
    )


@pytest.mark.parametrize("name", sorted(PEFT))
def test_answers_name_settings_that_there_are(name):
    own = {f.name for f in fields(FlixConfig)}
    assert set(re.findall(r"say (\w+)=", PEFT[name])) <= own
