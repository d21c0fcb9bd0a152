"""Compiles every kernel for GPUs this machine need not have, and inspects the machine code.

    python tests/test_kernels_compile.py        # all 216 kernels: 6 GPUs, 3 types, 3 head sizes

The interpreter of test_attention.py checks what the kernels compute but no types, registers or
shared memory. Here nothing runs: the compiler must accept each kernel, use the tensor cores, stay
within the GPU's shared memory and keep everything in registers.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("triton")
# Triton's names of the types: of the arguments that are no constants, and of the others among them
# KB of shared memory: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
OTHERS = dict(cu_seqlens="*i32", lengths="*i64", lse="*fp32", delta="*fp32", S="i32")


def compile_kernels(arch: int, dtype: str, D: int) -> dict[str, dict[str, int]]:
    """{kernel: what inspect_machine_code says} for sm_{arch}."""
    import model

    import triton
    from triton.backends.compiler import GPUTarget

    found = {}
    for name in ("forward", "dq", "dkv", "decode"):
        kernel = getattr(model, f"{name}_kernel")
        if name == "decode":
            constants, warps, stages = dict(H=12, D=D, STEP=32), 4, 3
        else:
            tile = model.FP32_TILE if dtype == "float32" else model.TILES[name][D > 64]
            BLOCK, STEP, warps, stages = tile
            constants = dict(H=12, D=D, BLOCK=BLOCK, STEP=STEP)
        position = {a: (i,) for i, a in enumerate(kernel.arg_names)}
        types = {a: OTHERS.get(a, TYPES[dtype]) for a in position if a not in constants}
        source = triton.compiler.ASTSource(
            kernel,
            {a: types.get(a, "constexpr") for a in position},
            {position[a]: value for a, value in constants.items()},
            {position[a]: [["tt.divisibility", 16]] for a in types},
        )
        options = dict(num_warps=warps, num_stages=stages)
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        found[name] = inspect_machine_code(binary.asm["cubin"], binary.metadata.shared)
    return found


def inspect_machine_code(cubin: bytes, shared: int) -> dict[str, int]:
    """Counts of what matters; wgmma and mma are Hopper's and Ampere's tensor-core products."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code, usage = (
            subprocess.check_output([tool, what, file.name], text=True, stderr=subprocess.DEVNULL)
            for what in ("--dump-sass", "--dump-resource-usage")
        )
    instructions = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", code)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": instructions.count("STL"),
        "shared": shared,
        "wgmma": instructions.count("HGMMA"),
        "mma": instructions.count("HMMA"),
        "wide_loads": code.count("LDG.E.128"),
    }


def compiled(arch: int, dtype: str, D: int) -> dict[str, dict[str, int]]:
    """The same in another process, in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    ran = subprocess.run(
        [sys.executable, __file__, str(arch), dtype, str(D)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize(
    "arch, dtype, D",
    [
        (80, "bfloat16", 64),
        (86, "bfloat16", 128),
        (90, "bfloat16", 64),
        (90, "bfloat16", 128),
        (90, "float32", 64),
    ],
)
def test_kernels_compile(arch: int, dtype: str, D: int) -> None:
    tensor_core = "wgmma" if (arch, dtype) == (90, "bfloat16") else "mma"
    for name, code in compiled(arch, dtype, D).items():
        assert code["shared"] <= SHARED[arch] * 1024, (name, code)
        assert code["spills"] <= 8, (name, code)  # a tile too large for the registers spills 100s
        assert code["wide_loads" if name == "decode" else tensor_core] > 0, (name, code)


def table() -> None:
    """A row for each type and head size, a cell for each GPU: KB of shared memory of forward, dq,
    dkv and decode, and the spills of all of them; "!" after what does not fit."""
    print("| type, D |" + "".join(f" sm_{arch} ({SHARED[arch]} KB) |" for arch in SHARED))
    print("|---|" + "---|" * len(SHARED))
    for dtype in TYPES:
        for D in (64, 80, 128):
            print(f"| {dtype}, {D} |", end="", flush=True)
            for arch, limit in SHARED.items():
                found = compiled(arch, dtype, D).values()
                sizes = [code["shared"] / 1024 for code in found]
                cell = " / ".join(f"{x:.0f}{'!' * (x > limit)}" for x in sizes)
                spills = sum(code["spills"] for code in found)
                print(f" {cell}{f', {spills} spills' if spills else ''} |", end="", flush=True)
            print()


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(compile_kernels(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
    else:
        table()
