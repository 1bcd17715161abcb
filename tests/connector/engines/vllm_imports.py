"""What an engine imports in its life, imported in the fork server of preloaded.py, and nothing else done there.

The objects are frozen: each of the collections that vLLM asks for would visit, and so copy, all of them in every child.
"""

import gc

import vllm.distributed.elastic_ep.elastic_execute
import vllm.entrypoints.llm
import vllm.model_executor.layers.quantization.online.base
import vllm.model_executor.models.llama
import vllm.plugins.lora_resolvers.hf_hub_resolver
import vllm.triton_utils.dispatcher
import vllm.v1.attention.backends.cpu_attn
import vllm.v1.core.sched.scheduler
import vllm.v1.engine.core
import vllm.v1.engine.llm_engine
import vllm.v1.executor.multiproc_executor
import vllm.v1.executor.uniproc_executor
import vllm.v1.pool.flash_maxsim
import vllm.v1.worker.cpu_worker  # noqa: F401

import lmcache.blend
import lmcache.connector.vllm
import lmcache.integration.vllm.vllm_v1_adapter  # noqa: F401

gc.collect()
gc.freeze()
