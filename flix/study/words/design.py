"""Which languages, tasks and sizes the study has, and what is held out. Pure constants and arithmetic."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from flix.study.words.types import Half

#: Raise it whenever the code would build other data from the same files.
BUILD_VERSION = 1

DEV_ROWS = 40
TEST_ROWS = 100
#: A cell needs at least this many rows in a split.
FEWEST_TRAIN = 20
FEWEST_EVALUATED = 10
MAX_BYTES = 80
#: Largest share of a split of a cell that may be answered by copying the source.
COPY_SHARE = 0.05
#: Shares of the words that no source has put in a split.
DEV_SHARE, TEST_SHARE = 0.12, 0.18
#: Languages with less than this share are called low-resource.
LOW_RESOURCE_BELOW = 0.1


@dataclass(frozen=True, slots=True)
class Task:
    """A task: its family, and its training rows in a language of share 1."""

    family: str
    size: int


TASKS: dict[str, Task] = {
    "inflect": Task("word", 6000),
    "lemma": Task("word", 4000),
    "tags": Task("word", 2000),
    "segment": Task("word", 4000),
    "pron": Task("sound", 6000),
    "spell": Task("sound", 3000),
    "accent": Task("repair", 3000),
    "denoise": Task("repair", 4000),
}

#: Tasks of the quickstart that the study uses, with the quickstart's families and sizes.
QUICKSTART_TASKS = ("num2dig", "num2en", "date2iso", "date2en", "name2en")


@dataclass(frozen=True, slots=True)
class Language:
    """A language and where its data is.

    Attributes:
        branch: its family, in Glottolog's terms (https://glottolog.org, Hammarström, Forkel, Haspelmath and Bank, CC
            BY 4.0): the branch of Indo-European or Afro-Asiatic, elsewhere the family itself.
        script: ISO 15924.
        share: the size of its data in each task, relative to the largest. We set the spread here on purpose, because
            the sources have about as much for every language.
        inflection: the name of its files in the inflection task.
        pronunciation: its file in WikiPron, without ``.tsv``.
        segmentation: whether the segmentation task has it.
        accents: whether its words carry marks that are worth restoring.
        quickstart: its code in the quickstart.
    """

    branch: str
    script: str
    share: float
    inflection: str = ""
    pronunciation: str = ""
    segmentation: bool = False
    accents: bool = False
    quickstart: str = ""


LANGUAGES: dict[str, Language] = {
    "afb": Language("semitic", "Arab", 0.08, "afb"),
    "amh": Language("semitic", "Ethi", 0.05, "amh"),
    "ara": Language("semitic", "Arab", 0.3, "", "ara_arab_broad"),
    "arz": Language("semitic", "Arab", 0.2, "arz"),
    "bel": Language("balto-slavic", "Cyrl", 0.15, "bel", "bel_cyrl_narrow"),
    "bul": Language("balto-slavic", "Cyrl", 0.3, "", "bul_cyrl_narrow"),
    "ces": Language("balto-slavic", "Latn", 0.5, "", "ces_latn_narrow", True, True, "cs"),
    "cym": Language("celtic", "Latn", 0.035, "", "cym_latn_nw_broad_filtered", quickstart="cy"),
    "dan": Language("germanic", "Latn", 0.3, "dan", "dan_latn_broad"),
    "deu": Language("germanic", "Latn", 1.0, "deu", "deu_latn_broad_filtered", False, True, "de"),
    "ell": Language("greek", "Grek", 0.3, "", "ell_grek_broad_filtered", accents=True),
    "eng": Language("germanic", "Latn", 1.0, "eng", "eng_latn_uk_broad_filtered", True),
    "eus": Language("basque", "Latn", 0.05, "", "eus_latn_broad"),
    "fin": Language("uralic", "Latn", 0.25, "fin", "", accents=True, quickstart="fi"),
    "fra": Language("italic", "Latn", 0.9, "fra", "fra_latn_broad_filtered", True, True, "fr"),
    "gle": Language("celtic", "Latn", 0.05, "", "gle_latn_broad", accents=True),
    "grc": Language("greek", "Grek", 0.2, "grc", accents=True),
    "hau": Language("chadic", "Latn", 0.03, "", "hau_latn_broad"),
    "heb": Language("semitic", "Hebr", 0.2, "heb", "heb_hebr_broad", accents=True),
    "hin": Language("indo-iranian", "Deva", 0.25, "", "hin_deva_broad_filtered"),
    "hun": Language("uralic", "Latn", 0.3, "hun", "hun_latn_narrow_filtered", True, True, "hu"),
    "hye": Language("armenic", "Armn", 0.08, "hye", "hye_armn_e_broad"),
    "ind": Language("austronesian", "Latn", 0.06, "", "ind_latn_broad", quickstart="id"),
    "ita": Language("italic", "Latn", 0.7, "ita", "ita_latn_broad_filtered", True),
    "jpn": Language("japonic", "Jpan", 0.3, "jap", "jpn_hira_narrow_filtered"),
    "kat": Language("kartvelian", "Geor", 0.025, "kat", "kat_geor_broad_filtered", quickstart="ka"),
    "klr": Language("sino-tibetan", "Latn", 0.03, "klr"),
    "lat": Language("italic", "Latn", 0.4, "", "lat_latn_clas_broad_filtered", True, True),
    "lit": Language("balto-slavic", "Latn", 0.05, "", "lit_latn_narrow", False, True, "lt"),
    "mlt": Language("semitic", "Latn", 0.06, "", "mlt_latn_broad_filtered", accents=True),
    "mon": Language("mongolic-khitan", "Cyrl", 0.04, "", "mon_cyrl_broad", True),
    "nav": Language("athabaskan-eyak-tlingit", "Latn", 0.03, "nav", "nav_latn_broad", accents=True),
    "nld": Language("germanic", "Latn", 0.4, "", "nld_latn_broad_filtered"),
    "pol": Language("balto-slavic", "Latn", 0.5, "", "pol_latn_broad", accents=True),
    "por": Language("italic", "Latn", 0.6, "", "por_latn_po_broad_filtered", accents=True),
    "rus": Language("balto-slavic", "Cyrl", 0.8, "rus", quickstart="ru"),
    "san": Language("indo-iranian", "Deva", 0.15, "san", "san_deva_broad"),
    "sme": Language("uralic", "Latn", 0.05, "sme", "sme_latn_broad", accents=True),
    "spa": Language("italic", "Latn", 0.9, "spa", "spa_latn_la_broad_filtered", True, True, "es"),
    "swa": Language("atlantic-congo", "Latn", 0.025, "swa", quickstart="sw"),
    "swe": Language("germanic", "Latn", 0.35, "", "swe_latn_broad", False, True, "sv"),
    "tha": Language("tai-kadai", "Thai", 0.08, "", "tha_thai_broad"),
    "tur": Language("turkic", "Latn", 0.2, "tur", "tur_latn_broad", False, True, "tr"),
    "ukr": Language("balto-slavic", "Cyrl", 0.3, "", "ukr_cyrl_narrow"),
    "urd": Language("indo-iranian", "Arab", 0.05, "", "urd_arab_broad"),
    "vie": Language(
        "austroasiatic", "Latn", 0.06, "", "vie_latn_hanoi_narrow_filtered", False, True
    ),
    "yor": Language("atlantic-congo", "Latn", 0.04, "", "yor_latn_broad", accents=True),
    "zul": Language("atlantic-congo", "Latn", 0.03, "", "zul_latn_broad"),
}

#: Folder and name of a language's test set in the pronunciation task, if dialect, script and transcription are those
#: of the study's file. Armenian's, Bulgarian's and Georgian's are not: WikiPron writes some of their vowels with other
#: signs since the task. Less than half of their words that are in both have the same pronunciation.
PRONUNCIATION_TEST: dict[str, str] = {
    "ell": "low/gre", "fra": "medium/fre", "hun": "medium/hun", "ita": "low/ita", "jpn": "medium/jpn_hira",
    "mlt": "low/mlt_latn", "nld": "medium/dut", "vie": "medium/vie_hanoi",
}  # fmt: skip

#: Cells that are never trained on, by (task, language): some for choices, the others for the last word. For the
#: quickstart's tasks, the quickstart itself says which cells are held out.
HELD_OUT: dict[tuple[str, str], Half] = {
    **{
        (task, language): "tuning"
        for task, languages in {
            "inflect": ("dan", "ita"),
            "lemma": ("deu", "heb"),
            "tags": ("rus", "swa"),
            "segment": ("spa",),
            "pron": ("ces", "hye", "sme"),
            "spell": ("jpn", "kat", "yor"),
            "accent": ("swe", "lit"),
        }.items()
        for language in languages
    },
    **{
        (task, language): "test"
        for task, languages in {
            "inflect": ("spa", "bel"),
            "lemma": ("fra", "tur"),
            "tags": ("eng", "hun"),
            "segment": ("ita", "mon"),
            "pron": ("por", "san", "mlt"),
            "spell": ("pol", "dan", "heb"),
            "accent": ("ell", "gle"),
        }.items()
        for language in languages
    },
}


def unit(*parts: object) -> float:
    """A number in (0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") + 0.5) / float(1 << 64)


def train_size(seed: int, task: str, language: str) -> int:
    """How many training rows a cell should have, if its source has so many."""
    wobble = math.exp(0.8 * (unit(seed, "size", language, task) - 0.5))
    return max(30, round(TASKS[task].size * LANGUAGES[language].share * wobble))
