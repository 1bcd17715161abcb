"""The entropy coder: the same words from a kernel, from numpy and from a definition in plain integers; nothing else."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.entropy import coder as entropy
from lmcache.kernels.entropy.coder import MAX_SYMBOLS, Encoded, max_words, rans_decode, rans_encode
from lmcache.kernels.entropy.host import rans_decode_numpy, rans_encode_numpy
from lmcache.kernels.entropy.tables import FrequencyTables, entropy_bits, quantise_counts

# triton 3.6's interpreter turns a loop's bound into an int in a way that numpy frowns on.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")

ROOT = Path(__file__).resolve().parents[3]
RED_ZONE = 64
POISON = 0xA5


def symbols_like(source: str, shape: Sequence[int], alphabet: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    drawn = {
        "uniform": lambda: rng.integers(0, alphabet, shape),
        "gaussian": lambda: np.round(rng.normal((alphabet - 1) / 2, alphabet / 8, shape)),
        "geometric": lambda: rng.geometric(0.4, shape) - 1,
        "one": lambda: np.full(shape, alphabet // 2),
    }[source]()
    return torch.from_numpy(np.clip(drawn, 0, alphabet - 1).astype(np.uint8))


def tables_for(symbols: torch.Tensor, alphabet: int, table_of: torch.Tensor, num_tables: int) -> FrequencyTables:
    """The tables that fit symbols `[S, N]` best."""
    which = table_of[:, torch.arange(symbols.shape[1]) % table_of.shape[1]].long()
    cells = (which * alphabet + symbols.long()).flatten()
    return FrequencyTables(quantise_counts(torch.bincount(cells, minlength=num_tables * alphabet).view(num_tables, -1)))


def by_definition(symbols: list[int], freqs: list[list[int]]) -> list[int]:
    """One stream's words, in integers of any size; `freqs[i]` is the table of symbol i."""
    state, words = 1 << 16, []
    for symbol, table in reversed(list(zip(symbols, freqs, strict=True))):
        f, start = table[symbol], sum(table[:symbol])
        if state >= f << 20:
            words.append(state % 65536)
            state //= 65536
        state = state // f * 4096 + start + state % f
    return [state >> 16, state % 65536, *reversed(words)]


class Zoned:
    """A tensor inside red zones, all poisoned."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, shift: int = 0) -> None:
        self.start = RED_ZONE + shift
        nbytes = math.prod(shape) * dtype.itemsize
        self.buffer = torch.full((self.start + nbytes + RED_ZONE,), POISON, dtype=torch.uint8, device=device)
        self.tensor = self.buffer[self.start : self.start + nbytes].view(dtype).view(*shape)

    def check_zones(self) -> None:
        inside = self.tensor.numel() * self.tensor.element_size()
        assert bool((self.buffer[: self.start] == POISON).all())
        assert bool((self.buffer[self.start + inside :] == POISON).all())


def encode(symbols: torch.Tensor, tables: FrequencyTables, table_of: torch.Tensor) -> Encoded:
    """On the device of `tables`, into red zones, compared with numpy's words."""
    device, streams = tables.device, len(table_of)
    flat = symbols.cpu().reshape(streams, symbols.shape[-1])
    zoned = Zoned((streams * max_words(symbols.shape[-1]) + 3,), torch.uint16, device)
    encoded = rans_encode(symbols, tables, table_of.to(device), zoned.tensor)
    want_words, want_lengths = rans_encode_numpy(flat.numpy(), tables.to("cpu"), table_of.numpy())
    used = int(encoded.used)
    assert encoded.words.data_ptr() == zoned.tensor.data_ptr()
    assert encoded.used.device == encoded.lengths.device == symbols.device
    np.testing.assert_array_equal(encoded.lengths.cpu().numpy(), want_lengths)
    np.testing.assert_array_equal(encoded.words.cpu().numpy()[:used], want_words)
    assert bool((encoded.words.cpu().view(torch.uint8)[2 * used :] == POISON).all())
    zoned.check_zones()
    return encoded


def round_trip(
    symbols: torch.Tensor,
    alphabet: int,
    device: torch.device,
    table_of: torch.Tensor | None = None,
    num_tables: int = 1,
) -> Encoded:
    """Of `symbols` `[S, N]`, through tables that fit them."""
    table_of = torch.zeros(len(symbols), 1, dtype=torch.int32) if table_of is None else table_of
    tables = tables_for(symbols, alphabet, table_of, num_tables).to(device)
    encoded = encode(symbols.to(device), tables, table_of)
    out = Zoned(tuple(symbols.shape), torch.uint8, device)
    intact = rans_decode(encoded.words, encoded.lengths, tables, table_of.to(device), out.tensor)
    assert intact.dtype == torch.bool
    assert bool(intact.all())
    assert torch.equal(out.tensor.cpu(), symbols)
    out.check_zones()
    return encoded


