// AVX-512 kernels of `sequence_norm`: LayerNorm of rows and its gradient, 32 values at a time. layer_norm.h is the same
// for AVX2.

#include "avx512.h"

#include "lanes512.h"

namespace pera::avx512 {
namespace {

// Where the sums of a row stop.
struct Row {
  int64_t dim;
  float scale; // 1 / dim
  explicit Row(int64_t n) : dim(n), scale(1.0f / static_cast<float>(n)) {}

  // Calls body(column, mask of the values that there are) for each block.
  template <typename Body>
  void each(const Body& body) const {
    int64_t column = 0;
    for (; column + kBlock <= dim; column += kBlock) {
      body(column, ~__mmask32{0});
    }
    if (column < dim) {
      body(column, first(dim - column));
    }
  }
  float mean(Pair sum) const {
    return _mm512_reduce_add_ps(_mm512_add_ps(sum.a, sum.b)) * scale;
  }
};

inline Pair operator-(Pair x, __m512 y) {
  return {_mm512_sub_ps(x.a, y), _mm512_sub_ps(x.b, y)};
}

inline Pair operator*(Pair x, __m512 y) {
  return {_mm512_mul_ps(x.a, y), _mm512_mul_ps(x.b, y)};
}

inline Pair operator+(Pair x, Pair y) {
  return {_mm512_add_ps(x.a, y.a), _mm512_add_ps(x.b, y.b)};
}

inline Pair operator*(Pair x, Pair y) {
  return {_mm512_mul_ps(x.a, y.a), _mm512_mul_ps(x.b, y.b)};
}

inline Pair fma(Pair x, Pair y, Pair z) {
  return {_mm512_fmadd_ps(x.a, y.a, z.a), _mm512_fmadd_ps(x.b, y.b, z.b)};
}

template <typename T>
void normalise_rows(
    const typename T::Value* x,
    const float* weight,
    const float* bias,
    int64_t rows,
    int64_t dim,
    float eps,
    typename T::Value* y,
    float* means,
    float* rstds) {
  const Row row(dim);
  for (int64_t r = 0; r < rows; ++r, x += dim, y += dim) {
    Pair sum = zeros();
    row.each([&](int64_t c, __mmask32 mask) {
      fetch(x + c);
      sum = sum + T::load(x + c, mask);
    });
    const float mean = row.mean(sum);
    const __m512 center = _mm512_set1_ps(mean);
    Pair squares = zeros(); // around the mean: no cancellation
    row.each([&](int64_t c, __mmask32 mask) {
      const Pair centered = T::masked(T::load(x + c, mask) - center, mask);
      squares = fma(centered, centered, squares);
    });
    const float rstd = 1.0f / __builtin_sqrtf(row.mean(squares) + eps);
    const __m512 scale = _mm512_set1_ps(rstd);
    row.each([&](int64_t c, __mmask32 mask) {
      const Pair xhat = (T::load(x + c, mask) - center) * scale;
      T::store(y + c, mask, fma(xhat, T::load_floats(weight + c, mask), T::load_floats(bias + c, mask)));
    });
    means[r] = mean;
    rstds[r] = rstd;
  }
}

// Adds to the columns' sums.
template <typename T>
inline void add_to(float* sums, __mmask32 mask, Pair value) {
  store(sums, mask, load(sums, mask) + T::in_order(value));
}

template <typename T, bool kHasOther>
void normalise_backward_rows(
    const typename T::Value* grad,
    const typename T::Value* x,
    const float* weight,
    const float* means,
    const float* rstds,
    const typename T::Value* other,
    int64_t rows,
    int64_t dim,
    typename T::Value* grad_x,
    float* grad_weight,
    float* grad_bias) {
  const Row row(dim);
  for (int64_t r = 0; r < rows; ++r, x += dim, grad += dim, grad_x += dim) {
    const __m512 center = _mm512_set1_ps(means[r]), scale = _mm512_set1_ps(rstds[r]);
    Pair scaled = zeros(), products = zeros();
    row.each([&](int64_t c, __mmask32 mask) {
      fetch(grad + c);
      fetch(x + c);
      const Pair g = T::load(grad + c, mask), xhat = (T::load(x + c, mask) - center) * scale;
      const Pair s = g * T::load_floats(weight + c, mask);
      scaled = scaled + s;
      products = fma(s, xhat, products); // s is zero beyond the row
      add_to<T>(grad_weight + c, mask, g * xhat);
      add_to<T>(grad_bias + c, mask, g);
    });
    const __m512 mean_scaled = _mm512_set1_ps(row.mean(scaled)), mean_product = _mm512_set1_ps(-row.mean(products));
    row.each([&](int64_t c, __mmask32 mask) {
      const Pair xhat = (T::load(x + c, mask) - center) * scale;
      const Pair s = T::load(grad + c, mask) * T::load_floats(weight + c, mask) - mean_scaled;
      Pair dx = fma(xhat, {mean_product, mean_product}, s) * scale;
      if constexpr (kHasOther) {
        fetch(other + c);
        dx = dx + T::load(other + c, mask);
      }
      T::store(grad_x + c, mask, dx);
    });
    if constexpr (kHasOther) {
      other += dim;
    }
  }
}

} // namespace

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
    float* rstd) {
  dispatch(type, [&]<typename T>(T) {
    using Value = typename T::Value;
    normalise_rows<T>(static_cast<const Value*>(x), weight, bias, rows, dim, eps, static_cast<Value*>(y), mean, rstd);
  });
}

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
    float* grad_bias) {
  dispatch(type, [&]<typename T>(T) {
    using Value = typename T::Value;
    const auto run = other ? normalise_backward_rows<T, true> : normalise_backward_rows<T, false>;
    run(static_cast<const Value*>(grad), static_cast<const Value*>(x), weight, mean, rstd,
        static_cast<const Value*>(other), rows, dim, static_cast<Value*>(grad_x), grad_weight, grad_bias);
  });
}

} // namespace pera::avx512
