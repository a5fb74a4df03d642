// Native CPU passes of `distillation_loss` (and of the weight norm, which `koleo` shares) around matrix products that
// stay with PyTorch: README.md beside this has the maths, chunked.py the walk over chunks of prototypes.
//
// Arithmetic in float32; a row's sums are taken in a fixed order by one thread, a column's likewise: equal bits for any
// number of threads. Sums run in kLanes partial sums, which the compiler keeps in vector registers; std::fma is written
// out where it is meant, so that vectorised loops and their remainders round alike.

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "tensors.h"

namespace pera {
namespace {

constexpr int64_t kLanes = 32;
constexpr int64_t kBlock = 512; // columns that are worked on at a time: a few KiB of the L1 cache
constexpr int64_t kStatistics = 5; // student's maximum and sum, teacher's maximum and sum, cross term

// condition ? yes : no in integers: GCC 12 leaves a loop scalar around the operator itself, unless told that comparisons
// do not trap.
inline float select(bool condition, float yes, float no) {
  const uint32_t mask = -static_cast<uint32_t>(condition);
  return std::bit_cast<float>((std::bit_cast<uint32_t>(yes) & mask) | (std::bit_cast<uint32_t>(no) & ~mask));
}

// exp(x) to 1 ulp for x <= 88, in a form that vectorises; 0 below -87, where a sum that holds exp(0) cannot see it.
// NaN stays NaN.
inline float exp_of(float x) {
  constexpr float kLog2e = 1.44269504088896341f, kShift = 12582912.0f; // 1.5 * 2^23: rounds to an integer
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float safe = select(x > -87.0f, x, -87.0f);
  const float shifted = std::fma(safe, kLog2e, kShift);
  const float n = shifted - kShift;
  const float r = std::fma(n, -kLn2Low, std::fma(n, -kLn2High, safe)); // |r| <= ln(2) / 2
  float p = 1.9875691500e-4f; // minimax polynomial of Cephes' expf
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p, r * r, r) + 1.0f;
  const uint32_t bits = std::bit_cast<uint32_t>(p) + (std::bit_cast<uint32_t>(shifted) << 23);
  const float result = std::bit_cast<float>(bits);
  return select(x >= -87.0f, result, select(x < -87.0f, 0.0f, x)); // x where it is NaN
}

inline float to_float(float x) {
  return x;
}
inline float to_float(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16);
}
inline float to_float(Half x) {
  return static_cast<float>(x);
}

template <typename T>
inline void store(T* out, float x) {
  if constexpr (std::is_same_v<T, BFloat16>) { // to nearest even, as c10 does, in a form that vectorises
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out->x = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  } else {
    *out = static_cast<T>(x);
  }
}

// Sum of kLanes values, which it overwrites; halves onto halves, as one after the other costs a row more than its products.
inline float sum_lanes(float* lanes) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) {
      lanes[lane] += lanes[lane + width];
    }
  }
  return lanes[0];
}

// Maximum of n values, as integers in the order of the floats (a maximum of floats stays scalar); NaN may come out of it.
inline float maximum(const float* x, int64_t n) {
  const auto flip = [](int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); };
  int32_t best = std::numeric_limits<int32_t>::min();
  for (int64_t i = 0; i < n; ++i) {
    best = std::max(best, flip(std::bit_cast<int32_t>(x[i])));
  }
  return std::bit_cast<float>(flip(best));
}

// Sum of n values, n a multiple of kLanes.
inline float sum(const float* x, int64_t n) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += x[i + lane];
    }
  }
  return sum_lanes(lanes);
}

// Sum of n products.
template <typename X, typename Y>
float dot(const X* x, const Y* y, int64_t n) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = std::fma(to_float(x[i + lane]), to_float(y[i + lane]), lanes[lane]);
    }
  }
  float total = 0.0f;
  for (; i < n; ++i) {
    total = std::fma(to_float(x[i]), to_float(y[i]), total);
  }
  return total + sum_lanes(lanes);
}

// out = exp(x - maximum), n a multiple of kLanes.
inline void exponentiate(const float* __restrict__ x, float maximum, int64_t n, float* __restrict__ out) {
  for (int64_t i = 0; i < n; i += kLanes) { // a loop of known length vectorises
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      out[i + lane] = exp_of(x[i + lane] - maximum);
    }
  }
}