@pytest.mark.parametrize("alphabet", [1, 2, 3, 16, 17, 255, 256])
@pytest.mark.parametrize("source", ["uniform", "gaussian", "geometric", "one"])
def test_symbols_come_back(source: str, alphabet: int, device: torch.device) -> None:
    round_trip(symbols_like(source, (5, 24), alphabet), alphabet, device)


@pytest.mark.parametrize("num_streams", [0, 1, 31, 33, 100])
@pytest.mark.parametrize("num_symbols", [0, 1, 7, 8, 9, 63])
def test_any_number_of_streams_and_symbols(num_streams: int, num_symbols: int, device: torch.device) -> None:
    encoded = round_trip(symbols_like("gaussian", (num_streams, num_symbols), 16), 16, device)
    assert int(encoded.used) >= 2 * num_streams


@pytest.mark.parametrize("period", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("num_symbols", [16, 19])
def test_a_table_for_each_place_in_a_period(period: int, num_symbols: int, device: torch.device) -> None:
    table_of = torch.randint(0, 7, (6, period), dtype=torch.int32, generator=torch.Generator().manual_seed(period))
    round_trip(symbols_like("geometric", (6, num_symbols), 12), 12, device, table_of, 7)


@pytest.mark.parametrize("what", ["aligned", "odd start", "odd stride", "by symbol", "interleaved", "interleaved odd"])
def test_symbols_may_lie_in_any_order(what: str, device: torch.device) -> None:
    planes, streams, n = 3, 14, 24
    shape, view = {
        "aligned": ((planes, streams, n), lambda t: t),
        "odd start": ((planes, streams, n), lambda t: t),
        "odd stride": ((planes, streams, n + 5), lambda t: t[..., :n]),
        "by symbol": ((n, planes * streams), lambda t: t.T),
        "interleaved": ((planes, n * streams), lambda t: t.view(planes, n, streams).transpose(1, 2)),
        "interleaved odd": ((planes, n + 1, streams + 1), lambda t: t[:, :n, :streams].transpose(1, 2)),
    }[what]
    source, out = (Zoned(shape, torch.uint8, device, shift=what == "odd start") for _ in range(2))
    symbols = view(source.tensor)
    symbols.copy_(symbols_like("gaussian", symbols.shape, 16).to(device))
    table_of = torch.randint(0, 4, (planes * streams, 1), dtype=torch.int32)
    tables = FrequencyTables(quantise_counts(torch.rand(4, 16)), device)
    encoded = encode(symbols, tables, table_of)
    intact = rans_decode(encoded.words, encoded.lengths, tables, table_of.to(device), view(out.tensor))
    assert bool(intact.all())
    want = torch.full(shape, POISON, dtype=torch.uint8, device=device)
    view(want).copy_(symbols)  # gaps keep what they held
    assert torch.equal(out.tensor, want)
    out.check_zones()


def test_wide_words_are_used_where_every_stream_is_aligned() -> None:
    base = torch.zeros(4096, dtype=torch.uint8)
    assert entropy._widen(base.view(1, 64, 64))[1]
    assert entropy._widen(base[:3840].view(1, 60, 64)[:, :, 8:56])[1]
    for lanes in (
        base[1:2049].view(1, 32, 64),
        base[:3900].view(1, 60, 65)[..., :64],
        base.view(1, 64, 64)[..., :60],
        base.view(1, 64, 64).transpose(1, 2),
        base[:0].view(1, 64, 0),
    ):
        assert not entropy._widen(lanes)[1]


@pytest.mark.parametrize("alphabet", range(1, 257, 5))
def test_numpy_follows_the_definition(alphabet: int) -> None:
    symbols = symbols_like("geometric" if alphabet % 2 else "gaussian", (4, 50), alphabet)
    table_of = torch.tensor([[0, 1, 2], [2, 1, 0], [1, 1, 1], [0, 0, 2]], dtype=torch.int32)
    tables = tables_for(symbols, alphabet, table_of, 3)
    words, lengths = rans_encode_numpy(symbols.numpy(), tables, table_of.numpy())
    freqs = tables.freqs.tolist()
    for stream, found in enumerate(np.split(words, np.cumsum(lengths)[:-1])):
        want = by_definition(symbols[stream].tolist(), [freqs[table_of[stream, i % 3]] for i in range(50)])
        assert found.tolist() == want
    by_step, intact = rans_decode_numpy(words, lengths, tables, table_of.numpy(), 50)
    assert intact.all()
    np.testing.assert_array_equal(by_step.T, symbols.numpy())


def test_every_frequency_codes(device: torch.device) -> None:
    tables = FrequencyTables(torch.stack([torch.arange(1, 4096), 4096 - torch.arange(1, 4096)], 1), device)
    every = 17 if device.type == "cpu" else 1
    table_of = torch.arange(0, 4095, every, dtype=torch.int32)[:, None]
    symbols = symbols_like("uniform", (len(table_of), 16), 2, seed=3)
    encode(symbols.to(device), tables, table_of)


def test_the_worst_symbols_fit_exactly(device: torch.device) -> None:
    tables = FrequencyTables(torch.tensor([[1, 4095], [4095, 1]]), device)
    symbols = torch.tensor([0, 1], dtype=torch.uint8)[:, None].expand(2, 40).contiguous()
    encoded = encode(symbols.to(device), tables, torch.tensor([[0], [1]], dtype=torch.int32))
    assert encoded.lengths.tolist() == [max_words(40)] * 2


@pytest.mark.host
def test_lengths_fit_sixteen_bits() -> None:
    tables = FrequencyTables(torch.tensor([[4095, 1]]))
    symbols = np.ones((1, MAX_SYMBOLS), dtype=np.uint8)
    _, lengths = rans_encode_numpy(symbols, tables, np.zeros((1, 1), np.int32))
    assert lengths[0] == max_words(MAX_SYMBOLS) == 65535
    assert max_words(MAX_SYMBOLS + 1) > 65535


@pytest.mark.parametrize("source", ["gaussian", "geometric"])
def test_three_per_cent_above_the_entropy_at_the_recommended_split(source: str) -> None:
    symbols = symbols_like(source, (60, 12288), 16, seed=1)  # 30 layers, keys and values, of 64 tokens x 192 channels
    counts = torch.stack([torch.bincount(plane.long(), minlength=16) for plane in symbols])
    tables = FrequencyTables(quantise_counts(counts))
    ideal = entropy_bits(counts)
    assert bool((entropy_bits(counts, tables.freqs) <= 1.002 * ideal).all())
    streams = 16  # 40 bits each: about 2 % of a plane
    table_of = np.arange(60, dtype=np.int32).repeat(streams)[:, None]
    words, lengths = rans_encode_numpy(symbols.reshape(60 * streams, -1).numpy(), tables, table_of)
    taken = 16 * (len(words) + len(lengths))
    assert float(ideal.sum()) < taken < 1.03 * float(ideal.sum())


def damaged(device: torch.device) -> tuple[torch.Tensor, Encoded, FrequencyTables, torch.Tensor]:
    symbols = symbols_like("gaussian", (40, 32), 16)
    table_of = torch.zeros(40, 1, dtype=torch.int32)
    tables = tables_for(symbols, 16, table_of, 1).to(device)
    encoded = encode(symbols.to(device), tables, table_of)
    words = encoded.words[: int(encoded.used)].clone()
    return symbols, Encoded(words, encoded.lengths, encoded.used), tables, table_of.to(device)


@pytest.mark.parametrize("bit", [0, 7, 15])
def test_a_flipped_bit_is_noticed_in_its_stream_only(bit: int, device: torch.device) -> None:
    symbols, encoded, tables, table_of = damaged(device)
    words, lengths = encoded.words.cpu().numpy(), encoded.lengths.cpu().numpy()
    firsts = np.cumsum(lengths, dtype=np.int64) - lengths
    hit = np.arange(0, 40, 2)
    words[firsts[hit] + hit % lengths[hit]] ^= 1 << bit
    out = torch.full((40, 32), POISON, dtype=torch.uint8, device=device)
    intact = rans_decode(torch.from_numpy(words).to(device), encoded.lengths, tables, table_of, out).cpu()
    assert not bool(intact[hit].any())
    assert bool(intact[1::2].all())
    assert torch.equal(out.cpu()[1::2], symbols[1::2])


@pytest.mark.parametrize("what", ["zeros", "ones", "random", "short", "empty", "longest", "no length", "swapped"])
def test_garbage_is_noticed_and_harmless(what: str, device: torch.device) -> None:
    _, encoded, tables, table_of = damaged(device)
    words, lengths = encoded.words.cpu().numpy().copy(), encoded.lengths.cpu().numpy().copy()
    good = 0
    match what:
        case "zeros" | "ones":
            words[:] = 0 if what == "zeros" else 0xFFFF
        case "random":
            words[:] = np.random.default_rng(0).integers(0, 65536, len(words))
            lengths[:] = np.random.default_rng(1).integers(0, 65536, len(lengths))
        case "short":
            words, good = words[:-1], 39
        case "empty":
            words = words[:0]
        case "longest" | "no length":
            lengths[:] = 65535 if what == "longest" else 0
        case "swapped":
            lengths[[3, 4]] += np.array([1, -1]).astype(np.uint16)
            good = 38
    given, zoned = torch.from_numpy(words), Zoned((40, 32), torch.uint8, device)
    intact = rans_decode(given.to(device), torch.from_numpy(lengths).to(device), tables, table_of, zoned.tensor)
    assert int(intact.sum()) == good
    _, by_numpy = rans_decode_numpy(words, lengths, tables.to("cpu"), table_of.cpu().numpy(), 32)
    np.testing.assert_array_equal(intact.cpu().numpy(), by_numpy)
    zoned.check_zones()


@pytest.mark.parametrize("bad", [5, 16, 255])
def test_a_symbol_without_a_slot_is_never_lost_silently(bad: int, device: torch.device) -> None:
    freqs = torch.full((1, 16), 256)
    freqs[0, 5], freqs[0, 6] = 0, 512
    tables = FrequencyTables(freqs, device)
    symbols = torch.zeros(3, 16, dtype=torch.uint8, device=device)
    symbols[1, 9] = bad
    table_of = torch.zeros(3, 1, dtype=torch.int32, device=device)
    if not entropy.runs_kernel(device):
        with pytest.raises(KernelArgumentError, match=f"symbol 9 of stream 1 is {bad}"):
            rans_encode(symbols, tables, table_of)
        return
    encoded = rans_encode(symbols, tables, table_of)
    assert encoded.lengths.tolist()[1] == 0
    out = torch.full_like(symbols, POISON)
    assert rans_decode(encoded.words, encoded.lengths, tables, table_of, out).tolist() == [True, False, True]
    assert torch.equal(out[::2], symbols[::2])


@pytest.mark.interpret
@pytest.mark.parametrize("layout", ["wide", "narrow", "by symbol", "periodic"])
def test_kernels_touch_only_what_they_are_given(layout: str) -> None:
    from lmcache.kernels.testing.sanitizer import sanitized

    shape = (40, 20 if layout == "narrow" else 16)
    symbols = symbols_like("gaussian", shape, 16)
    table_of = torch.randint(0, 3, (40, 5 if layout == "periodic" else 1), dtype=torch.int32)
    tables = tables_for(symbols, 16, table_of, 3)
    symbols = symbols.T.contiguous().T if layout == "by symbol" else symbols
    out, rng = torch.empty_like(symbols), np.random.default_rng(2)
    with sanitized() as watched:
        encoded = rans_encode(symbols, tables, table_of)
        assert watched.programs > 0
        assert bool(rans_decode(encoded.words, encoded.lengths, tables, table_of, out).all())
        for words in (encoded.words[:30], encoded.words[:0]):
            for top in (4, 65536):
                garbage = torch.from_numpy(rng.integers(0, 65536, len(words)).astype(np.uint16))
                lengths = torch.from_numpy(rng.integers(0, top, 40).astype(np.uint16))
                assert not bool(rans_decode(garbage, lengths, tables, table_of, out).any())


@pytest.mark.interpret
def test_lengths_that_lie_by_more_than_32_bits_reach_nothing() -> None:
    from lmcache.kernels.testing.sanitizer import sanitized

    tables = FrequencyTables(torch.full((1, 16), 256))
    lengths, ends = torch.full((2,), 65535, dtype=torch.uint16), torch.tensor([2**31 + 2**30, 2**32 + 2**30])
    table_of, out = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(1, 2, 9, dtype=torch.uint8)
    intact = torch.ones(2, dtype=torch.uint8)
    arguments = (torch.zeros(8, dtype=torch.uint16), lengths, ends, tables.decode_entries, table_of, out, intact)
    with sanitized():
        entropy._decode_streams.launch(
            (1,), out.device, *arguments, 8, 2, 9, 2, *out.stride(), P=1, WIDE=False, BLOCK_S=32
        )
    assert intact.tolist() == [0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
def test_many_large_streams(interleaved: bool) -> None:
    device = torch.device("cuda")
    symbols = symbols_like("gaussian", (60 * 64, 768), 16).to(device)
    table_of = torch.arange(60, dtype=torch.int32).repeat_interleave(64)[:, None]
    tables = tables_for(symbols.cpu(), 16, table_of, 60).to(device)
    symbols = symbols.T.contiguous().T if interleaved else symbols
    encoded = encode(symbols, tables, table_of)
    out = torch.full_like(symbols, POISON)
    assert bool(rans_decode(encoded.words, encoded.lengths, tables, table_of.to(device), out).all())
    assert torch.equal(out, symbols)


def meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device="meta")


BYTES, INTS, WORDS = torch.uint8, torch.int32, torch.uint16
GOOD: dict[str, Any] = {"symbols": torch.zeros(3, 8, dtype=BYTES), "table_of": torch.zeros(3, 1, dtype=INTS)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symbols": torch.zeros(3, 8, dtype=torch.int8)}, "must be uint8"),
        ({"symbols": torch.zeros(24, dtype=BYTES)}, "must be uint8"),
        ({"symbols": meta(BYTES, 3, 8)}, "must be on cpu"),
        ({"symbols": torch.zeros(1, 1, dtype=BYTES).expand(3, MAX_SYMBOLS + 1)}, "the most is"),
        ({"table_of": torch.zeros(3, dtype=INTS)}, r"\[3, P\]"),
        ({"table_of": torch.zeros(2, 1, dtype=INTS)}, r"\[3, P\]"),
        ({"table_of": torch.zeros(3, 0, dtype=INTS)}, "P >= 1"),
        ({"table_of": torch.zeros(3, 1, dtype=torch.int64)}, "dense torch.int32"),
        ({"table_of": torch.zeros(3, 4, dtype=INTS)[:, ::2]}, "dense torch.int32"),
        ({"table_of": torch.full((3, 1), 2, dtype=INTS)}, "holds 2 .. 2; there are 2"),
        ({"table_of": torch.full((3, 1), -1, dtype=INTS)}, "holds -1 .. -1"),
        ({"out": torch.zeros(23, dtype=WORDS)}, "worst case, 24"),
        ({"out": torch.zeros(24, dtype=torch.int16)}, "dense torch.uint16"),
        ({"out": torch.zeros(48, dtype=WORDS)[::2]}, "dense torch.uint16"),
        ({"out": torch.zeros(3, 8, dtype=WORDS)}, "one dimension"),
        ({"out": meta(WORDS, 24)}, "on cpu"),
    ],
)
def test_wrong_arguments_of_encode_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    tables = FrequencyTables(torch.full((2, 4), 1024))
    with pytest.raises(KernelArgumentError, match=message):
        rans_encode(tables=tables, **(GOOD | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(3, 8, dtype=torch.int8)}, "must be uint8"),
        ({"out": torch.zeros(4, 8, dtype=BYTES)}, r"\[4, P\]"),
        ({"words": torch.zeros(9, dtype=torch.int16)}, "words is torch.int16"),
        ({"words": meta(WORDS, 9)}, "words is torch.uint16 on meta"),
        ({"lengths": torch.zeros(3, dtype=INTS)}, "lengths is torch.int32"),
        ({"lengths": torch.zeros(4, dtype=WORDS)}, "lengths has 4 entries; out has 3"),
    ],
)
def test_wrong_arguments_of_decode_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    tables = FrequencyTables(torch.full((2, 4), 1024))
    good = {"words": torch.zeros(9, dtype=WORDS), "lengths": torch.zeros(3, dtype=WORDS)}
    good |= {"table_of": GOOD["table_of"], "out": torch.zeros(3, 8, dtype=BYTES)}
    with pytest.raises(KernelArgumentError, match=message):
        rans_decode(tables=tables, **(good | change))


@pytest.mark.host
def test_a_cpu_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import torch; from lmcache.kernels.entropy import coder as e; "
    code += (
        "from lmcache.kernels.entropy.tables import FrequencyTables; t = FrequencyTables(torch.tensor([[2048] * 2])); "
    )
    code += (
        "s = torch.ones(2, 8, dtype=torch.uint8); k = torch.zeros(2, 1, dtype=torch.int32); o = torch.zeros_like(s); "
    )
    code += "c = e.rans_encode(s, t, k); assert e.rans_decode(c.words, c.lengths, t, k, o).all() and o.all()"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.interpret
def test_interpret_mode_really_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "rans_encode_numpy", None)
    monkeypatch.setattr(entropy, "rans_decode_numpy", None)
    round_trip(symbols_like("gaussian", (2, 8), 16), 16, torch.device("cpu"))
