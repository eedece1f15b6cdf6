"""Which arithmetic a forward pass uses: bf16 is a gain only on processors that have its instructions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

# amx_bf16, avx512_bf16: x86; bf16: Arm. Without them bf16 is emulated and was 15 times slower than float32.
_CPU_FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})


def runs_in_bf16(precision: str, device_type: str) -> bool:
    """Whether a forward pass runs under bf16 autocast.

    Args:
        precision: `bf16`, `float32`, or `auto`: bf16 where the device computes in it.
        device_type: torch's name of the kind of device: `cpu`, `cuda`.
    """
    if precision != "auto":
        return precision == "bf16"
    if device_type != "cpu":
        import torch

        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_has_bf16()


def exact_float32(device_type: str) -> AbstractContextManager[None]:
    """Inside, what a forward pass computes in float32 is float32 on a GPU too.

    cuDNN's convolutions take TF32 (10 bits of mantissa) for it by default, which no configuration asked for.
    """
    if device_type != "cuda":
        return nullcontext()
    from torch.backends import cudnn

    kept = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
    return cudnn.flags(**kept, allow_tf32=False)


def cpu_has_bf16(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether the processor has bf16 instructions, by what Linux says of it; False where it says nothing."""
    try:
        text = Path(cpuinfo).read_text()
    except OSError:
        return False
    flags = [line.partition(":")[2].split() for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return any(_CPU_FLAGS & set(line) for line in flags)
