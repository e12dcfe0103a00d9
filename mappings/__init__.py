"""The mapping tables, shipped as package data; `layouts/model.py` reads them."""
