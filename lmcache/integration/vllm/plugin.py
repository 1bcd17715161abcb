"""Entry point of vllm.general_plugins: makes the short name "LMCacheConnector" work in --kv-transfer-config."""

from __future__ import annotations


def register() -> None:
    """Register the connector's short name. vLLM calls this in every process, sometimes twice."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "LMCacheConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("LMCacheConnector", "lmcache.connector", "LMCacheConnector")
