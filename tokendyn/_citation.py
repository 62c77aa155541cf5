"""What to cite. The same facts stand in CITATION.cff; a test holds the two together."""

from __future__ import annotations

from tokendyn import __version__
from tokendyn.errors import OptionError

_ENTRIES = {
    "tokendyn": (
        "software",
        {
            "author": "{The tokendyn authors}",
            "title": "{tokendyn}: token dynamics of selective state space models",
            "version": __version__,
        },
    ),
    "vo2025demystifying": (
        "inproceedings",
        {
            "author": "Vo, Thieu N. and Pham, Duy-Tung and Tong, Xin T. and Nguyen, Tan Minh",
            "title": "Demystifying the Token Dynamics of Deep Selective State Space Models",
            "booktitle": "International Conference on Learning Representations",
            "year": "2025",
            "url": "https://openreview.net/forum?id=qtTIP5Gjc5",
        },
    ),
    "anonymous2025spheres": (
        "unpublished",
        {
            "author": "{Anonymous}",
            "title": "Token Dynamics on Spheres in {Mamba} Models",
            "note": "Submitted to the International Conference on Learning Representations 2026",
            "year": "2025",
            "url": "https://openreview.net/forum?id=466gVY2sBQ",
        },
    ),
    "silvestre2026attention": (
        "misc",
        {
            "author": "Silvestre, João Pedro and Rodríguez Abella, Álvaro and Tabuada, Paulo",
            "title": "The Attention Within: Consensus Dynamics in Selective State Space Models",
            "note": "arXiv:2609.17997",
            "year": "2026",
            "url": "https://arxiv.org/abs/2609.17997",
        },
    ),
    "prillo2020softsort": (
        "inproceedings",
        {
            "author": "Prillo, Sebastian and Eisenschlos, Julian",
            "title": "{SoftSort}: A Continuous Relaxation for the argsort Operator",
            "booktitle": "International Conference on Machine Learning",
            "year": "2020",
        },
    ),
}

#: What was used -> whose results those are.
TOPICS = {
    "dynamics": ("vo2025demystifying",),
    "sphere": ("anonymous2025spheres", "silvestre2026attention"),
    "reordering": ("vo2025demystifying", "prillo2020softsort"),
    "spectrum": ("vo2025demystifying",),
}


def citation(*topics: str) -> str:
    """BibTeX of tokendyn and of the papers whose results it implements.

    ::

        print(tokendyn.citation())            # everything
        print(tokendyn.citation("sphere"))    # tokendyn, and whose results on the sphere those are

    Args:
        topics: what you used: ``"dynamics"`` (simulate, classify, regimes on the line and in R^D), ``"sphere"``,
            ``"reordering"`` (importance score, SoftSort), ``"spectrum"`` (``io_regime``). All by default.

    Returns:
        The entries, tokendyn's first, each once.

    Raises:
        OptionError: no such topic.
    """
    for topic in topics:
        if topic not in TOPICS:
            raise OptionError(f"citation: topic is {topic!r}, expected some of {', '.join(map(repr, TOPICS))}")
    used = {key for topic in topics or TOPICS for key in TOPICS[topic]}
    return "\n\n".join(_entry(key) for key in _ENTRIES if key == "tokendyn" or key in used)


def _entry(key: str) -> str:
    kind, fields = _ENTRIES[key]
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])
