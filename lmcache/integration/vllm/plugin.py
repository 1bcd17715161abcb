"""Entry point of vllm.general_plugins, called in every process of vLLM's before it loads a model.

Makes the short name "LMCacheConnector" work in --kv-transfer-config, and notes weights that are packed out of sight.
"""

from __future__ import annotations


def register() -> None:
    """Register the connector's short name. vLLM calls this in every process, sometimes twice."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from lmcache.connector.identity.packed_weights import note_packed_weights

    # Before a model is loaded, or its weights have been packed out of sight.
    note_packed_weights()
    if "LMCacheConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("LMCacheConnector", "lmcache.connector", "LMCacheConnector")
