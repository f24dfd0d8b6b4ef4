"""Retrofit: continued training that teaches a model to compress its KV memory."""