// What turns a chunk's raw products into logits: s = x * student, t = x * teacher - shift. The temperatures are in it.
struct Scales {
  Scales(
      const Tensor& student_scale, // [c] float
      const Tensor& teacher_scale, // [c] float
      const Tensor& center, // [c]
      double student_temp,
      double teacher_temp)
      : student(student_scale.numel()), teacher(student.size()), shift(student.size()) {
    const Tensor wide = as_contiguous(center, ScalarType::Float);
    const float* s = student_scale.const_data_ptr<float>();
    const float* t = teacher_scale.const_data_ptr<float>();
    const float* c = wide.const_data_ptr<float>();
    const auto ts = static_cast<float>(student_temp), tt = static_cast<float>(teacher_temp);
    for (size_t i = 0; i < student.size(); ++i) {
      student[i] = s[i] / ts;
      teacher[i] = t[i] / tt;
      shift[i] = c[i] / tt;
    }
  }
  std::vector<float> student, teacher, shift;
};

template <typename T>
void forward_row(const T* s, const T* t, const Scales& scales, int64_t count, float* statistics) {
  alignas(64) float student[kBlock], teacher[kBlock], exponentials[kBlock];
  auto [student_max, student_sum, teacher_max, teacher_sum, cross] =
      std::tuple(statistics[0], statistics[1], statistics[2], statistics[3], statistics[4]);
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t n = std::min(kBlock, count - begin), padded = (n + kLanes - 1) / kLanes * kLanes;
    const float* student_scale = scales.student.data() + begin;
    const float* teacher_scale = scales.teacher.data() + begin;
    const float* shift = scales.shift.data() + begin;
    for (int64_t i = 0; i < n; ++i) {
      student[i] = std::fma(to_float(s[begin + i]), student_scale[i], 0.0f);
      teacher[i] = std::fma(to_float(t[begin + i]), teacher_scale[i], -shift[i]);
    }
    std::fill(student + n, student + padded, -FLT_MAX); // finite: 0 * it is added to the cross term
    std::fill(teacher + n, teacher + padded, -FLT_MAX);
    const float new_student = std::max(student_max, maximum(student, padded));
    const float new_teacher = std::max(teacher_max, maximum(teacher, padded));
    exponentiate(student, new_student, padded, exponentials);
    student_sum = std::fma(student_sum, exp_of(student_max - new_student), sum(exponentials, padded));
    exponentiate(teacher, new_teacher, padded, exponentials);
    const float rescale = exp_of(teacher_max - new_teacher);
    teacher_sum = std::fma(teacher_sum, rescale, sum(exponentials, padded));
    cross = std::fma(cross, rescale, dot(exponentials, student, padded));
    student_max = new_student;
    teacher_max = new_teacher;
  }
  const float result[kStatistics] = {student_max, student_sum, teacher_max, teacher_sum, cross};
  std::copy_n(result, kStatistics, statistics);
}

void check_products(const Tensor& student, const Tensor& teacher) {
  check_value(student.dim() == 2 && student.is_contiguous(), "products must be contiguous [N, c]");
  check_value(
      equal(teacher.sizes(), student.sizes()) && teacher.is_contiguous() && teacher.scalar_type() == student.scalar_type(),
      "both products must have one shape and dtype");
}

void check_vector(const Tensor& x, int64_t count) {
  check_value(
      x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == count, "need float32, contiguous, ", count,
      " values");
}

// Takes a chunk of products into the running statistics of its rows.
void distillation_forward_(
    const Tensor& student, // [N, c]
    const Tensor& teacher, // [N, c]
    const Tensor& student_scale, // [c]
    const Tensor& teacher_scale, // [c]
    const Tensor& center, // [c]
    double student_temp,
    double teacher_temp,
    Tensor& statistics) { // [N, 5]
  check_products(student, teacher);
  const int64_t count = student.size(1);
  check_vector(student_scale, count);
  check_vector(teacher_scale, count);
  check_vector(statistics, student.size(0) * kStatistics);
  check_value(center.numel() == count, "center must have ", count, " values");
  const Scales scales(student_scale, teacher_scale, center, student_temp, teacher_temp);
  float* out = statistics.mutable_data_ptr<float>();
  dispatch(student.scalar_type(), "distillation_forward_", [&]<typename T>(T) {
    const T* s = student.const_data_ptr<T>();
    const T* t = teacher.const_data_ptr<T>();
    parallel_for(0, student.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        forward_row(s + n * count, t + n * count, scales, count, out + n * kStatistics);
      }
    });
  });
}

