// Functions of avx512.cpp: raw pointers, as they may include nothing that other files include (CMakeLists.txt).
#pragma once

#include "type512.h"

namespace pera::avx512 {

// out[i] = gelu(x[i]); out may be x. tails: coefficients [4, normal::kTails], the constant ones first.
void gelu(Type type, const void* x, int64_t n, void* out, const float* tails);

// grad [rows, columns] becomes the gradient of x, whose columns are added to sums; out, unless null, becomes gelu(x).
void gelu_backward(Type type, void* grad, const void* x, int64_t rows, int64_t columns, void* out, float* sums);

} // namespace pera::avx512
