"""Without a GPU Triton's kernels run in its interpreter, which is chosen when triton is first imported: before any test is."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
