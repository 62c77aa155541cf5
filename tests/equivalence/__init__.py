"""Every operation, on every backend, against the spec.

``subjects`` says what there is to compare, ``cases`` on which arguments, ``frameworks`` how each backend is run and
differentiated, ``compare`` what counts as equal; ``check`` puts them together and is what the self-test plants its
faults into, ``record`` counts. To cover a new operation: one row in ``subjects.SUBJECTS``, one generator in ``cases``,
a case named in ``tests/data/golden/make.py``, a fault in ``tests/equivalence_selftest``; tests ask for each of them.
"""
