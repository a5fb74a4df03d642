// Native CPU kernels of `sequence_add`; arguments and results are those of op.py.
//
// One pass over the stream: each of its rows is read once and written once, rounded once.

#include "packed.h"

namespace pera {
namespace {

constexpr int64_t kGrain = 16; // rows

Tensor sequence_add(const Tensor& x_, const Tensor& y_, const Tensor& keep, Ints groups, Ints kept_counts) {
  const Tensor x = as_contiguous(x_), y = as_contiguous(y_, x.scalar_type());
  const Packing packing(groups, keep, kept_counts);
  const int64_t dim = x.size(1);
  check_value(
      x.size(0) == packing.tokens && y.numel() == packing.kept_tokens * dim, "shapes do not fit groups ", groups);
  Tensor out = empty_like(x);
  dispatch(x.scalar_type(), "sequence_add", [&]<typename T>(T) {
    const T *stream = x.const_data_ptr<T>(), *branch = y.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    parallel_for(0, packing.tokens, kGrain, [&](int64_t begin, int64_t end) {
      packing.visit_stream(begin, end, [&](Span span) {
        const int64_t n = span.rows * dim;
        const T* from = stream + span.stream * dim;
        T* to = result + span.stream * dim;
        if (span.packed == kDropped) {
          std::memcpy(static_cast<void*>(to), from, n * sizeof(T));
          return;
        }
        const T* added = branch + span.packed * dim;
        const float scale = packing.scale(span.stream);
        for_lanes(n, [&](int64_t i, auto lanes, auto) {
          lanes.store(to + i, lanes.load(from + i) + lanes.load(added + i) * scale);
        });
      });
    });
  });
  return out;
}

Tensor sequence_add_backward(const Tensor& grad_, const Tensor& keep, Ints groups, Ints kept_counts) {
  const Tensor grad = as_contiguous(grad_);
  const Packing packing(groups, keep, kept_counts);
  const int64_t dim = grad.size(1);
  check_value(grad.size(0) == packing.tokens, "shapes do not fit groups ", groups);
  Tensor grad_y = new_empty(grad, {packing.kept_tokens, dim});
  dispatch(grad.scalar_type(), "sequence_add_backward", [&]<typename T>(T) {
    const T* stream = grad.const_data_ptr<T>();
    T* result = grad_y.mutable_data_ptr<T>();
    parallel_for(0, packing.tokens, kGrain, [&](int64_t begin, int64_t end) {
      packing.visit_stream(begin, end, [&](Span span) {
        if (span.packed == kDropped) {
          return;
        }
        const T* from = stream + span.stream * dim;
        T* to = result + span.packed * dim;
        const float scale = packing.scale(span.stream);
        for_lanes(span.rows * dim, [&](int64_t i, auto lanes, auto) {
          lanes.store(to + i, lanes.load(from + i) * scale);
        });
      });
    });
  });
  return grad_y;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def("sequence_add(Tensor x, Tensor y, Tensor keep, int[] groups, int[] kept_counts) -> Tensor");
  m.def("sequence_add_backward(Tensor grad, Tensor keep, int[] groups, int[] kept_counts) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("sequence_add", TORCH_BOX(&sequence_add));
  m.impl("sequence_add_backward", TORCH_BOX(&sequence_add_backward));
}

} // namespace pera
