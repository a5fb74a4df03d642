// Eight floats at a time (four without AVX) out of rows of float, bfloat16 or half, and back.
//
// The compiler's own vector types: the same source for x86-64 and arm64, and a row of any length: what is left over at
// its end goes through a buffer of zeros. Values are rounded to nearest even, as c10 does.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "tensors.h"

namespace pera {

#ifdef __AVX__
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

using Floats = float __attribute__((vector_size(kLanes * 4)));
using Words = uint32_t __attribute__((vector_size(kLanes * 4)));
using Shorts = uint16_t __attribute__((vector_size(kLanes * 2)));

template <typename V, typename T>
inline V read(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

inline Floats load(const float* from) {
  return read<Floats>(from);
}

inline Floats load(const BFloat16* from) {
#ifdef __AVX2__
  const Words words = std::bit_cast<Words>(_mm256_cvtepu16_epi32(read<__m128i>(from)));
#else
  const Words words = __builtin_convertvector(read<Shorts>(from), Words);
#endif
  return std::bit_cast<Floats>(words << 16);
}

inline Floats load(const Half* from) {
#ifdef __F16C__
  return _mm256_cvtph_ps(read<__m128i>(from));
#else
  Floats value;
  for (int64_t i = 0; i < kLanes; ++i) {
    value[i] = static_cast<float>(from[i]);
  }
  return value;
#endif
}

inline void store(float* to, Floats value) {
  std::memcpy(to, &value, sizeof(value));
}

inline void store(BFloat16* to, Floats value) {
  const Words bits = std::bit_cast<Words>(value);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words is_nan = std::bit_cast<Words>(value != value); // all ones or zero; rounding could make it infinite
  const Words halves = rounded | (is_nan >> 17);
#ifdef __AVX2__
  const auto both = std::bit_cast<__m256i>(halves);
  const __m128i shorts = _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
#else
  const Shorts shorts = __builtin_convertvector(halves, Shorts);
#endif
  std::memcpy(to, &shorts, sizeof(shorts));
}

inline void store(Half* to, Floats value) {
#ifdef __F16C__
  const __m128i halves = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(to, &halves, sizeof(halves));
#else
  for (int64_t i = 0; i < kLanes; ++i) {
    to[i] = static_cast<Half>(value[i]);
  }
#endif
}

// The sum of the lanes, always in the same order.
inline float sum(Floats value) {
  float total = 0.0f;
  for (int64_t i = 0; i < kLanes; ++i) {
    total += value[i];
  }
  return total;
}

// All lanes at a place of a row.
struct Full {
  template <typename T>
  Floats load(const T* from) const {
    return pera::load(from);
  }
  template <typename T>
  void store(T* to, Floats value) const {
    pera::store(to, value);
  }
  Floats zero_beyond(Floats value) const {
    return value;
  }
};

// The first `count` lanes, at the end of a row; the others are read as zero and not written.
struct Part {
  int64_t count;
  template <typename T>
  Floats load(const T* from) const {
    T buffer[kLanes] = {};
    std::memcpy(buffer, from, count * sizeof(T));
    return pera::load(buffer);
  }
  template <typename T>
  void store(T* to, Floats value) const {
    T buffer[kLanes];
    pera::store(buffer, value);
    std::memcpy(to, buffer, count * sizeof(T));
  }
  Floats zero_beyond(Floats value) const {
    for (int64_t i = count; i < kLanes; ++i) {
      value[i] = 0.0f;
    }
    return value;
  }
};

// Calls body(i, lanes, slot) for i = 0, kLanes, ... < n. `slot` counts 0 to kSlots - 1 at compile time, for sums that do
// not wait for each other.
constexpr int kSlots = 4;

template <typename Body>
inline void for_lanes(int64_t n, Body body) {
  using std::integral_constant;
  int64_t i = 0;
  for (; i + kSlots * kLanes <= n; i += kSlots * kLanes) {
    body(i, Full{}, integral_constant<int, 0>{});
    body(i + kLanes, Full{}, integral_constant<int, 1>{});
    body(i + 2 * kLanes, Full{}, integral_constant<int, 2>{});
    body(i + 3 * kLanes, Full{}, integral_constant<int, 3>{});
  }
  for (; i + kLanes <= n; i += kLanes) {
    body(i, Full{}, integral_constant<int, 0>{});
  }
  if (i < n) {
    body(i, Part{n - i}, integral_constant<int, 0>{});
  }
}

// Partial sums, one a slot.
struct Sums {
  Floats slots[kSlots] = {};
  float total() const {
    return sum((slots[0] + slots[1]) + (slots[2] + slots[3]));
  }
};

template <typename T>
inline void zero(T* to, int64_t n) {
  std::memset(static_cast<void*>(to), 0, n * sizeof(T));
}

// to[i] += from[i]
inline void add(float* __restrict__ to, const float* __restrict__ from, int64_t n) {
  for_lanes(n, [&](int64_t i, auto lanes, auto) { lanes.store(to + i, lanes.load(to + i) + lanes.load(from + i)); });
}

} // namespace pera
