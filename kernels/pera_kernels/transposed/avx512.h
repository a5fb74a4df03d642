// Transposes a part of a matrix of 16-bit values: avx512.cpp has the kernel, cpu.cpp calls it.
#pragma once

#include <stdint.h>

namespace pera {

// Columns [begin, end) of from [rows, columns], whose rows are `stride` values apart, to rows [begin, end) of `to`. Those
// are `to_stride` values apart, a multiple of 32, and aligned to 64 bytes; what lies beyond `rows` is overwritten.
void transpose_columns(
    const uint16_t* from,
    int64_t rows,
    int64_t columns,
    int64_t stride,
    int64_t begin,
    int64_t end,
    uint16_t* to,
    int64_t to_stride);

} // namespace pera
