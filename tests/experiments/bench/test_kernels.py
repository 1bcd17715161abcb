"""The bench gives figures for right operations only, and its exit status says whether the floors are kept."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.bench.kernels import cases as kernel_cases
from experiments.bench.kernels import estimate as kernel_estimate
from experiments.bench.kernels import measure as kernel_bench
from experiments.bench.kernels.case import SIZES, Case, Setup

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--size", "tiny", "--repeats", "5", "--seconds", "0.05", "--no-estimate"]


def made_up(name: str = "made_up", *, right: bool = True, took_s: float = 0.0, floor: float | None = None) -> Case:
    return Case(
        name=name,
        size="1 x 1, any",
        nbytes=2**20,
        run=lambda: time.sleep(took_s),
        check=lambda: right,
        peer=lambda: None,
        peer_name="nobody",
        floors={} if floor is None else {"cpu": floor},
    )


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the bench measure these cases instead of the real ones."""

    def give(*cases: Case) -> None:
        monkeypatch.setattr(kernel_cases, "FAMILIES", (lambda setup: iter(cases),))

    return give


def test_a_right_operation_gets_a_line(offer: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    offer(made_up(floor=1e-9), made_up("another"))
    assert kernel_bench.main(QUICK) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.split()[0] == "made_up"
    assert "1.0 MiB" in first
    assert "x nobody" in first
    assert first.endswith("floor 0%")
    assert second.endswith("no floor")


def test_quartiles_of_two_rounds_lie_between_them(
    offer: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    waits = itertools.cycle([0.001, 0.03])
    uneven = made_up()
    uneven.run = lambda: time.sleep(next(waits))
    offer(uneven)
    assert kernel_bench.main([*QUICK, "--repeats", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("made_up")


def test_a_wrong_operation_gets_no_figure(offer: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    wrong = made_up("wrong", right=False)
    wrong.run = lambda: pytest.fail("it was timed")
    offer(wrong, made_up("right"))
    assert kernel_bench.main(QUICK) == 1
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("wrong")
    assert "FAILED" in first
    assert "MiB" not in first
    assert second.startswith("right")


def test_a_missed_floor_is_an_error_after_a_second_look(
    offer: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    measure = kernel_bench.measure

    def counted(case: Case, copies: kernel_bench.Copies, device: torch.device, repeats: int, s: float) -> object:
        looks.append(repeats)
        return measure(case, copies, device, repeats, s)

    monkeypatch.setattr(kernel_bench, "measure", counted)
    offer(made_up(took_s=0.02, floor=0.6))
    assert kernel_bench.main(QUICK) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("BELOW 60%")
    assert looks == [5, 10]


def test_a_name_that_no_operation_has_is_an_error(offer: Callable[..., None]) -> None:
    offer(made_up())
    assert kernel_bench.main([*QUICK, "--only", "nothing"]) == 1


def test_floors_of_gpus_do_not_bind_a_cpu(offer: Callable[..., None]) -> None:
    slow = made_up(took_s=0.01)
    slow.floors = {"cuda": 0.92}
    offer(slow)
    assert kernel_bench.main(QUICK) == 0


@pytest.mark.parametrize("family", kernel_cases.FAMILIES, ids=lambda family: str(family.__name__))
def test_every_case_is_right_and_can_be_timed(family: Callable[[Setup], object]) -> None:
    for case in family(Setup(CPU, SIZES["tiny"])):  # type: ignore[attr-defined]
        assert case.check(), f"{case.name} {case.size}"
        case.run()
        if case.peer is not None:
            case.peer()
        assert case.nbytes > 0


@pytest.mark.parametrize("name", ["gather_pages", "scatter_tokens"])
def test_a_copy_that_does_nothing_is_found_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"lmcache.kernels.copy.pages.{name}", lambda *args: None)
    cases = kernel_cases.paged_copies(Setup(CPU, SIZES["tiny"]))
    assert {case.name for case in cases if not case.check()} == {name}


def test_the_bench_runs_where_only_torch_triton_and_numpy_are() -> None:
    absent = ["pydantic", "omegaconf", "tqdm", "matplotlib", "yaml", "msgspec", "zmq", "xxhash", "typer", "pytest"]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
    code += f"from experiments import kernel_bench; kernel_bench.main([*{QUICK}, '--only', 'scatter_tokens'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nscatter_tokens") == 2
    assert "FAILED" not in done.stdout


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "share", "scarce"),
    [
        (32, 0, 4, 1.0, "warps"),
        (255, 0, 4, 0.125, "registers"),  # 8 warps of 8,192 registers
        (168, 82 * 1024, 4, 0.125, "shared"),  # two programs of 83 KiB in 228
        (16, 0, 1, 0.5, "blocks"),
    ],
)
def test_occupancy(registers: int, shared: int, num_warps: int, share: float, scarce: str) -> None:
    h100 = next(gpu for gpu in kernel_estimate.GPUS if gpu.name == "H100")
    assert kernel_estimate.occupancy(h100, registers, shared, num_warps) == (share, scarce)


def test_the_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    a100 = kernel_estimate.GPUS[0]
    assert kernel_estimate.floor_s(a100, 2.039e9, 0) == (pytest.approx(1e-3), "bandwidth")
    assert kernel_estimate.floor_s(a100, 2.039e9, 624e9) == (pytest.approx(2e-3), "tensor cores")


def test_the_estimate_says_that_it_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    kernel_estimate.show("gather_pages")
    heading, rows = capsys.readouterr().out.strip().split("\noperation", 1)
    assert "NOT A MEASUREMENT" in heading
    lines = [line.split() for line in rows.splitlines()[1:]]
    assert {line[4] for line in lines} == {"A100", "H100", "B200"}
    assert {line[-3] for line in lines} == {"1.00"}  # perfectly coalesced
