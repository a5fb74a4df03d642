// What the kernels use of PyTorch: only the part with a stable ABI, so that one built library serves every version from
// TORCH_TARGET_VERSION on (CMakeLists.txt). An include of ATen or c10 would tie the library to one version again.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK // its name up to PyTorch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

#include "type512.h"

namespace pera {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::empty_like;
using torch::stable::new_empty;
using torch::stable::new_zeros;
// As at::parallel_for, in PyTorch's own threads. Its body must not throw: the message would be lost on the way.
using torch::stable::parallel_for;

// Arguments int[] and float[], sizes and strides: not owned.
using Ints = torch::headeronly::HeaderOnlyArrayRef<int64_t>;
using Doubles = torch::headeronly::HeaderOnlyArrayRef<double>;

// Not ==: PyTorch 2.11 has none for its type.
inline bool equal(Ints a, Ints b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

// [1, 2]
inline std::ostream& operator<<(std::ostream& out, Ints values) {
  const char* separator = "";
  out << '[';
  for (const int64_t value : values) {
    out << separator << value;
    separator = ", ";
  }
  return out << ']';
}

template <typename Error, typename... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

// Raises Python's ValueError, its message put together from the parts, unless the condition holds.
template <typename... Parts>
inline void check_value(bool condition, const Parts&... parts) {
  if (!condition) {
    fail<std::invalid_argument>(parts...);
  }
}

// Raises IndexError likewise.
template <typename... Parts>
inline void check_index(bool condition, const Parts&... parts) {
  if (!condition) {
    fail<std::out_of_range>(parts...);
  }
}

template <typename T>
constexpr avx512::Type kType = std::is_same_v<T, float> ? avx512::Type::kFloat
    : std::is_same_v<T, BFloat16>                       ? avx512::Type::kBFloat16
                                                        : avx512::Type::kHalf;

// Calls run(T()) with T the C++ type of a dtype: float, BFloat16 or Half. Any other dtype raises.
template <typename Run>
inline void dispatch(ScalarType dtype, const char* op, const Run& run) {
  switch (dtype) {
    case ScalarType::Float:
      return run(float());
    case ScalarType::BFloat16:
      return run(BFloat16());
    case ScalarType::Half:
      return run(Half());
    default:
      fail<std::runtime_error>('"', op, "\" not implemented for '", dtype, '\'');
  }
}

// The same, with double as well.
template <typename Run>
inline void dispatch_with_double(ScalarType dtype, const char* op, const Run& run) {
  if (dtype == ScalarType::Double) {
    return run(double());
  }
  dispatch(dtype, op, run);
}

// In that dtype; x itself if it has it.
inline Tensor as_type(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

// With its values one after the other in memory; x itself if they are.
inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

inline Tensor as_contiguous(const Tensor& x, ScalarType dtype) {
  return as_contiguous(as_type(x, dtype));
}

} // namespace pera
