"""Digests against a loop in numpy, and probes that see what was changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmcache.errors import KernelArgumentError
from lmcache.kernels.digest import WordProbe, content_digest, content_digest_torch, flat_words

MASK = (1 << 64) - 1


def by_hand(raw: bytes) -> list[int]:
    """The definition, word by word, in Python's integers."""
    raw += bytes(-len(raw) % 4)
    sums = [0, 0]
    for i, word in enumerate(np.frombuffer(raw, "<u4").tolist()):
        for half, golden in enumerate((0x9E3779B97F4A7C15, 0xD1B54A32D192ED03)):
            z = word ^ ((i + 1) * golden & MASK)
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
            sums[half] = (sums[half] + (z ^ (z >> 31))) & MASK
    return [each - (1 << 64) if each >> 63 else each for each in sums]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 63, 100, 1023, 1024, 8193])
def test_a_digest_is_that_of_the_definition(count: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(count)
    tensor = (torch.rand(count) * 250).to(dtype)
    wanted = by_hand(tensor.view(torch.uint8).numpy().tobytes() if count else b"")
    assert content_digest(tensor.to(device)).tolist() == wanted
    assert content_digest_torch(tensor).tolist() == wanted


def test_strides_do_not_count_and_order_does(device: torch.device) -> None:
    matrix = torch.rand(63, 100, device=device)
    digest = content_digest(matrix)
    assert torch.equal(content_digest(matrix.t().contiguous().t()), digest)
    assert torch.equal(content_digest(torch.cat([matrix, matrix], 1)[:, :100]), digest)
    assert not torch.equal(content_digest(matrix.flip(0)), digest)
    assert not torch.equal(content_digest(matrix.t()), digest)


def test_bits_that_are_no_numbers_count(device: torch.device) -> None:
    bits = torch.full((100,), 0x7FC00000, dtype=torch.int32, device=device)
    first = content_digest(bits.view(torch.float32))
    bits[50] = 0x7FC00001  # another NaN
    assert not torch.equal(content_digest(bits.view(torch.float32)), first)


def test_the_place_in_memory_does_not_count(device: torch.device) -> None:
    memory = torch.zeros(401, dtype=torch.uint8, device=device)
    memory[1:] = torch.arange(400, device=device).to(torch.uint8)
    assert torch.equal(content_digest(memory[1:]), content_digest(memory[1:].clone()))


def test_flat_words_are_the_memory_or_nothing(device: torch.device) -> None:
    matrix = torch.arange(12.0, device=device).view(3, 4)
    flat = flat_words(matrix.t())
    assert flat is not None
    assert torch.equal(flat.view(torch.float32), torch.arange(12.0, device=device))
    assert flat_words(matrix[:, ::2]) is None
    assert flat_words(torch.zeros(1, device=device).expand(4)) is None
    assert flat_words(torch.zeros(9, dtype=torch.uint8, device=device)[1:]) is None
    odd = flat_words(torch.zeros(7, dtype=torch.uint8, device=device))
    assert odd is not None
    assert len(odd) == 1


def tensors(device: torch.device) -> list[torch.Tensor]:
    torch.manual_seed(0)
    made = [torch.rand(57, 100), torch.rand(64).to(torch.bfloat16), torch.rand(3), torch.rand(1), torch.zeros(0)]
    return [each.to(device) for each in made]


def test_a_probe_that_sees_nothing_says_so(device: torch.device) -> None:
    probe = WordProbe(tensors(device))
    for _ in range(20):
        probe.look()
    assert not probe.changed
    assert not probe.seen_changed


@pytest.mark.parametrize("index", range(4))
def test_one_look_sees_a_tensor_that_changed_whole(index: int, device: torch.device) -> None:
    watched = tensors(device)
    probe = WordProbe(watched)
    probe.look()
    assert not probe.changed
    watched[index].mul_(1.5)
    probe.look()
    assert probe.changed
    watched[index].div_(1.5)
    probe.look()
    assert probe.changed, "what was seen once stays seen"


def test_looks_together_see_more(device: torch.device) -> None:
    watched = [torch.zeros(64, device=device)]
    probe = WordProbe(watched, words=4, sets=64)
    watched[0][17] = 1
    for _ in range(64):
        probe.look()
    assert probe.changed


def test_a_probe_of_nothing_and_of_several_devices(device: torch.device) -> None:
    probe = WordProbe([])
    probe.look()
    assert not probe.changed
    if device.type != "cpu":
        with pytest.raises(KernelArgumentError, match="one device"):
            WordProbe([torch.zeros(4), torch.zeros(4, device=device)])
