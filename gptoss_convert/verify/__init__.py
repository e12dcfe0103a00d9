"""Verification: one shared forward pass, hand-written weight readers, oracles and metrics.

Nothing here imports the mapping tables or the plan, so that a wrong table is seen from here.
"""
