// Native CPU kernel of `transposed`: threads over the columns.
#ifdef PERA_AVX512

#include "avx512.h"
#include "tensors.h"

namespace pera {
namespace {

constexpr int64_t kColumns = 32; // of a task

// x [R, C] -> [C, R filled up to a multiple of 32]
Tensor transposed(const Tensor& x) {
  check_value(
      x.dim() == 2 && (x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half) &&
          (x.stride(1) == 1 || x.size(1) <= 1),
      "x must be bfloat16 or half [R, C] with contiguous rows");
  const int64_t rows = x.size(0), columns = x.size(1), stride = x.stride(0), width = (rows + 31) / 32 * 32;
  Tensor result = new_empty(x, {columns, width});
  const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
  auto* to = static_cast<uint16_t*>(result.mutable_data_ptr());
  check_value(reinterpret_cast<uintptr_t>(to) % 64 == 0, "memory is not aligned to 64 bytes");
  parallel_for(0, (columns + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    transpose_columns(from, rows, columns, stride, begin * kColumns, end * kColumns, to, width);
  });
  return result;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def("transposed(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("transposed", TORCH_BOX(&transposed));
}

} // namespace pera

#endif // PERA_AVX512
