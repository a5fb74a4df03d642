// AVX-512 kernels of `add_norm`: what it does besides the norm, 32 values at a time.

#include "avx512.h"

#include "lanes512.h"

namespace pera::avx512 {
namespace {

template <typename T>
void add_rows(
    const typename T::Value* x,
    const typename T::Value* y,
    const float* y_bias,
    float scale,
    int64_t rows,
    int64_t dim,
    typename T::Value* to) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t r = 0; r < rows; ++r, x += dim, y += dim, to += dim) {
    for (int64_t c = 0; c < dim; c += kBlock) {
      fetch(x + c);
      fetch(y + c);
      const __mmask32 mask = first(dim - c);
      const Pair stream = T::load(x + c, mask);
      Pair branch = T::load(y + c, mask);
      if (y_bias) {
        const Pair bias = T::load_floats(y_bias + c, mask);
        branch = {_mm512_add_ps(branch.a, bias.a), _mm512_add_ps(branch.b, bias.b)};
      }
      T::store(to + c, mask, {_mm512_fmadd_ps(branch.a, factor, stream.a), _mm512_fmadd_ps(branch.b, factor, stream.b)});
    }
  }
}

template <typename T>
void scale_rows(
    const typename T::Value* grad, float scale, int64_t rows, int64_t dim, typename T::Value* to, float* sums) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < dim; c += kBlock) {
      const __mmask32 mask = first(dim - c);
      const Pair from = T::load(grad + r * dim + c, mask);
      const Pair value = {_mm512_mul_ps(from.a, factor), _mm512_mul_ps(from.b, factor)};
      if (to) {
        T::store(to + r * dim + c, mask, value);
      }
      if (sums) {
        const Pair added = T::in_order(value), sum = load(sums + c, mask);
        store(sums + c, mask, {_mm512_add_ps(sum.a, added.a), _mm512_add_ps(sum.b, added.b)});
      }
    }
  }
}

} // namespace

void add_rows(
    Type type, const void* x, const void* y, const float* y_bias, float scale, int64_t rows, int64_t dim, void* to) {
  dispatch(type, [&]<typename T>(T) {
    using Value = typename T::Value;
    add_rows<T>(
        static_cast<const Value*>(x), static_cast<const Value*>(y), y_bias, scale, rows, dim, static_cast<Value*>(to));
  });
}

void scale_rows(Type type, const void* grad, float scale, int64_t rows, int64_t dim, void* to, float* sums) {
  dispatch(type, [&]<typename T>(T) {
    using Value = typename T::Value;
    scale_rows<T>(static_cast<const Value*>(grad), scale, rows, dim, static_cast<Value*>(to), sums);
  });
}

} // namespace pera::avx512
