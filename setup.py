"""Packages, and the core library built ahead of time where that can be done; elsewhere it is built at first use."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
MAPPED = ("backends", "kernels", "custom")


def build_at_first_use(reason: object) -> None:
    print(f"ai3-compile: the core library is not built now ({reason}); it will be built at first use", file=sys.stderr)


def core_library() -> dict[str, Any]:
    """setup()'s arguments for the core library; none without PyTorch in the build environment."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        build_at_first_use(error)
        return {}

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # setuptools' and torch's ways to say that a compiler is missing or failed
                build_at_first_use(str(error).strip().splitlines()[-1])
                self.extensions.clear()  # nothing to install

    spec = importlib.util.spec_from_file_location("ai3_sources", ROOT / "backends" / "sources.py")
    assert spec is not None and spec.loader is not None
    sources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sources)
    kernels = ROOT / "kernels"
    extension = CppExtension(
        "ai3_compile._core",
        [str(path.relative_to(ROOT)) for path in sources.core_sources(kernels)],
        include_dirs=[str(kernels / "include")],
        extra_compile_args=sources.core_flags(kernels),
    )
    return {
        "ext_modules": [extension],
        # A library for torch.ops.load_library, no module of one Python version: no such suffix.
        "cmdclass": {"build_ext": OptionalBuild.with_options(no_python_abi_suffix=True)},
    }


setup(
    packages=[*find_packages(include=["ai3_compile", "ai3_compile.*"]), *(f"ai3_compile.{name}" for name in MAPPED)],
    package_dir={f"ai3_compile.{name}": name for name in MAPPED},
    package_data={
        "ai3_compile.selection": ["*.json"],
        "ai3_compile.kernels": ["*/*", "include/ai3/*", "cudnn/shim/crt/*"],
        "ai3_compile.custom": ["*", "*/*"],
    },
    exclude_package_data={"": ["__pycache__/*", "*.pyc"]},
    py_modules=["ai3"],
    **core_library(),
)
