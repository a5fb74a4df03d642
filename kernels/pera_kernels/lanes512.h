// Rows of float, bfloat16 or half as registers of 16 floats, for the avx512.cpp of several ops; lanes.h is the same for AVX2.
//
// In an unnamed namespace: each file has its own copy, compiled for AVX-512, that no other file is linked to.
#pragma once

#include <immintrin.h>

#include "type512.h"

namespace pera::avx512 {
namespace {

constexpr int64_t kBlock = 32; // values

// 32 values as floats: `a` and `b` in the order in which load() found it cheapest.
struct Pair {
  __m512 a, b;
};

inline Pair zeros() {
  return {_mm512_setzero_ps(), _mm512_setzero_ps()};
}

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

// Each type: load() and store() its values; load_floats() in the order of its pairs, in_order() from that into the order of
// memory; masked() clears what lies outside the mask; kExact: results are wanted to the precision of float32.

// Types whose pairs are in the order of memory.
struct InOrder {
  static Pair load_floats(const float* from, __mmask32 mask) {
    return avx512::load(from, mask);
  }
  static Pair in_order(Pair value) {
    return value;
  }
  static Pair masked(Pair value, __mmask32 mask) {
    return {_mm512_maskz_mov_ps(static_cast<__mmask16>(mask), value.a),
            _mm512_maskz_mov_ps(static_cast<__mmask16>(mask >> 16), value.b)};
  }
};

struct Single : InOrder {
  using Value = float;
  static constexpr bool kExact = true;
  static Pair load(const float* from, __mmask32 mask) {
    return avx512::load(from, mask);
  }
  static void store(float* to, __mmask32 mask, Pair value) {
    avx512::store(to, mask, value);
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
  static Pair load_floats(const float* from, __mmask32 mask) {
    const Pair pair = avx512::load(from, mask);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return {_mm512_permutex2var_ps(pair.a, even, pair.b),
            _mm512_permutex2var_ps(pair.a, _mm512_or_si512(even, _mm512_set1_epi32(1)), pair.b)};
  }
  static Pair in_order(Pair value) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return {_mm512_permutex2var_ps(value.a, low, value.b),
            _mm512_permutex2var_ps(value.a, _mm512_or_si512(low, _mm512_set1_epi32(8)), value.b)};
  }
  static Pair masked(Pair value, __mmask32 mask) { // the values of a mask come first
    const int count = __builtin_popcount(mask);
    return {_mm512_maskz_mov_ps(static_cast<__mmask16>((1u << (count + 1) / 2) - 1), value.a),
            _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << count / 2) - 1), value.b)};
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

struct Half : InOrder {
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
};

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
} // namespace pera::avx512
