"""kvpleat inside vLLM (https://github.com/vllm-project/vllm), as an out-of-tree plugin.

vLLM's scheduler, its OpenAI server, its parallelism and its models stay what they are. In reading order:

1. `plugin.py`: what vLLM loads at its start: names of models and of a connector.
2. `models.py`: vLLM's own model classes, whose attention layers share one cache: ours.
3. `memory.py`: that cache, a `DevicePool` over the memory that vLLM allocates.
4. `backend.py`: attention of a flattened batch over it, by the kernels of kvpleat's own engine.
5. `ledger.py`: what each request is charged, in vLLM's blocks; `cache.py`: the spec and the manager that ask it.
6. `connector.py`: what the scheduler tells the workers about seats, and what they tell it about pages.

`settings.py` reads what a user asks for, and refuses what cannot work; `metrics.py` is what Prometheus hears,
`command.py` what `kvpleat serve` runs.
"""
