// Native CPU kernels of `sequence_add`; arguments and results are those of op.py.
//
// One pass over the stream: each of its rows is read once and written once, rounded once.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "packed.h"

namespace {

using pera::for_lanes;

constexpr int64_t kGrain = 16; // rows

at::Tensor sequence_add(
    const at::Tensor& x_,
    const at::Tensor& y_,
    const at::Tensor& keep,
    at::IntArrayRef groups,
    at::IntArrayRef kept) {
  const at::Tensor x = x_.contiguous(), y = y_.to(x.scalar_type()).contiguous();
  const pera::Packing packing(groups, keep, kept);
  const int64_t dim = x.size(1);
  TORCH_CHECK_VALUE(
      x.size(0) == packing.tokens && y.numel() == packing.kept_tokens * dim, "shapes do not fit groups ", groups);
  at::Tensor out = at::empty_like(x);
  PERA_DISPATCH_LANES(x.scalar_type(), "sequence_add", [&] {
    const scalar_t *stream = x.const_data_ptr<scalar_t>(), *branch = y.const_data_ptr<scalar_t>();
    scalar_t* result = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, packing.tokens, kGrain, [&](int64_t begin, int64_t end) {
      packing.visit_stream(begin, end, [&](pera::Span span) {
        const int64_t n = span.rows * dim;
        const scalar_t* from = stream + span.stream * dim;
        scalar_t* to = result + span.stream * dim;
        if (span.packed == pera::kDropped) {
          std::memcpy(static_cast<void*>(to), from, n * sizeof(scalar_t));
          return;
        }
        const scalar_t* added = branch + span.packed * dim;
        const float scale = packing.scale(span.stream);
        for_lanes(n, [&](int64_t i, auto lanes, auto) {
          lanes.store(to + i, lanes.load(from + i) + lanes.load(added + i) * scale);
        });
      });
    });
  });
  return out;
}

at::Tensor sequence_add_backward(
    const at::Tensor& grad_,
    const at::Tensor& keep,
    at::IntArrayRef groups,
    at::IntArrayRef kept) {
  const at::Tensor grad = grad_.contiguous();
  const pera::Packing packing(groups, keep, kept);
  const int64_t dim = grad.size(1);
  TORCH_CHECK_VALUE(grad.size(0) == packing.tokens, "shapes do not fit groups ", groups);
  at::Tensor grad_y = at::empty({packing.kept_tokens, dim}, grad.options());
  PERA_DISPATCH_LANES(grad.scalar_type(), "sequence_add_backward", [&] {
    const scalar_t* stream = grad.const_data_ptr<scalar_t>();
    scalar_t* result = grad_y.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, packing.tokens, kGrain, [&](int64_t begin, int64_t end) {
      packing.visit_stream(begin, end, [&](pera::Span span) {
        if (span.packed == pera::kDropped) {
          return;
        }
        const scalar_t* from = stream + span.stream * dim;
        scalar_t* to = result + span.packed * dim;
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

TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def("sequence_add(Tensor x, Tensor y, Tensor keep, int[] groups, int[] kept) -> Tensor");
  m.def("sequence_add_backward(Tensor grad, Tensor keep, int[] groups, int[] kept) -> Tensor");
}

TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("sequence_add", &sequence_add);
  m.impl("sequence_add_backward", &sequence_add_backward);
}
