// Native CPU kernels of `sequence_norm`; arguments and results are those of op.py.
//
// A row is read once from memory and twice from the L1 cache. Column sums for weight and bias are kept per task of rows
// and added in the order of the tasks, whose size does not depend on the number of threads: equal bits for any.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "packed.h"

namespace {

using pera::Floats;
using pera::for_lanes;
using pera::Sums;

struct Stats {
  float mean, rstd;
};

template <typename T>
Stats normalise(
    const T* __restrict__ x, // [D]
    const float* __restrict__ weight, // [D]
    const float* __restrict__ bias, // [D]
    int64_t dim,
    float eps,
    T* __restrict__ y) { // [D]
  Sums sums;
  for_lanes(dim, [&](int64_t i, auto lanes, auto slot) { sums.slots[slot] += lanes.load(x + i); });
  const float mean = sums.total() / static_cast<float>(dim);
  Sums squares; // around the mean: no cancellation
  for_lanes(dim, [&](int64_t i, auto lanes, auto slot) {
    const Floats centered = lanes.zero_beyond(lanes.load(x + i) - mean);
    squares.slots[slot] += centered * centered;
  });
  const float rstd = 1.0f / std::sqrt(squares.total() / static_cast<float>(dim) + eps);
  for_lanes(dim, [&](int64_t i, auto lanes, auto) {
    const Floats xhat = (lanes.load(x + i) - mean) * rstd;
    lanes.store(y + i, xhat * lanes.load(weight + i) + lanes.load(bias + i));
  });
  return {mean, rstd};
}

template <typename T>
void normalise_backward(
    const T* __restrict__ grad, // [D]
    const T* __restrict__ x, // [D]
    const float* __restrict__ weight, // [D]
    Stats stats,
    int64_t dim,
    T* __restrict__ grad_x, // [D]
    float* __restrict__ grad_weight, // [D], added to
    float* __restrict__ grad_bias) { // [D], added to
  const float mean = stats.mean, rstd = stats.rstd;
  Sums scaled, products;
  for_lanes(dim, [&](int64_t i, auto lanes, auto slot) {
    const Floats g = lanes.load(grad + i), xhat = (lanes.load(x + i) - mean) * rstd;
    const Floats s = g * lanes.load(weight + i);
    scaled.slots[slot] += s;
    products.slots[slot] += s * xhat; // s is zero beyond the row
    lanes.store(grad_weight + i, lanes.load(grad_weight + i) + g * xhat);
    lanes.store(grad_bias + i, lanes.load(grad_bias + i) + g);
  });
  const float mean_scaled = scaled.total() / static_cast<float>(dim);
  const float mean_product = products.total() / static_cast<float>(dim);
  for_lanes(dim, [&](int64_t i, auto lanes, auto) {
    const Floats xhat = (lanes.load(x + i) - mean) * rstd;
    const Floats s = lanes.load(grad + i) * lanes.load(weight + i);
    lanes.store(grad_x + i, (s - mean_scaled - xhat * mean_product) * rstd);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sequence_norm(
    const at::Tensor& x_,
    const at::Tensor& weight_,
    const at::Tensor& bias_,
    double eps,
    const std::optional<at::Tensor>& keep,
    at::IntArrayRef groups,
    at::IntArrayRef kept) {
  const at::Tensor x = x_.contiguous(), weight = pera::floats(weight_), bias = pera::floats(bias_);
  const pera::Packing packing(groups, keep, kept);
  const int64_t dim = x.size(1);
  TORCH_CHECK_VALUE(
      x.size(0) == packing.tokens && weight.numel() == dim && bias.numel() == dim, "shapes do not fit groups ", groups);
  at::Tensor y = at::empty({packing.kept_tokens, dim}, x.options());
  at::Tensor mean = at::empty({packing.kept_tokens}, x.options().dtype(at::kFloat)), rstd = at::empty_like(mean);
  float* means = mean.mutable_data_ptr<float>();
  float* rstds = rstd.mutable_data_ptr<float>();
  PERA_DISPATCH_LANES(x.scalar_type(), "sequence_norm", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    const float *w = weight.const_data_ptr<float>(), *b = bias.const_data_ptr<float>();
    at::parallel_for(0, packing.tokens, 16, [&](int64_t begin, int64_t end) {
      packing.visit_stream(begin, end, [&](pera::Span span) {
        for (int64_t r = 0; span.packed != pera::kDropped && r < span.rows; ++r) {
          const int64_t row = span.packed + r;
          const Stats stats =
              normalise(from + (span.stream + r) * dim, w, b, dim, static_cast<float>(eps), to + row * dim);
          means[row] = stats.mean;
          rstds[row] = stats.rstd;
        }
      });
    });
  });
  return {y, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> sequence_norm_backward(
    const at::Tensor& grad_,
    const at::Tensor& x_,
    const at::Tensor& weight_,
    const at::Tensor& mean_,
    const at::Tensor& rstd_,
    const std::optional<at::Tensor>& keep,
    at::IntArrayRef groups,
    at::IntArrayRef kept) {
  const at::Tensor x = x_.contiguous(), grad = grad_.to(x.scalar_type()).contiguous(), weight = pera::floats(weight_);
  const at::Tensor mean = pera::floats(mean_), rstd = pera::floats(rstd_);
  const pera::Packing packing(groups, keep, kept);
  const int64_t dim = x.size(1), step = pera::rows_per_task(packing.tokens);
  TORCH_CHECK_VALUE(
      x.size(0) == packing.tokens && weight.numel() == dim && grad.numel() == packing.kept_tokens * dim &&
          mean.numel() == packing.kept_tokens && rstd.numel() == packing.kept_tokens,
      "shapes do not fit groups ", groups);
  const int64_t tasks = (packing.tokens + step - 1) / step;
  at::Tensor grad_x = at::empty_like(x), partials = at::empty({tasks, 2, dim}, weight.options());
  at::Tensor sums = at::empty({2, dim}, weight.options());
  float* partial = partials.mutable_data_ptr<float>();
  PERA_DISPATCH_LANES(x.scalar_type(), "sequence_norm_backward", [&] {
    const scalar_t *from = x.const_data_ptr<scalar_t>(), *g = grad.const_data_ptr<scalar_t>();
    scalar_t* to = grad_x.mutable_data_ptr<scalar_t>();
    const float *w = weight.const_data_ptr<float>(), *m = mean.const_data_ptr<float>();
    const float* s = rstd.const_data_ptr<float>();
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        float* columns = partial + task * 2 * dim;
        pera::zero(columns, 2 * dim);
        packing.visit_stream(task * step, std::min((task + 1) * step, packing.tokens), [&](pera::Span span) {
          if (span.packed == pera::kDropped) {
            pera::zero(to + span.stream * dim, span.rows * dim);
            return;
          }
          for (int64_t r = 0; r < span.rows; ++r) {
            const int64_t row = span.packed + r, first = (span.stream + r) * dim;
            normalise_backward(
                g + row * dim, from + first, w, {m[row], s[row]}, dim, to + first, columns, columns + dim);
          }
        });
      }
    });
  });
  pera::sum_tasks(partial, tasks, 2 * dim, sums.mutable_data_ptr<float>());
  const auto type = weight_.scalar_type();
  return {grad_x, sums[0].clone().to(type), sums[1].clone().to(type)};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def(
      "sequence_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? keep, int[] groups, int[] kept) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "sequence_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd, Tensor? keep, "
      "int[] groups, int[] kept) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("sequence_norm", &sequence_norm);
  m.impl("sequence_norm_backward", &sequence_norm_backward);
}
