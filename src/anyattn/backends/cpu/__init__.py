"""The native engine: C++ kernels behind a C ABI, loaded with ctypes, the GIL released during calls."""
