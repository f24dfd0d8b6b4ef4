"""The engine: many requests at once over one paged, compressed KV memory, with vLLM's names for what is asked."""
