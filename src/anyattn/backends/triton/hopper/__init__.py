"""Kernels for Hopper (sm_90) in Gluon, Triton's lower-level language, behind the same plan as the portable ones."""
