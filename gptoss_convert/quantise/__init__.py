"""Rounding of BF16 experts that MXFP4 cannot hold: by a rule, or calibrated on text."""
