"""Triton backend: GPUs of NVIDIA, AMD and Intel. Imported at the first call on a GPU."""
