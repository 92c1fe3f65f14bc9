"""Builds what pyproject.toml cannot describe: the kernel library, the Cython modules and the protobuf stubs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CFLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden"]
CFLAGS += ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
KERNELS = Path("native/kernels")
PER_ISA = [str(KERNELS / name) for name in ("attention.c", "gemm.c", "rows.c")]
ONCE = [str(KERNELS / name) for name in ("drivers.c", "operators.c", "library.c")]
PER_ISA += [str(KERNELS / "beam.c")]
ONCE += [str(KERNELS / "beam_operators.c")]
PER_ISA += [str(KERNELS / "sampling_rows.c")]
ONCE += [str(KERNELS / "sampling.c")]
PER_ISA += [str(KERNELS / name) for name in ("gemm_float.c", "gemm_int4.c", "lora.c")]
ONCE += [str(KERNELS / name) for name in ("drivers_products.c", "operators_products.c")]
PER_ISA += [str(KERNELS / name) for name in ("decoder_rows.c", "paged.c")]
ONCE += [str(KERNELS / name) for name in ("drivers_decoder.c", "operators_decoder.c", "pool.c")]
# Each entry compiles PER_ISA once more under its own name; the library picks one by CPUID at load.
ISA_FLAGS = {
    "x86_64": {
        "avx512vnni": ["-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"],
        "avx2": ["-march=x86-64-v3"],
        "base": [],
    },
}.get(platform.machine(), {"base": []})


class BuildExt(build_ext):
    """Links the kernel library (a plain shared object, no Python module) beside the Cython modules."""

    def build_extensions(self) -> None:
        # Some Pythons put the folder that they were built in on every link line; a wheel carries no path of its builder.
        self.compiler.linker_so = [part for part in self.compiler.linker_so if not part.startswith("-Wl,-rpath")]
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if ext.name != "native.kernels.libunderstudy_kernels":
            super().build_extension(ext)
            return
        extra = os.environ.get("UNDERSTUDY_KERNEL_CFLAGS", "").split()
        objects: list[str] = []
        for isa, flags in ISA_FLAGS.items():
            objects += self.compiler.compile(
                PER_ISA,
                output_dir=f"{self.build_temp}/{isa}",
                extra_preargs=[*CFLAGS, *flags, *extra, f"-DUS_ISA={isa}"],
                depends=ext.depends,
            )
        have = [f"-DUS_HAVE_{isa.upper()}" for isa in ISA_FLAGS]
        objects += self.compiler.compile(ONCE, output_dir=self.build_temp, extra_preargs=[*CFLAGS, *extra, *have], depends=ext.depends)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Linked by hand: Python's own link line would leave its build machine's paths in the library. ONNX Runtime unloads it with the
        # last session, and the pool's threads would stand in nothing.
        stay = ["-Wl,-z,nodelete"] if sys.platform == "linux" else []
        link = [self.compiler.compiler_so[0], "-shared", *objects, "-o", str(target), "-lm", "-lpthread", *stay]
        self.spawn([*link, *(extra or ["-Wl,-s"])])

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("libunderstudy_kernels"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)


def generate_stubs(out: Path) -> None:
    """Writes the Python stubs of every proto under `out`, as packages `understudy.v1` and `understudy.oip`."""
    script = ROOT / "protos" / "generate_python.py"
    subprocess.run([sys.executable, str(script), str(out)], check=True)


class BuildPy(build_py):
    """Generates the protobuf stubs, then copies packages without their sources and tests."""

    def run(self) -> None:
        generate_stubs(ROOT / "clients" / "python")
        super().run()

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        return [f for f in super().find_data_files(package, src_dir) if not f.endswith((".c", ".h", ".pyx", ".pxd"))]


def cython_modules() -> list[Extension]:
    directives = {"language_level": 3, "boundscheck": False, "wraparound": False, "cdivision": True, "initializedcheck": False}
    modules = [
        Extension(
            f"native.{path.stem}",
            [str(path.relative_to(ROOT))],
            extra_compile_args=["-O3", "-fno-math-errno", "-g0"],
            depends=["setup.py", *(str(pxd.relative_to(ROOT)) for pxd in (ROOT / "native").glob(f"{path.stem}.pxd"))],
        )
        for path in sorted((ROOT / "native").glob("*.pyx"))
    ]
    return list(cythonize(modules, compiler_directives=directives)) if modules else []


kernels = Extension(
    "native.kernels.libunderstudy_kernels",
    [*ONCE, *PER_ISA],
    depends=["setup.py", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / KERNELS).glob("*.h")))],
)

setup(
    packages=[*find_packages(include=["server*", "native*", "trainer*"]), *find_packages("clients/python", include=["understudy*"])],
    package_dir={"understudy": "clients/python/understudy"},
    package_data={"": ["*.pyi", "py.typed", "*.json", "*.toml", "*.txt", "*.yaml"]},
    exclude_package_data={"": ["*.c", "*.h", "*.pyx", "*.pxd"]},
    include_package_data=False,
    ext_modules=[*cython_modules(), kernels],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
