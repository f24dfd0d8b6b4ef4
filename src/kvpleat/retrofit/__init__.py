"""Retrofit: continued training that teaches a model to compress its KV memory."""

from kvpleat.retrofit.config import Recipe
from kvpleat.retrofit.data import mixture
from kvpleat.retrofit.data_held_out import held_out
from kvpleat.retrofit.data_store import load_tokens
from kvpleat.retrofit.train import retrofit

__all__ = ["Recipe", "held_out", "load_tokens", "mixture", "retrofit"]
