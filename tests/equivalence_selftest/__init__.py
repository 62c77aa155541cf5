"""Faults planted one at a time into what the equivalence tests compare: every one must be caught."""
