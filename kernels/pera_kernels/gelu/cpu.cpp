// Native CPU kernels of `gelu`; arguments and results are those of op.py. normal.h has the formula.
//
// Each value is read once and written once. A task of the backward pass takes some rows, whose number does not depend on
// the number of threads, and keeps their column sums in the L1 cache; the tasks' sums are added in their order.

#include <array>
#include <cmath>

#include "avx512.h"
#include "normal.h"
#include "packed.h"

namespace pera {
namespace {

constexpr int64_t kGrain = 16384; // values

template <int n>
inline Floats polynomial(const float (&coefficients)[n], Floats at) {
  Floats value = Floats{} + coefficients[n - 1];
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) {
    value = value * at + coefficients[i];
  }
  return value;
}

struct Normal {
  Floats cdf, exponential; // Phi(x), exp(-x * x / 2)
};

inline Floats absolute(Floats x) { // at most kLimit; NaN stays
  const Floats size = std::bit_cast<Floats>(std::bit_cast<Words>(x) & 0x7fffffffu);
  return size > normal::kLimit ? Floats{} + normal::kLimit : size;
}

template <int n>
inline Floats exp2(Floats x, const float (&coefficients)[n]) { // coefficients of 2^f
  // The lowest bits of `shifted` are the whole part, which goes into the exponent.
  const Floats shifted = x + normal::kRound, whole = shifted - normal::kRound;
  const Words power = std::bit_cast<Words>(polynomial(coefficients, x - whole));
  const Floats value = std::bit_cast<Floats>(power + (std::bit_cast<Words>(shifted) << 23));
  return whole < -125.0f ? Floats{} : value; // below the smallest normal number
}

template <bool kExact>
inline Normal normal_at(Floats x) {
  using namespace normal;
  const Floats t = absolute(x), log2 = t * t * -kHalfLog2E;
  Floats exponential, ratio;
  if constexpr (kExact) {
    const Floats u = 1.0f / (t * kScaleSingle + 1.0f);
    ratio = 0.5f - t * u * polynomial(kRSingle, u);
    exponential = exp2(log2, kExp2Single);
  } else {
    const Floats u = 1.0f / (t * kScaleHalf + 1.0f);
    ratio = u * polynomial(kRHalf, u);
    exponential = exp2(log2, kExp2Half);
  }
  const Floats tail = exponential * ratio;
  return {x >= 0.0f ? 1.0f - tail : tail, exponential};
}

template <typename T>
void gelu_of(const T* x, int64_t n, T* out) { // out may be x
  for_lanes(n, [&](int64_t i, auto lanes, auto) {
    const Floats at = lanes.load(x + i);
    lanes.store(out + i, at * normal_at<std::is_same_v<T, float>>(at).cdf);
  });
}

template <typename T>
void gelu_backward_of(
    T* grad, // [rows, columns]
    const T* x, // [rows, columns]
    int64_t rows,
    int64_t columns,
    T* out, // [rows, columns] or null
    float* sums) { // [columns], added to
  for (int64_t r = 0; r < rows; ++r) {
    T* g = grad + r * columns;
    const T* from = x + r * columns;
    T* to = out + r * columns;
    for_lanes(columns, [&](int64_t i, auto lanes, auto) {
      const Floats at = lanes.load(from + i);
      const Normal normal = normal_at<std::is_same_v<T, float>>(at);
      if (out) {
        lanes.store(to + i, at * normal.cdf);
      }
      const Floats slope = normal.cdf + at * normal::kInverseSqrt2Pi * normal.exponential;
      const Floats dx = lanes.load(g + i) * slope;
      lanes.store(g + i, dx);
      lanes.store(sums + i, lanes.load(sums + i) + dx);
    });
  }
}

#ifdef PERA_AVX512
// [4, kTails]: coefficients of r^0 to r^3 of Phi(-(i * kStep + r)). They are Taylor's, with the next two powers replaced by
// their best approximations of lower degree (by Chebyshev polynomials) for |r| <= kStep / 2.
const float* tails() {
  using normal::kStep, normal::kTails;
  static const auto coefficients = [] {
    std::array<float, 4 * kTails> result{};
    for (int i = 0; i + 1 < kTails; ++i) {
      const double t = i * static_cast<double>(kStep), t2 = t * t, a2 = kStep * kStep / 4.0;
      const double density = std::exp(-t2 / 2) / std::sqrt(2 * std::acos(-1.0));
      const double c4 = t * (t2 - 3) * density / 24, c5 = (-t2 * t2 + 6 * t2 - 3) * density / 120;
      const double c[] = {
          std::erfc(t / std::sqrt(2.0)) / 2 - c4 * a2 * a2 / 8, -density - c5 * a2 * a2 * 5 / 16, t * density / 2 + c4 * a2,
          (1 - t2) * density / 6 + c5 * a2 * 5 / 4};
      for (int k = 0; k < 4; ++k) {
        result[k * kTails + i] = static_cast<float>(c[k]);
      }
    }
    return result;
  }();
  return coefficients.data();
}
#endif

void gelu(const Tensor& x, Tensor out, [[maybe_unused]] bool avx512) {
  check_value(
      x.is_contiguous() && out.is_contiguous() && equal(x.sizes(), out.sizes()) && x.scalar_type() == out.scalar_type(),
      "x and out must be contiguous, of one shape and dtype");
  dispatch(x.scalar_type(), "gelu", [&]<typename T>(T) {
    const T* from = x.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
#ifdef PERA_AVX512
      if (avx512) {
        return avx512::gelu(kType<T>, from + begin, end - begin, to + begin, tails());
      }
#endif
      gelu_of(from + begin, end - begin, to + begin);
    });
  });
}

