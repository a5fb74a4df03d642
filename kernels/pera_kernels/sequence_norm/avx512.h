// Functions of avx512.cpp: raw pointers, as they may include nothing that other files include (CMakeLists.txt).
#pragma once

#include "type512.h"

namespace pera::avx512 {

// y [rows, dim] = LayerNorm of x [rows, dim]; mean, rstd [rows].
void normalise(
    Type type,
    const void* x,
    const float* weight,
    const float* bias,
    int64_t rows,
    int64_t dim,
    float eps,
    void* y,
    float* mean,
    float* rstd);

// grad_x [rows, dim]: gradient of x from grad [rows, dim], plus `other` [rows, dim] unless that is null. The columns' sums
// of the gradients of weight and bias are added to theirs [dim].
void normalise_backward(
    Type type,
    const void* grad,
    const void* x,
    const float* weight,
    const float* mean,
    const float* rstd,
    const void* other,
    int64_t rows,
    int64_t dim,
    void* grad_x,
    float* grad_weight,
    float* grad_bias);

} // namespace pera::avx512
