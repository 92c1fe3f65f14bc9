"""Runs the kernels under AddressSanitizer and UBSan: `python -m tests.native.sanitize [rounds]`.

Builds the C sources with a fuzzing driver once per vector width into build/sanitize; 16 lanes run on any processor, split by the compiler.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
FLAGS = ["-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi", "-DUS_ISA=base", "-DUS_HAVE_BASE"]
PARTS = [
    *("attention", "gemm", "gemm_float", "gemm_int4", "lora", "rows", "decoder_rows", "paged"),
    *("drivers", "drivers_decoder", "drivers_products", "library"),
]
WIDTHS = {
    "4 lanes": ["-DUS_VW=4"],
    "8 lanes": ["-march=x86-64-v3"] if platform.machine() == "x86_64" else ["-DUS_VW=8"],
    "16 lanes": ["-DUS_VW=16"],
    "the dot instruction by hand": ["-march=x86-64-v3", "-DUS_DOT"] if platform.machine() == "x86_64" else ["-DUS_VW=8"],
}


def build(name: str, sources: list[Path], flags: list[str], parts: Sequence[str] = PARTS) -> Path:
    """Compiles `sources` with the kernels into build/sanitize/<name>."""
    target = ROOT / "build" / "sanitize" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    kernels = [ROOT / "native" / "kernels" / f"{part}.c" for part in parts]
    command = [os.environ.get("CC", "cc"), *FLAGS, *flags, *map(str, [*sources, *kernels]), "-o", str(target), "-lm", "-lpthread"]
    subprocess.run(command, check=True)
    return target


def main(rounds: int = 1000, widths: dict[str, list[str]] = WIDTHS) -> None:
    """Raises CalledProcessError at the first finding, which the sanitizers print."""
    for seed, (width, flags) in enumerate(widths.items()):
        driver = build(f"fuzz-{width.replace(' ', '-')}", [ROOT / "tests" / "native" / "fuzz_kernels.c"], [*SANITIZE, *flags])
        print(f"{width}: ", end="", flush=True)
        subprocess.run([driver, str(seed + 1), str(rounds)], check=True)
        sampler = [ROOT / "tests" / "native" / "fuzz_sampling.c", ROOT / "native" / "kernels" / "sampling_rows.c"]
        driver = build(f"fuzz-sampling-{width.replace(' ', '-')}", sampler, [*SANITIZE, *flags], parts=())
        subprocess.run([driver, str(seed + 1), str(20 * rounds)], check=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
