// AVX-512 kernels of `gelu`: 32 values at a time, as two registers of floats.

#include "avx512.h"

#include <immintrin.h>

#include "normal.h"

namespace pera::avx512 {
namespace {

constexpr int64_t kBlock = 32; // values

// 32 values as floats: `a` and `b` in the order in which load() found it cheapest.
struct Pair {
  __m512 a, b;
};

inline __mmask32 first(int64_t count) {
  return count >= kBlock ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

// Brings what will be read soon into the cache: the processor's own fetching stops at the end of a page.
inline void fetch(const void* at) {
  _mm_prefetch(static_cast<const char*>(at) + 2048, _MM_HINT_T0);
}

inline Pair load(const float* from, __mmask32 mask) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from),
          _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + 16)};
}

inline void store(float* to, __mmask32 mask, Pair value) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), value.a);
  _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(mask >> 16), value.b);
}

struct Single {
  using Value = float;
  static constexpr bool kExact = true;
  static Pair load(const float* from, __mmask32 mask) {
    return avx512::load(from, mask);
  }
  static void store(float* to, __mmask32 mask, Pair value) {
    avx512::store(to, mask, value);
  }
  static Pair in_order(Pair value) {
    return value;
  }
};

// a: values 0, 2, 4, ..., b: values 1, 3, 5, ...: no value changes its lane.
struct BFloat16 {
  using Value = uint16_t;
  static constexpr bool kExact = false;
  static Pair load(const uint16_t* from, __mmask32 mask) {
    const __m512i both = _mm512_maskz_loadu_epi16(mask, from);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static void store(uint16_t* to, __mmask32 mask, Pair value) {
    const __m512i even = _mm512_srli_epi32(rounded(value.a), 16), odd = rounded(value.b);
    _mm512_mask_storeu_epi16(to, mask, _mm512_mask_blend_epi16(0xaaaaaaaau, even, odd));
  }
  static Pair in_order(Pair value) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return {_mm512_permutex2var_ps(value.a, low, value.b),
            _mm512_permutex2var_ps(value.a, _mm512_or_si512(low, _mm512_set1_epi32(8)), value.b)};
  }

 private:
  // To nearest even in the upper halves; the lower ones are of no use. A NaN stays one: it comes from a bfloat16 or from
  // the processor, its lower half is zero.
  static __m512i rounded(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  }
};

struct Half {
  using Value = uint16_t;
  static constexpr bool kExact = false;
  static Pair load(const uint16_t* from, __mmask32 mask) {
    const __m512i both = _mm512_maskz_loadu_epi16(mask, from);
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(both)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1))};
  }
  static void store(uint16_t* to, __mmask32 mask, Pair value) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512i a = _mm512_castsi256_si512(_mm512_cvtps_ph(value.a, kNearest));
    _mm512_mask_storeu_epi16(to, mask, _mm512_inserti64x4(a, _mm512_cvtps_ph(value.b, kNearest), 1));
  }
  static Pair in_order(Pair value) {
    return value;
  }
};

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

// Calls run(T()) with T the class of a type.
template <typename Run>
void dispatch(Type type, const Run& run) {
  switch (type) {
    case Type::kFloat:
      return run(Single());
    case Type::kBFloat16:
      return run(BFloat16());
    case Type::kHalf:
      return run(Half());
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
