// AVX-512 kernels of `gelu`: 32 values at a time, as two registers of floats.

#include "avx512.h"

#include "lanes512.h"
#include "normal.h"

namespace pera::avx512 {
namespace {

template <int n>
inline __m512 polynomial(const float (&coefficients)[n], __m512 at) {
  __m512 value = _mm512_set1_ps(coefficients[n - 1]);
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) {
    value = _mm512_fmadd_ps(value, at, _mm512_set1_ps(coefficients[i]));
  }
  return value;
}

struct Normal {
  __m512 cdf, exponential; // Phi(x), exp(-x * x / 2)
};

template <bool kExact>
inline Normal normal_at(__m512 x) {
  using namespace normal;
  const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f), round = _mm512_set1_ps(kRound);
  const __m512 t = _mm512_min_ps(_mm512_set1_ps(kLimit), _mm512_abs_ps(x)); // NaN stays
  const __m512 square = _mm512_mul_ps(t, t), factor = _mm512_set1_ps(-kHalfLog2E);
  const __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(square, factor, round), round);
  const __m512 f = _mm512_fmsub_ps(square, factor, n);
  const __m512 d = _mm512_fmadd_ps(t, _mm512_set1_ps(kExact ? kScaleSingle : kScaleHalf), one);
  const __m512 guess = _mm512_rcp14_ps(d), u = _mm512_mul_ps(guess, _mm512_fnmadd_ps(guess, d, two));
  __m512 ratio, power;
  if constexpr (kExact) {
    ratio = _mm512_fnmadd_ps(_mm512_mul_ps(t, u), polynomial(kRSingle, u), _mm512_set1_ps(0.5f));
    power = polynomial(kExp2Single, f);
  } else {
    ratio = _mm512_mul_ps(u, polynomial(kRHalf, u));
    power = polynomial(kExp2Half, f);
  }
  const __m512 exponential = _mm512_scalef_ps(power, n), tail = _mm512_mul_ps(exponential, ratio);
  const __mmask16 right = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
  return {_mm512_mask_sub_ps(tail, right, one, tail), exponential};
}

// A table of kTails floats.
struct Table {
  __m512 low, high;
  explicit Table(const float* from) : low(_mm512_loadu_ps(from)), high(_mm512_loadu_ps(from + 16)) {}
  __m512 operator[](__m512i index) const { // of each lane, its lowest five bits
    return _mm512_permutex2var_ps(low, index, high);
  }
};

struct Tails {
  const Table c0, c1, c2, c3;
  explicit Tails(const float* tails)
      : c0(tails), c1(tails + normal::kTails), c2(tails + 2 * normal::kTails), c3(tails + 3 * normal::kTails) {}
  __m512 cdf_at(__m512 x) const { // Phi(x)
    using namespace normal;
    const __m512 round = _mm512_set1_ps(kRound), last = _mm512_set1_ps((kTails - 1) * kStep);
    const __m512 t = _mm512_min_ps(last, _mm512_abs_ps(x)); // NaN stays
    const __m512 shifted = _mm512_fmadd_ps(t, _mm512_set1_ps(1 / kStep), round); // its lowest bits are the whole part
    const __m512 r = _mm512_fnmadd_ps(_mm512_sub_ps(shifted, round), _mm512_set1_ps(kStep), t);
    const __m512i index = _mm512_castps_si512(shifted);
    __m512 tail = _mm512_fmadd_ps(c3[index], r, c2[index]);
    tail = _mm512_fmadd_ps(tail, r, c1[index]);
    tail = _mm512_fmadd_ps(tail, r, c0[index]);
    const __mmask16 right = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
    return _mm512_mask_sub_ps(tail, right, _mm512_set1_ps(1.0f), tail);
  }
};

template <typename T>
void gelu_of(const typename T::Value* x, int64_t n, typename T::Value* out, const float* coefficients) {
  const Tails tails(coefficients);
  const auto cdf = [&](__m512 at) {
    if constexpr (T::kExact) {
      return normal_at<true>(at).cdf;
    } else {
      return tails.cdf_at(at);
    }
  };
  for (int64_t i = 0; i < n; i += kBlock) {
    fetch(x + i);
    const __mmask32 mask = first(n - i);
    const Pair at = T::load(x + i, mask);
    T::store(out + i, mask, {_mm512_mul_ps(at.a, cdf(at.a)), _mm512_mul_ps(at.b, cdf(at.b))});
  }
}

inline __m512 slope(__m512 x, Normal normal) {
  const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(normal::kInverseSqrt2Pi));
  return _mm512_fmadd_ps(scaled, normal.exponential, normal.cdf);
}

template <typename T, bool kHasOut>
void gelu_backward_of(
    typename T::Value* grad,
    const typename T::Value* x,
    int64_t rows,
    int64_t columns,
    typename T::Value* out,
    float* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kBlock) {
      const int64_t i = r * columns + c;
      fetch(x + i);
      fetch(grad + i);
      const __mmask32 mask = first(columns - c);
      const Pair at = T::load(x + i, mask), g = T::load(grad + i, mask);
      const Normal a = normal_at<T::kExact>(at.a), b = normal_at<T::kExact>(at.b);
      if constexpr (kHasOut) {
        T::store(out + i, mask, {_mm512_mul_ps(at.a, a.cdf), _mm512_mul_ps(at.b, b.cdf)});
      }
      const Pair dx = {_mm512_mul_ps(g.a, slope(at.a, a)), _mm512_mul_ps(g.b, slope(at.b, b))};
      T::store(grad + i, mask, dx);
      const Pair added = T::in_order(dx), sum = load(sums + c, mask);
      store(sums + c, mask, {_mm512_add_ps(sum.a, added.a), _mm512_add_ps(sum.b, added.b)});
    }
  }
}

} // namespace

void gelu(Type type, const void* x, int64_t n, void* out, const float* tails) {
  dispatch(type, [&]<typename T>(T) {
    using Value = typename T::Value;
    gelu_of<T>(static_cast<const Value*>(x), n, static_cast<Value*>(out), tails);
  });
}

void gelu_backward(Type type, void* grad, const void* x, int64_t rows, int64_t columns, void* out, float* sums) {
  dispatch(type, [&]<typename T>(T) {
    using Value = typename T::Value;
    auto* g = static_cast<Value*>(grad);
    const auto* from = static_cast<const Value*>(x);
    auto* to = static_cast<Value*>(out);
    if (to) {
      gelu_backward_of<T, true>(g, from, rows, columns, to, sums);
    } else {
      gelu_backward_of<T, false>(g, from, rows, columns, to, sums);
    }
  });
}

} // namespace pera::avx512
