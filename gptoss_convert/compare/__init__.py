"""Comparisons on the tables: exact values, differences, what explains them."""
