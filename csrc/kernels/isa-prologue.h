// The standard headers of the kernels, and no others: of a file that is compiled for an ISA, weak
// templates with its instructions could be the copies that the linker keeps for every CPU. These
// have none that are used; tests/test_build.py looks into the objects.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define ALWAYS_INLINE inline __attribute__((always_inline))
