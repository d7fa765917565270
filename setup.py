"""Builds fastkd_kernels._C: CPU kernels always, CUDA kernels where a CUDA torch and a toolkit are found."""

from __future__ import annotations

import glob
import os

import pybind11
import torch
from setuptools import setup
from torch.utils import cpp_extension

STABLE_ABI_TARGET = "0x020a000000000000"  # torch 2.10


def extension() -> cpp_extension.CppExtension:
    defines = [
        ("TORCH_TARGET_VERSION", STABLE_ABI_TARGET),
        ("FASTKD_CUDA_ARCHITECTURES", '""'),
        ("FASTKD_BUILT_WITH_TORCH", f'"{torch.__version__}"'),
    ]
    ext = cpp_extension.CppExtension(
        "fastkd_kernels._C",
        sorted(glob.glob("csrc/*.cpp")),
        include_dirs=[pybind11.get_include()],
        define_macros=defines,
        extra_compile_args={"cxx": ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fopenmp"]},
        extra_link_args=["-fopenmp"],
    )
    ext.libraries = ["torch_cpu"]
    return ext


setup(
    ext_modules=[] if os.environ.get("FASTKD_SKIP_EXT") == "1" else [extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
)
