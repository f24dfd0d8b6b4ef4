"""The judge of encoders: `python -m kvpleat.bench.encoder` (see `__main__.py`)."""
