"""What we log is seen under vLLM, and nobody's own logging is touched."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator

import pytest

from lmcache.connector.logs import show_logs

NAMES = ("", "lmcache", "vllm")


@pytest.fixture
def unconfigured() -> Iterator[Callable[[], None]]:
    """Call it first: loggers as in a process where nobody has set anything up. (pytest adds its handlers to the root
    logger behind the fixtures.)"""
    loggers = [logging.getLogger(name or None) for name in NAMES]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]

    def clear() -> None:
        for logger in loggers:
            logger.handlers, logger.propagate = [], True
            logger.setLevel(logging.WARNING if logger.name == "root" else logging.NOTSET)

    yield clear
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def listen(name: str, level: int = logging.NOTSET) -> io.StringIO:
    """Give a logger a handler, as vLLM or a user would; returns what it writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger(name or None)
    logger.addHandler(handler)
    logger.setLevel(level)
    return stream


def say() -> None:
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        logging.getLogger("lmcache.somewhere").log(level, "hello")


def test_records_go_where_vllms_go_at_its_level(unconfigured: Callable[[], None]) -> None:
    unconfigured()
    vllm = listen("vllm", logging.INFO)
    logging.getLogger("vllm").propagate = False
    show_logs()
    show_logs()
    say()
    assert vllm.getvalue() == "INFO lmcache.somewhere hello\nWARNING lmcache.somewhere hello\n"


def test_a_level_of_vllm_that_hides_lines_hides_ours(unconfigured: Callable[[], None]) -> None:
    unconfigured()
    vllm = listen("vllm", logging.WARNING)
    show_logs()
    say()
    assert vllm.getvalue() == "WARNING lmcache.somewhere hello\n"


def test_handlers_that_vllm_gets_later_are_used(unconfigured: Callable[[], None]) -> None:
    unconfigured()
    listen("vllm", logging.INFO)
    show_logs()
    logging.getLogger("vllm").handlers = []
    later = listen("vllm", logging.INFO)
    say()
    assert later.getvalue().count("hello") == 2


@pytest.mark.parametrize("name", ["", "lmcache"])
def test_logging_that_somebody_has_set_up_is_left_alone(name: str, unconfigured: Callable[[], None]) -> None:
    unconfigured()
    own, vllm = listen(name, logging.INFO), listen("vllm", logging.DEBUG)
    show_logs()
    say()
    assert own.getvalue().count("hello") == 2
    assert vllm.getvalue() == ""
    assert logging.getLogger("lmcache").level == (logging.INFO if name else logging.NOTSET)


def test_a_root_logger_that_is_set_up_later_gets_each_line_once(unconfigured: Callable[[], None]) -> None:
    unconfigured()
    vllm = listen("vllm", logging.INFO)
    show_logs()
    root = listen("", logging.INFO)
    say()
    assert root.getvalue().count("hello") == 2
    assert vllm.getvalue() == ""


def test_a_level_of_ours_that_was_set_is_kept(unconfigured: Callable[[], None]) -> None:
    unconfigured()
    vllm = listen("vllm", logging.DEBUG)
    logging.getLogger("lmcache").setLevel(logging.WARNING)
    show_logs()
    say()
    assert vllm.getvalue() == "WARNING lmcache.somewhere hello\n"


def test_where_vllm_configures_no_logging_neither_do_we(unconfigured: Callable[[], None]) -> None:
    unconfigured()
    show_logs()
    assert logging.getLogger("lmcache").handlers == []
    assert logging.getLogger("lmcache").level == logging.NOTSET
