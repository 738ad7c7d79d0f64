"""PyInstaller's hook: collect the native library, the shaders, modules imported by name, and the Triton kernels."""

from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs, collect_submodules

# A program that imports one of these names it; the packages that they adapt are large.
ON_DEMAND = tuple(
    f"anyattn.{name}"
    for name in (
        "_pyinstaller",
        "bench",
        "compat.comfyui",
        "compat.diffusers",
        "compat.onnx",
        "compat.transformers",
        "compat.xformers",
        "examples",
    )
)

datas = collect_data_files("anyattn", includes=["backends/vulkan/shaders.tar.xz"])
binaries = collect_dynamic_libs("anyattn", destdir="anyattn/lib")
hiddenimports = collect_submodules("anyattn", filter=lambda name: not name.startswith(ON_DEMAND))
module_collection_mode = {"anyattn.backends.triton": "pyz+py"}  # Triton compiles from the source
