"""Compiles every kernel for GPUs this machine need not have, and inspects the machine code.

The interpreter of test_attention.py checks what the kernels compute but no types, registers or
shared memory. Here nothing runs: the compiler must accept each kernel, use the tensor cores, stay
within shared memory and, at D = 64, keep everything in registers.
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
TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
OTHERS = dict(cu_seqlens="*i32", lengths="*i64", lse="*fp32", delta="*fp32", S="i32")


def compile_kernels(arch: int, dtype: str, D: int) -> dict[str, dict[str, int]]:
    """{kernel: what inspect_machine_code says} for sm_{arch}."""
    import triton
    from triton.backends.compiler import GPUTarget

    import model

    found = {}
    for name in ("forward", "dq", "dkv", "decode"):
        kernel = getattr(model, f"{name}_kernel")
        if name == "decode":
            constants, warps, stages = dict(H=12, D=D, STEP=32), 4, 3
        else:
            tile = model.FP32_TILE if dtype == "float32" else model.TILES[name]
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


@pytest.mark.parametrize(
    "arch, dtype, D, shared",  # bytes of shared memory: an RTX 4090 has 99 KB, an H100 227
    [
        (80, "bfloat16", 64, 99 * 1024),
        (90, "bfloat16", 64, 227 * 1024),
        (90, "bfloat16", 128, 227 * 1024),
        (90, "float32", 64, 227 * 1024),
    ],
)
def test_kernels_compile(arch: int, dtype: str, D: int, shared: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    ran = subprocess.run(
        [sys.executable, __file__, str(arch), dtype, str(D)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    tensor_core = "wgmma" if (arch, dtype) == (90, "bfloat16") else "mma"
    for name, code in json.loads(ran.stdout).items():
        assert code["shared"] <= shared, (name, code)
        assert code["spills"] <= 8, (name, code)  # a tile too large for the registers spills 100s
        assert code["wide_loads" if name == "decode" else tensor_core] > 0, (name, code)


if __name__ == "__main__":
    print(json.dumps(compile_kernels(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
