"""Measuring: quality beside the full cache, speed beside transformers' own. Figures in the docs come from here."""
