"""The torch.library namespace of the package.

Schemas are defined here, from Python, so that every op exists whether or not the extension was compiled; the
extension only adds its CPU and CUDA kernels to them.
"""

from __future__ import annotations

import torch

library = torch.library.Library("fastkd_kernels", "DEF")
