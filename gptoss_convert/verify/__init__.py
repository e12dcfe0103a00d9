"""The gate: are two checkpoints the same model? Levels, each includes those before it."""
