// Native CPU kernel of `column_sums`; arguments and results are those of op.py.
//
// A task takes some rows, whose number does not depend on the number of threads, and keeps its sums in the L1 cache. The
// tasks' sums are added in their order: equal bits for any number of threads.

#include "packed.h"

namespace pera {
namespace {

constexpr int64_t kRows = 4; // that are read together, for one read and one write of the sums

template <typename T>
void add_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, float* __restrict__ sums) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    const T* __restrict__ row = x + r * stride;
    for_lanes(columns, [&](int64_t i, auto lanes, auto) {
      const T* at = row + i;
      const Floats two = lanes.load(at) + lanes.load(at + stride);
      const Floats other_two = lanes.load(at + 2 * stride) + lanes.load(at + 3 * stride);
      lanes.store(sums + i, lanes.load(sums + i) + (two + other_two));
    });
  }
  for (; r < rows; ++r) {
    const T* __restrict__ row = x + r * stride;
    for_lanes(columns, [&](int64_t i, auto lanes, auto) {
      lanes.store(sums + i, lanes.load(sums + i) + lanes.load(row + i));
    });
  }
}

Tensor column_sums(const Tensor& x_) {
  check_value(x_.dim() == 2, "x must be [R, C], got ", x_.sizes());
  const Tensor x = x_.stride(1) == 1 ? x_ : as_contiguous(x_); // rows may lie apart, as those of x[:, a:b]
  const int64_t rows = x.size(0), columns = x.size(1), stride = x.stride(0);
  const int64_t step = rows_per_task(rows), tasks = (rows + step - 1) / step;
  Tensor partials = new_empty(x, {tasks, columns}, ScalarType::Float), sums = new_empty(partials, {columns});
  float* partial = partials.mutable_data_ptr<float>();
  dispatch(x.scalar_type(), "column_sums", [&]<typename T>(T) {
    const T* from = x.const_data_ptr<T>();
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        zero(partial + task * columns, columns);
        const int64_t first = task * step;
        add_rows(from + first * stride, stride, std::min(step, rows - first), columns, partial + task * columns);
      }
    });
  });
  sum_tasks(partial, tasks, columns, sums.mutable_data_ptr<float>());
  return sums;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def("column_sums(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("column_sums", TORCH_BOX(&column_sums));
}

} // namespace pera
