"""The transformers surface: families, attaching to a model, the Cache that generate() sees. Public hooks only."""
