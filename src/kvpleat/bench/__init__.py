"""Measuring: quality beside the full cache, speed beside transformers' own. Every figure in the docs comes from here."""
