"""How the passages of a request's prompt are found: by the configuration, or as the request says.

kv_transfer_params={"lmcache.blend": {"spans": [[12, 300], [300, 512]]}}     whoever made the prompt knows
kv_transfer_params={"lmcache.blend": {"separator": [774, 774]}}              token ids between passages
kv_transfer_params={"lmcache.blend": true}                                   by content
kv_transfer_params={"lmcache.blend": false}                                  exact reuse only
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from lmcache.blend.reuse import Segment
from lmcache.blend.segments import Tokens, explicit_spans, split_by_separator
from lmcache.config import BlendConfig

PARAMETER = "lmcache.blend"


class Passages(msgspec.Struct, frozen=True):
    """spans: `[start, stop)` of each passage. separator: the token ids between them. Neither: by content."""

    spans: tuple[tuple[int, int], ...] = ()
    separator: tuple[int, ...] = ()

    @property
    def by_content(self) -> bool:
        return not self.spans and not self.separator

    def segments(self, tokens: Tokens) -> list[Segment]:
        """Where the passages are. What follows the last separator is the question, and no passage.

        ValueError for spans that leave the prompt.
        """
        if self.spans:
            return explicit_spans(self.spans, len(tokens))
        return split_by_separator(tokens, self.separator)[: None if _ends_with(tokens, self.separator) else -1]


def passages_of(params: Mapping[str, Any] | None, config: BlendConfig | None) -> Passages | None:
    """How a request's passages are found, None where it is not blended. Raises TypeError for anything else."""
    if config is None:
        return None
    wanted = (params or {}).get(PARAMETER)
    if wanted is None:
        if config.find == "request":
            return None
        return Passages(separator=config.separator if config.find == "separator" else ())
    if isinstance(wanted, bool):
        return Passages() if wanted else None
    if isinstance(wanted, Mapping) and len(wanted) == 1:
        if spans := _spans(wanted.get("spans")):
            return Passages(spans=spans)
        if separator := _ids(wanted.get("separator")):
            return Passages(separator=separator)
    raise TypeError(
        f"kv_transfer_params[{PARAMETER!r}] is {wanted!r}; it must be true, false, {{'spans': [[start, stop], ...]}} "
        "or {'separator': [token ids]}"
    )


def _spans(value: object) -> tuple[tuple[int, int], ...]:
    if not isinstance(value, list | tuple):
        return ()
    pairs = [_ids(pair) for pair in value]
    return tuple((pair[0], pair[1]) for pair in pairs) if all(len(pair) == 2 for pair in pairs) else ()


def _ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(each) is int and each >= 0 for each in value):
        return ()
    return tuple(value)


def _ends_with(tokens: Tokens, separator: tuple[int, ...]) -> bool:
    return len(tokens) >= len(separator) and tuple(tokens[len(tokens) - len(separator) :].tolist()) == separator
