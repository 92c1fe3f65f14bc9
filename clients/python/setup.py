"""Generates the protobuf stubs, from the repository's protos or from the copy that a source distribution carries."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
PROTOS = HERE / "protos" if (HERE / "protos").is_dir() else HERE.parents[1] / "protos"


class BuildPy(build_py):
    """Stubs first, so that they are packages like the others."""

    def run(self) -> None:
        subprocess.run([sys.executable, str(PROTOS / "generate_python.py"), str(HERE)], check=True)
        self.distribution.packages = find_packages(include=["understudy*"])
        self.finalize_options()
        super().run()


class Sdist(sdist):
    """Carries the protos, so that the archive builds by itself."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, [file for file in files if "_pb2" not in file])
        shutil.copytree(PROTOS, Path(base_dir) / "protos", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


setup(
    packages=find_packages(include=["understudy*"]),
    package_data={"": ["*.pyi", "py.typed"]},
    cmdclass={"build_py": BuildPy, "sdist": Sdist},
)
