# Cross-compiling with PyPI's ziglang: ANYATTN_ZIG is its executable, ANYATTN_ZIG_TARGET a triple of `zig targets`.
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ANYATTN_ZIG ANYATTN_ZIG_TARGET)
if(NOT ANYATTN_ZIG OR NOT ANYATTN_ZIG_TARGET)
  message(FATAL_ERROR "zig.cmake needs ANYATTN_ZIG and ANYATTN_ZIG_TARGET")
endif()
string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR "${ANYATTN_ZIG_TARGET}")
if(ANYATTN_ZIG_TARGET MATCHES "-macos")
  set(CMAKE_SYSTEM_NAME Darwin)
elseif(ANYATTN_ZIG_TARGET MATCHES "-windows")
  set(CMAKE_SYSTEM_NAME Windows)
else()
  set(CMAKE_SYSTEM_NAME Linux)
endif()
set(CMAKE_C_COMPILER "${ANYATTN_ZIG}" cc -target ${ANYATTN_ZIG_TARGET})
set(CMAKE_CXX_COMPILER "${ANYATTN_ZIG}" c++ -target ${ANYATTN_ZIG_TARGET})
if(ANYATTN_ZIG_TARGET MATCHES "-musl")
  set(CMAKE_EXE_LINKER_FLAGS_INIT -dynamic)  # else programs are static, and load no library
endif()
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
# zig compiles every instruction set. A check of each would link, and so compile the C++ library again.
set(ANYATTN_COMPILES_ALL TRUE)
set(ANYATTN_HAS_MARCH FALSE)
set(CMAKE_SHARED_LINKER_FLAGS_INIT -s)  # no symbols but those exported: CMAKE_STRIP knows one format only
