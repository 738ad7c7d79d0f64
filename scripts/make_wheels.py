"""Build the sdist and one wheel per platform into dist/, and check them.

Each wheel works with every version of Python and is built only from the contents of the sdist. The package ziglang
cross-compiles for every platform. Arguments are platform tags, or --this-machine. Without arguments, all wheels are
built.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from check_wheels import MACHINES, check, check_objects, machine_of

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
WORK = ROOT / "build" / "wheels"
ZIG = Path(sys.executable).parent / "python-zig"
# Tag of a wheel, which states the oldest system that it runs on, and the target of zig, with which it is linked.
PLATFORMS = {
    "manylinux_2_17_x86_64": "x86_64-linux-gnu.2.17",
    "manylinux_2_17_aarch64": "aarch64-linux-gnu.2.17",
    "musllinux_1_2_x86_64": "x86_64-linux-musl",
    "musllinux_1_2_aarch64": "aarch64-linux-musl",
    "macosx_11_0_arm64": "aarch64-macos.11.0",
    "macosx_11_0_x86_64": "x86_64-macos.11.0",
    "win_amd64": "x86_64-windows-gnu",
    "win_arm64": "aarch64-windows-gnu",
}


SYSTEMS = {"Linux": "manylinux", "Darwin": "macosx", "Windows": "win"}


def main(*tags: str) -> int:
    if tags == ("--this-machine",):
        tags = (tag_of_this_machine(),)
    unknown = [tag for tag in tags if tag not in PLATFORMS]
    if unknown:
        raise SystemExit(f"unknown platforms: {', '.join(unknown)}; there are {', '.join(PLATFORMS)}")
    source = make_source()
    wrong = False
    for tag in tags or PLATFORMS:
        wheel = make_wheel(source, tag)
        problems = list(problems_of(wheel, tag))
        outcome = "WRONG" if problems else "compiled and checked"
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, {outcome}", flush=True)
        for problem in problems:
            print(f"  {problem}")
        if problems:
            wrong = True
            wheel.unlink()
    return 1 if wrong else 0


def tag_of_this_machine() -> str:
    """Return the tag in `PLATFORMS` of this machine."""
    machine = MACHINES[platform.machine().lower()]
    system = SYSTEMS[platform.system()]
    return next(tag for tag in PLATFORMS if tag.startswith(system) and machine_of(tag) == machine)


def make_source() -> Path:
    """Build and unpack the sdist, and return its folder. Building wheels from it reveals missing files."""
    shutil.rmtree(DIST, ignore_errors=True)
    build("--sdist", ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    folder = WORK / "source"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB")
    return source


def make_wheel(source: Path, tag: str) -> Path:
    folder = WORK / tag
    # No file of an earlier build is used. zig has its own cache of what it compiled.
    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        "build-dir": folder,
        "wheel.tags": f"py3-none-{tag}",
        "cmake.define.CMAKE_TOOLCHAIN_FILE": source / "native" / "cmake" / "zig.cmake",
        "cmake.define.ANYATTN_ZIG": ZIG,
        "cmake.define.ANYATTN_ZIG_TARGET": PLATFORMS[tag],
    }
    build("--wheel", source, *(f"-C{name}={value}" for name, value in settings.items()), log=WORK / f"{tag}.log")
    (wheel,) = DIST.glob(f"*-{tag}.whl")
    return wheel


def build(what: str, source: Path, *settings: str, log: Path | None = None) -> None:
    """Run `python -m build` with the CMake and the compiler of this environment."""
    command = [sys.executable, "-m", "build", what, "--no-isolation", "--outdir", DIST, *settings, source]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CMAKE_GENERATOR": "Ninja",
        "ZIG_GLOBAL_CACHE_DIR": str(ROOT / "build" / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(ROOT / "build" / "zig"),
    }
    for flags in ("CFLAGS", "CXXFLAGS", "LDFLAGS", "CC", "CXX"):  # of this machine's compiler
        environment.pop(flags, None)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if log:
        log.write_bytes(done.stdout)
    if done.returncode:
        raise SystemExit(done.stdout.decode(errors="replace"))


def problems_of(wheel: Path, tag: str) -> Iterator[str]:
    # If the native library does not compile, the build succeeds without it. The log has the reason.
    failed = False
    for problem in check(wheel, ROOT):
        failed = failed or "lib/" in problem
        yield problem
    if failed:
        yield f"see {WORK / f'{tag}.log'}"
    yield from check_objects((WORK / tag).rglob("*.o*"), tag, ROOT)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
