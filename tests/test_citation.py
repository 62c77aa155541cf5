"""What ``tokendyn.citation()`` says, and that CITATION.cff says the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import tokendyn
from tokendyn._citation import TOPICS
from tokendyn.errors import OptionError

CFF = Path(__file__).parents[1] / "CITATION.cff"


def entries(text: str) -> list[dict[str, str]]:
    """The fields of every BibTeX entry, without the braces that protect capitals."""
    return [
        {
            name: value.replace("{", "").replace("}", "")
            for name, value in re.findall(r"^  (\w+) = \{(.*)\},$", body, re.M)
        }
        for body in text.split("\n\n")
    ]


def person(author: dict[str, str]) -> str:
    return author.get("name") or f"{author['family-names']}, {author['given-names']}"


def test_the_file_and_the_function_say_the_same() -> None:
    yaml: Any = pytest.importorskip("yaml")
    cff = yaml.safe_load(CFF.read_text(encoding="utf-8"))
    software, *papers = entries(tokendyn.citation())
    assert software == {"author": person(cff["authors"][0]), "title": cff["title"], "version": str(cff["version"])}
    assert cff["version"] == tokendyn.__version__
    assert len(papers) == len(cff["references"]) == 4
    for paper, reference in zip(papers, cff["references"], strict=True):
        assert paper["title"] == reference["title"]
        assert paper["author"] == " and ".join(map(person, reference["authors"]))
        assert paper["year"] == str(reference["year"])
        assert paper.get("url") == reference.get("url")
        venue = reference.get("conference", {}).get("name") or reference["notes"].partition(";")[0]
        assert venue in (paper.get("booktitle"), paper.get("note"))


def test_topics_choose_and_each_entry_comes_once() -> None:
    def keys(*topics: str) -> list[str]:
        return re.findall(r"^@\w+\{(\w+),$", tokendyn.citation(*topics), re.M)

    assert keys("sphere") == ["tokendyn", "anonymous2025spheres", "silvestre2026attention"]
    assert keys("dynamics", "spectrum") == ["tokendyn", "vo2025demystifying"]
    assert keys("reordering") == ["tokendyn", "vo2025demystifying", "prillo2020softsort"]
    assert sorted(keys()) == sorted({"tokendyn", *(key for topic in TOPICS.values() for key in topic)})
    assert keys(*TOPICS) == keys()


def test_braces_balance() -> None:
    assert tokendyn.citation().count("{") == tokendyn.citation().count("}")


def test_an_unknown_topic_is_refused() -> None:
    with pytest.raises(OptionError, match="topic is 'circle', expected some of 'dynamics', 'sphere'"):
        tokendyn.citation("circle")
