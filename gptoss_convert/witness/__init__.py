"""Witnesses, which never see the tables: readers written by hand, one forward pass, oracles."""
