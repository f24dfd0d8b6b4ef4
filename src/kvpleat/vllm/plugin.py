"""What vLLM loads at its start, in each of its processes (entry point group `vllm.general_plugins`): names, no more.

Nothing of vLLM changes for models that do not ask for kvpleat.
"""

import logging
from typing import Any

from kvpleat.errors import UnsupportedError
from kvpleat.vllm.settings import ARCHITECTURES, BACKEND, CONNECTOR, PLACES, PREFIX, Settings, check, check_version


def register() -> None:
    """Tell vLLM the names of kvpleat's model classes and of its connector. Twice is no error."""
    from vllm import ModelRegistry
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.version import __version__

    check_version(__version__)
    early = type("KvpleatConfig", (VerifyAndUpdateConfig,), {"verify_and_update_config": staticmethod(check_early)})
    for name in ARCHITECTURES:
        MODELS_CONFIG_MAP[f"{PREFIX}{name}"] = early
        ModelRegistry.register_model(f"{PREFIX}{name}", f"kvpleat.vllm.models:{PREFIX}{name}")
    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "kvpleat.vllm.connector", CONNECTOR)


def check_early(vllm_config: Any) -> None:
    """Refuse what cannot work while vLLM puts its config together, in the process that the user started: what workers
    say stands among their traces. They check again, since vLLM goes on to change its config.

    Prefix caching is switched off: vLLM has it on unless told otherwise, and does not say here which it was.

    Raises:
        OptionError, UnsupportedError: see `settings`.
    """
    check(vllm_config)
    Settings.of(vllm_config.model_config.hf_config)
    backend = vllm_config.attention_config.backend
    if backend is not None:
        raise UnsupportedError(
            f"attention_backend={backend.name}: kvpleat cannot serve with it inside vLLM, because {BACKEND}. Please "
            "leave out --attention-backend."
        )
    if vllm_config.cache_config.enable_prefix_caching:
        vllm_config.cache_config.enable_prefix_caching = False
        logging.getLogger("vllm.kvpleat").warning(
            "kvpleat switched prefix caching off, which vLLM has on unless told otherwise: %s. "
            "--no-enable-prefix-caching says so beforehand.",
            PLACES,
        )