// Gradient of `n` neighbouring columns of the student's products, over them; `along` [n] gains sum_n dz * product.
template <typename T>
void backward_columns(
    T* s, // [rows, stride]
    const T* t, // [rows, stride]
    int64_t rows,
    int64_t stride,
    int64_t n,
    const float* const* scales, // student's, teacher's, shift, student's without the temperature
    const float* statistics, // [rows, 4]
    const float* upstream, // [rows]
    float zero, // 0, unknown to the compiler: the logit must round as in the forward, not fuse with the subtraction
    float* along) {
  const float* __restrict__ student_scale = scales[0];
  const float* __restrict__ teacher_scale = scales[1];
  const float* __restrict__ shift = scales[2];
  const float* __restrict__ direction_scale = scales[3];
  alignas(64) float sums[kBlock] = {};
  for (int64_t row = 0; row < rows; ++row, s += stride, t += stride) {
    const float* stats = statistics + row * 4;
    const float student_max = stats[0], student_factor = upstream[row] / stats[1];
    const float teacher_max = stats[2], teacher_factor = upstream[row] / stats[3];
    T* __restrict__ out = s;
    const T* __restrict__ in = t;
    for (int64_t i = 0; i < n; ++i) {
      const float product = to_float(out[i]);
      const float p = exp_of(std::fma(product, student_scale[i], zero) - student_max);
      const float target = exp_of(std::fma(to_float(in[i]), teacher_scale[i], -shift[i]) - teacher_max);
      const float dz = std::fma(p, student_factor, -(target * teacher_factor));
      sums[i] = std::fma(dz, product, sums[i]);
      store(out + i, dz * direction_scale[i]);
    }
  }
  std::copy_n(sums, n, along);
}

// Replaces the student's products by their gradient; returns along [c] = sum over rows of d loss / d logit * product.
Tensor distillation_backward_(
    Tensor& student, // [N, c]
    const Tensor& teacher, // [N, c]
    const Tensor& student_scale, // [c]
    const Tensor& teacher_scale, // [c]
    const Tensor& center, // [c]
    double student_temp,
    double teacher_temp,
    const Tensor& statistics, // [N, 4]: maximum and sum, of the student, of the teacher
    const Tensor& upstream) { // [N], over the student's temperature
  check_products(student, teacher);
  const int64_t rows = student.size(0), count = student.size(1);
  check_vector(student_scale, count);
  check_vector(teacher_scale, count);
  check_vector(statistics, rows * 4);
  check_vector(upstream, rows);
  check_value(center.numel() == count, "center must have ", count, " values");
  const Scales scales(student_scale, teacher_scale, center, student_temp, teacher_temp);
  Tensor along = new_empty(student_scale, {count});
  float* sums = along.mutable_data_ptr<float>();
  const float* plain = student_scale.const_data_ptr<float>();
  const float* stats = statistics.const_data_ptr<float>();
  const float* up = upstream.const_data_ptr<float>();
  const volatile float opaque = 0.0f;
  const float zero = opaque;
  dispatch(student.scalar_type(), "distillation_backward_", [&]<typename T>(T) {
    T* s = student.mutable_data_ptr<T>();
    const T* t = teacher.const_data_ptr<T>();
    parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kBlock) {
        const float* const columns[] = {
            scales.student.data() + i, scales.teacher.data() + i, scales.shift.data() + i, plain + i};
        backward_columns(s + i, t + i, rows, count, std::min(kBlock, end - i), columns, stats, up, zero, sums + i);
      }
    });
  });
  return along;
}

void check_matrix(const Tensor& x, Ints sizes) {
  check_value(equal(x.sizes(), sizes) && x.is_contiguous(), "need contiguous ", sizes, ", got ", x.sizes());
}

constexpr int64_t kAhead = 4; // rows

// Brings the row that lies kAhead rows of n values further on into the cache: the processor's own fetching stops at the end
// of a page. There may be no such row: then nothing happens.
template <typename T>
inline void fetch_row(const T* row, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(row);
  const int64_t size = n * static_cast<int64_t>(sizeof(T));
  for (int64_t i = kAhead * size; i < (kAhead + 1) * size; i += 64) {
    __builtin_prefetch(bytes + i);
  }
}

