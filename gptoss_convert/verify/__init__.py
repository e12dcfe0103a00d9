"""Verification: exact values, one shared forward pass, hand-written readers, oracles, the gate.

Readers, forward pass and oracles import neither the mapping tables nor the plan, so that a wrong
table is seen from there; values read through the tables on purpose.
"""
