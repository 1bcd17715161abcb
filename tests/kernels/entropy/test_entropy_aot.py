"""What the compiler makes of the entropy coder: no spills, no division, one lookup a symbol, symbols in wide words."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache.kernels.entropy import coder as entropy
from lmcache.kernels.entropy.tables import FrequencyTables, quantise_counts

# The warning of triton 3.9 is about floating-point arithmetic, and the coder has none.
pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

BUDGETS = tomllib.loads((Path(__file__).parent / "budgets_entropy.toml").read_text())
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
CASES = ("wide", "narrow", "periodic")  # streams of 8-byte words; interleaved by symbol; so with 64 tables each
STREAMS, SYMBOLS = 128, 768


def recorded(case: str, target: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What encoding and decoding would launch."""
    from lmcache.kernels.testing import aot

    kernels = {name: aot.Recorder(getattr(entropy, name).jitted) for name in ("_encode_streams", "_pack_rows")}
    kernels["_decode_streams"] = aot.Recorder(entropy._decode_streams.jitted)
    for name, recorder in kernels.items():
        monkeypatch.setattr(entropy, name, recorder)
    monkeypatch.setattr(entropy, "_LANES", 64 if target.startswith("gfx") else 32)
    shape = (1, STREAMS, SYMBOLS) if case == "wide" else (1, SYMBOLS, STREAMS)
    symbols = torch.zeros(shape, dtype=torch.uint8)
    lanes = symbols if case == "wide" else symbols.transpose(1, 2)
    tables = FrequencyTables(quantise_counts(torch.ones(3, 16)))
    table_of = torch.zeros(STREAMS, 64 if case == "periodic" else 1, dtype=torch.int32)
    words = torch.zeros(STREAMS * entropy.max_words(SYMBOLS), dtype=torch.uint16)
    entropy._encode_triton(lanes, tables, table_of, words)
    entropy._decode_triton(words, torch.zeros(STREAMS, dtype=torch.uint16), tables, table_of, lanes)
    return kernels


def compiled_within(budget: dict[str, int], target: str, recorder: Any) -> Any:
    from lmcache.kernels.testing import aot

    compiled = aot.compile_for(target, recorder)
    assert compiled.local == compiled.shared == 0
    assert compiled.registers <= budget["registers"]
    assert sum(compiled.opcodes.values()) <= budget["instructions"]
    return compiled


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_encoding_keeps_its_budget(target: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = recorded(case, target, monkeypatch)["_encode_streams"]
    assert recorder.options["WIDE"] == (case == "wide")
    compiled = compiled_within(BUDGETS["encode"][case][target], target, recorder)
    lookups, multiplications, division = {
        "sm": (r"LDG\.E\.64", r"IMAD\.HI\.U32", r"MUFU\.RCP.*"),
        "gfx": (r"(global|buffer)_load_dwordx2", r"v_mul_hi_u32", r"v_rcp.*"),
    }[re.sub(r"_?\d.*", "", target)]
    assert compiled.count(lookups) == (9 if case == "wide" else 8)  # an entry a symbol; the symbols of a wide word
    assert compiled.count(multiplications) >= 8
    assert compiled.count(division) <= 1  # of the stream's number, before the loop


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_decoding_keeps_its_budget(target: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = recorded(case, target, monkeypatch)["_decode_streams"]
    compiled = compiled_within(BUDGETS["decode"][case][target], target, recorder)
    wide, narrow = {
        "sm": (r"STG\.E\.64", r"STG\.E\.U8"),
        "gfx": (r"(global|buffer)_store_dwordx2", r"(global|buffer)_store_byte"),
    }[re.sub(r"_?\d.*", "", target)]
    assert compiled.count(wide) == (1 if case == "wide" else 0)
    assert (compiled.count(narrow) == 1) == (case == "wide")  # whether the stream is intact


@pytest.mark.parametrize("target", TARGETS)
def test_packing_keeps_its_budget(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_within(BUDGETS["pack"][target], target, recorded("wide", target, monkeypatch)["_pack_rows"])
