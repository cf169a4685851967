// What every isa_*.cpp includes before its namespace opens. Standard headers must come here: inside
// the region compiled for an ISA, their weak templates would be compiled with its instructions and
// could be the copies the linker keeps for every CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define ALWAYS_INLINE inline __attribute__((always_inline))
