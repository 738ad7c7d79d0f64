"""CPU engine: C++ kernels behind a C ABI, loaded with ctypes. The GIL is released during calls."""
