"""What vLLM loads at its start, in each of its processes (entry point group `vllm.general_plugins`): names, no more.

Nothing of vLLM changes for models that do not ask for kvpleat.
"""

from kvpleat.vllm.settings import ARCHITECTURES, CONNECTOR, PREFIX, check_version


def register() -> None:
    """Tell vLLM the names of kvpleat's model classes and of its connector. Twice is no error."""
    from vllm import ModelRegistry
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.version import __version__

    check_version(__version__)
    for name in ARCHITECTURES:
        ModelRegistry.register_model(f"{PREFIX}{name}", f"kvpleat.vllm.models:{PREFIX}{name}")
    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "kvpleat.vllm.connector", CONNECTOR)
