"""GPUs of NVIDIA, AMD and Intel through Triton. Imported at the first call on a GPU, never before."""
