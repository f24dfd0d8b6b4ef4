"""The owner of all KV memory: pages and their allocator, streams over pages, saving and forking. Knows no policy."""