// Scale [c] and 1 / ||v|| [c] of a chunk of prototypes. With `direction` v / ||v|| is written to it and the scale is g;
// without it the direction is v itself and the scale g / ||v||.
std::tuple<Tensor, Tensor> weight_norm(
    const Tensor& v, // [c, d]
    const Tensor& g, // [c, 1]
    const std::optional<Tensor>& direction) { // [c, d]
  check_value(v.dim() == 2 && v.is_contiguous(), "v must be contiguous [c, d]");
  const int64_t count = v.size(0), dim = v.size(1);
  check_value(g.numel() == count, "g must be [", count, ", 1]");
  const Tensor gains = as_contiguous(g, ScalarType::Float);
  Tensor scale = new_empty(gains, {count}), inverse_norm = empty_like(scale);
  const float* gain = gains.const_data_ptr<float>();
  float* scales = scale.mutable_data_ptr<float>();
  float* inverse = inverse_norm.mutable_data_ptr<float>();
  if (direction) {
    check_matrix(*direction, v.sizes());
  }
  dispatch(v.scalar_type(), "weight_norm", [&]<typename V>(V) {
    const V* rows = v.const_data_ptr<V>();
    dispatch(direction ? direction->scalar_type() : ScalarType::Float, "weight_norm", [&]<typename D>(D) {
      D* out = direction ? direction->mutable_data_ptr<D>() : nullptr;
      parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          const V* __restrict__ row = rows + k * dim;
          fetch_row(row, dim);
          const float factor = 1.0f / std::sqrt(dot(row, row, dim));
          inverse[k] = factor;
          scales[k] = out == nullptr ? gain[k] * factor : gain[k];
          if (out == nullptr) {
            continue;
          }
          D* __restrict__ to = out + k * dim;
          for_lanes(dim, [&](int64_t i, auto lanes, auto) { lanes.store(to + i, lanes.load(row + i) * factor); });
        }
      });
    });
  });
  return {scale, inverse_norm};
}

// Gradient of a chunk of v, in place where `products` is `out`:
//   factor * (products - (products . v/||v||) * v/||v||),  factor = 1/||v|| where the direction was v / ||v||, else 1.
// The part along v is taken off the products as they were rounded: in half types it would not cancel otherwise.
void weight_norm_backward_(
    const Tensor& products, // [c, d]: dz' rows, with the chunk's scale in dz
    const Tensor& v, // [c, d]
    const Tensor& inverse_norm, // [c]
    bool unit,
    Tensor& out) { // [c, d]
  check_value(v.dim() == 2 && v.is_contiguous(), "v must be contiguous [c, d]");
  const int64_t count = v.size(0), dim = v.size(1);
  check_matrix(products, v.sizes());
  check_matrix(out, v.sizes());
  check_value(out.scalar_type() == v.scalar_type(), "the gradient must have v's dtype");
  check_vector(inverse_norm, count);
  const float* inverse = inverse_norm.const_data_ptr<float>();
  dispatch(v.scalar_type(), "weight_norm_backward_", [&]<typename V>(V) {
    const V* rows = v.const_data_ptr<V>();
    V* result = out.mutable_data_ptr<V>();
    dispatch(products.scalar_type(), "weight_norm_backward_", [&]<typename P>(P) {
      const P* from = products.const_data_ptr<P>();
      parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          const float factor = unit ? inverse[k] : 1.0f;
          const V* row = rows + k * dim;
          const P* product = from + k * dim; // may be `to`
          fetch_row(row, dim);
          fetch_row(product, dim);
          V* to = result + k * dim;
          const float pull = factor * dot(product, row, dim) * inverse[k] * inverse[k];
#pragma GCC ivdep
          for (int64_t i = 0; i < dim; ++i) {
            store(to + i, std::fma(to_float(row[i]), -pull, factor * to_float(product[i])));
          }
        }
      });
    });
  });
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def(
      "distillation_forward_(Tensor student, Tensor teacher, Tensor student_scale, Tensor teacher_scale, Tensor center, "
      "float student_temp, float teacher_temp, Tensor(a!) statistics) -> ()");
  m.def(
      "distillation_backward_(Tensor(a!) student, Tensor teacher, Tensor student_scale, Tensor teacher_scale, "
      "Tensor center, float student_temp, float teacher_temp, Tensor statistics, Tensor upstream) -> Tensor");
  m.def("weight_norm(Tensor v, Tensor g, Tensor(a!)? direction) -> (Tensor, Tensor)");
  m.def(
      "weight_norm_backward_(Tensor products, Tensor v, Tensor inverse_norm, bool unit, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("distillation_forward_", TORCH_BOX(&distillation_forward_));
  m.impl("distillation_backward_", TORCH_BOX(&distillation_backward_));
  m.impl("weight_norm", TORCH_BOX(&weight_norm));
  m.impl("weight_norm_backward_", TORCH_BOX(&weight_norm_backward_));
}

} // namespace pera
