"""Makes our log visible under vLLM, which gives handlers to its own logger only."""

from __future__ import annotations

import logging


class ToVLLM(logging.Handler):
    """Hands our records to whatever vLLM logs to, as its level is, unless the root logger has handlers of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        vllm = logging.getLogger("vllm")
        if not logging.getLogger().handlers and vllm.isEnabledFor(record.levelno):
            vllm.handle(record)


def show_logs() -> None:
    """Let our log go where vLLM's goes, at its level. Idempotent.

    Nothing is done where somebody has set logging up for us (handlers of the logger ``lmcache``), for all (of the root
    logger), or for nobody (VLLM_CONFIGURE_LOGGING=0: vLLM's logger has none). A level that was set is left as it is.
    """
    ours, vllm = logging.getLogger("lmcache"), logging.getLogger("vllm")
    if ours.handlers or logging.getLogger().handlers or not vllm.handlers:
        return
    ours.addHandler(ToVLLM())
    if ours.level == logging.NOTSET:
        ours.setLevel(vllm.getEffectiveLevel())
