"""CPU engine: C++ kernels with a C ABI, loaded with ctypes. The GIL is released during calls."""
