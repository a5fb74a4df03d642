// LayerNorm of rows and its gradient. A row is read once from memory and twice from the L1 cache.
#pragma once

#include <cmath>

#include "lanes.h"
#include "sequence_norm/avx512.h"

namespace pera {

struct Stats {
  float mean, rstd;
};

template <typename T>
Stats normalise(
    const T* __restrict__ x, // [D]
    const float* __restrict__ weight, // [D]
    const float* __restrict__ bias, // [D]
    int64_t dim,
    float eps,
    T* __restrict__ y) { // [D]
  Sums sums;
  for_lanes(dim, [&](int64_t i, auto lanes, auto slot) { sums.slots[slot] += lanes.load(x + i); });
  const float mean = sums.total() / static_cast<float>(dim);
  Sums squares; // around the mean: no cancellation
  for_lanes(dim, [&](int64_t i, auto lanes, auto slot) {
    const Floats centered = lanes.zero_beyond(lanes.load(x + i) - mean);
    squares.slots[slot] += centered * centered;
  });
  const float rstd = 1.0f / std::sqrt(squares.total() / static_cast<float>(dim) + eps);
  for_lanes(dim, [&](int64_t i, auto lanes, auto) {
    const Floats xhat = (lanes.load(x + i) - mean) * rstd;
    lanes.store(y + i, xhat * lanes.load(weight + i) + lanes.load(bias + i));
  });
  return {mean, rstd};
}

// The gradient of a row that has no other use than its norm.
struct NoGradient {
  Floats operator()(Floats value, int64_t, auto) const {
    return value;
  }
};

// The gradient of another use of the row, which is added.
template <typename T>
struct Gradient {
  const T* __restrict__ row; // [D]
  Floats operator()(Floats value, int64_t i, auto lanes) const {
    return value + lanes.load(row + i);
  }
};

template <typename T, typename Other>
void normalise_backward(
    const T* __restrict__ grad, // [D]
    const T* __restrict__ x, // [D]
    const float* __restrict__ weight, // [D]
    Stats stats,
    int64_t dim,
    Other other, // NoGradient or Gradient
    T* __restrict__ grad_x, // [D]
    float* __restrict__ grad_weight, // [D], added to
    float* __restrict__ grad_bias) { // [D], added to
  const float mean = stats.mean, rstd = stats.rstd;
  Sums scaled, products;
  for_lanes(dim, [&](int64_t i, auto lanes, auto slot) {
    const Floats g = lanes.load(grad + i), xhat = (lanes.load(x + i) - mean) * rstd;
    const Floats s = g * lanes.load(weight + i);
    scaled.slots[slot] += s;
    products.slots[slot] += s * xhat; // s is zero beyond the row
    lanes.store(grad_weight + i, lanes.load(grad_weight + i) + g * xhat);
    lanes.store(grad_bias + i, lanes.load(grad_bias + i) + g);
  });
  const float mean_scaled = scaled.total() / static_cast<float>(dim);
  const float mean_product = products.total() / static_cast<float>(dim);
  for_lanes(dim, [&](int64_t i, auto lanes, auto) {
    const Floats xhat = (lanes.load(x + i) - mean) * rstd;
    const Floats s = lanes.load(grad + i) * lanes.load(weight + i);
    lanes.store(grad_x + i, other((s - mean_scaled - xhat * mean_product) * rstd, i, lanes));
  });
}

// y [rows, D] = LayerNorm of x [rows, D]; means, rstds [rows].
template <typename T>
void normalise_rows(
    const T* x,
    const float* weight,
    const float* bias,
    int64_t rows,
    int64_t dim,
    float eps,
    T* y,
    float* means,
    float* rstds,
    [[maybe_unused]] bool avx512) {
#ifdef PERA_AVX512
  if (avx512) {
    return avx512::normalise(kType<T>, x, weight, bias, rows, dim, eps, y, means, rstds);
  }
#endif
  for (int64_t r = 0; r < rows; ++r) {
    const Stats stats = normalise(x + r * dim, weight, bias, dim, eps, y + r * dim);
    means[r] = stats.mean;
    rstds[r] = stats.rstd;
  }
}

// Of rows; other [rows, D] or null.
template <typename T>
void normalise_backward_rows(
    const T* grad,
    const T* x,
    const float* weight,
    const float* means,
    const float* rstds,
    const T* other,
    int64_t rows,
    int64_t dim,
    T* grad_x,
    float* grad_weight,
    float* grad_bias,
    [[maybe_unused]] bool avx512) {
#ifdef PERA_AVX512
  if (avx512) {
    return avx512::normalise_backward(
        kType<T>, grad, x, weight, means, rstds, other, rows, dim, grad_x, grad_weight, grad_bias);
  }
#endif
  for (int64_t r = 0, at = 0; r < rows; ++r, at += dim) {
    const auto backward = [&](auto added) {
      normalise_backward(
          grad + at, x + at, weight, {means[r], rstds[r]}, dim, added, grad_x + at, grad_weight, grad_bias);
    };
    other ? backward(Gradient<T>{other + at}) : backward(NoGradient{});
  }
}

} // namespace pera
