"""Slow oracles: one plain loop for each formula, in float64 NumPy, on one example at a time.

They share no code with the package. An oracle of a token-level function takes [T], of a ranking
[K], of a sequence-level or element-wise function plain numbers.
"""
