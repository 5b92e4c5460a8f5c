"""Compiles the kernels of a launch for a GPU that is not there, down to machine code, and reads its resources."""

import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that a program may have


class Recorder:
    """In the place of a kernel: takes down what it would be launched with."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append((self.kernel, args, options))

        return launch


def launches(module, names, call):
    """(kernel, arguments, options) of every launch of the kernels ``names`` of ``module`` during ``call()``."""
    found: list = []
    with mock.patch.multiple(module, **{name: Recorder(getattr(module, name), found) for name in names}):
        call()
    return found


def compile_launch(kernel, args, options, capability=90):
    """(registers, bytes spilled, bytes of shared memory) of a launch's machine code, as Triton would specialise it."""
    signature, constants, attributes = {}, {}, {}
    launch = {key: options[key] for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in options}
    named = {**dict(zip(kernel.arg_names, args, strict=False)), **{k: v for k, v in options.items() if k not in launch}}
    named = {name: named[name] for name in kernel.arg_names}
    constant = {p.name for p in kernel.params if p.is_constexpr}
    for index, (name, value) in enumerate(named.items()):
        if name in constant or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return registers, stack, built.metadata.shared
