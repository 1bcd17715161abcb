"""The bench of storage: which pieces it runs."""

from __future__ import annotations

import pytest

from experiments.bench.storage import measure as storage_bench


def test_a_name_that_no_piece_has_lists_the_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    assert storage_bench.main(["--only", "dsik"]) == 2
    printed = capsys.readouterr()
    assert f"--only dsik: no piece has that in its name; there are {', '.join(storage_bench.pieces())}" in printed.err
    assert not printed.out