// Returns the column sums.
Tensor gelu_backward_(Tensor grad, const Tensor& x, Tensor out, [[maybe_unused]] bool avx512) {
  const bool has_out = out.size(0) != 0;
  check_value(
      x.dim() == 2 && x.is_contiguous() && grad.is_contiguous() && out.is_contiguous() &&
          equal(x.sizes(), grad.sizes()) && (!has_out || equal(x.sizes(), out.sizes())) &&
          x.scalar_type() == grad.scalar_type() && x.scalar_type() == out.scalar_type(),
      "grad, x and out must be contiguous [R, C] of one dtype, out may have no rows");
  const int64_t rows = x.size(0), columns = x.size(1);
  const int64_t step = rows_per_task(rows), tasks = (rows + step - 1) / step;
  Tensor partials = new_empty(x, {tasks, columns}, ScalarType::Float), sums = new_empty(partials, {columns});
  float* partial = partials.mutable_data_ptr<float>();
  dispatch(x.scalar_type(), "gelu_backward_", [&]<typename T>(T) {
    const T* from = x.const_data_ptr<T>();
    T* g = grad.mutable_data_ptr<T>();
    T* to = has_out ? out.mutable_data_ptr<T>() : nullptr;
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * step * columns, count = std::min(step, rows - task * step);
        float* sum = partial + task * columns;
        zero(sum, columns);
#ifdef PERA_AVX512
        if (avx512) {
          avx512::gelu_backward(kType<T>, g + first, from + first, count, columns, to ? to + first : nullptr, sum);
          continue;
        }
#endif
        gelu_backward_of(g + first, from + first, count, columns, to ? to + first : nullptr, sum);
      }
    });
  });
  sum_tasks(partial, tasks, columns, sums.mutable_data_ptr<float>());
  return sums;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def("gelu(Tensor x, Tensor(a!) out, bool avx512) -> ()");
  m.def("gelu_backward_(Tensor(a!) grad, Tensor x, Tensor(b!) out, bool avx512) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("gelu", TORCH_BOX(&gelu));
  m.impl("gelu_backward_", TORCH_BOX(&gelu_backward_));
}

} // namespace pera
