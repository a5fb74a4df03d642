// Functions of avx512.cpp: raw pointers, as they may include nothing that other files include (CMakeLists.txt).
#pragma once

#include "type512.h"

namespace pera::avx512 {

// to = x + scale * (y + y_bias), all [rows, dim]; y_bias [dim] or null. `to` may be x.
void add_rows(
    Type type, const void* x, const void* y, const float* y_bias, float scale, int64_t rows, int64_t dim, void* to);

// to = scale * grad [rows, dim], unless `to` is null; its columns are added to sums [dim], unless that is null.
void scale_rows(Type type, const void* grad, float scale, int64_t rows, int64_t dim, void* to, float* sums);

} // namespace pera::avx512
