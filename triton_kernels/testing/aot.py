"""Compile a kernel for a GPU that is not here, exactly as its launch would, and read registers and instructions back.

Everything needed is in the triton wheel: ptxas, cuobjdump and nvdisasm for NVIDIA, LLVM for AMD.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """registers: a thread. shared, local: bytes; local memory is where spills go."""

    registers: int
    shared: int
    local: int
    disassemble: Callable[[], list[str]]

    @functools.cached_property
    def opcodes(self) -> collections.Counter[str]:
        """How many of each; disassembling takes far longer than reading the rest."""
        return collections.Counter(self.disassemble())

    def count(self, pattern: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if re.fullmatch(pattern, opcode))


@dataclasses.dataclass
class Recorder:
    """Stands in for a LazyKernel: keeps what would have been launched."""

    jitted: Any
    grid: tuple[int, ...] = ()
    args: tuple[object, ...] = ()
    options: dict[str, object] = dataclasses.field(default_factory=dict)

    def launch(self, grid: tuple[int, ...], _device: torch.device, *args: object, **options: object) -> None:
        self.grid, self.args, self.options = grid, args, options


def allowed_local(budget: dict[str, Any]) -> int:
    """Bytes of local memory: none, but for the few that a budget grants to a version of triton."""
    return int(budget.get("local", {}).get(".".join(triton.__version__.split(".")[:2]), 0))


def compile_for(target: str, recorded: Recorder) -> Compiled:
    """Compile what `recorded` would have launched, with the specialisation that triton's own launcher would choose."""
    fn = recorded.jitted
    backend = make_backend(TARGETS[target])
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialisation, options = binder(*recorded.args, **recorded.options)
    options, signature, constexprs, attrs = fn._pack_args(
        backend, dict(recorded.options), bound, specialisation, options
    )
    source = ASTSource(fn, signature, constexprs, attrs)
    kernel = triton.compile(source, target=TARGETS[target], options=options.__dict__)
    inspect: Callable[[Any], Compiled] = _inspect_cubin if "cubin" in kernel.asm else _inspect_amdgcn
    return inspect(kernel)


def _inspect_cubin(kernel: Any) -> Compiled:
    cubin = kernel.asm["cubin"]

    def disassemble() -> list[str]:
        opcode = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)"
        return re.findall(opcode, _cuobjdump(cubin, "-sass"), re.M)

    usage = _cuobjdump(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    return Compiled(int(found[1]), kernel.metadata.shared, int(found[2]) + int(found[4]), disassemble)


def _inspect_amdgcn(kernel: Any) -> Compiled:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, name
        return int(found[1])

    def disassemble() -> list[str]:
        return re.findall(r"^\t([vs]_\w+|buffer_\w+|global_\w+|ds_\w+|scratch_\w+|flat_\w+)", text, re.M)

    local = field("private_segment_fixed_size") + 4 * field("vgpr_spill_count")
    return Compiled(field("vgpr_count"), kernel.metadata.shared, local, disassemble)


def _cuobjdump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = (knobs.nvidia.cuobjdump.path, what, file.name)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
