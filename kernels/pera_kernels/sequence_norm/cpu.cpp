// Native CPU kernels of `sequence_norm`; arguments and results are those of op.py.
//
// Column sums for weight and bias are kept per task of rows
// and added in the order of the tasks, whose size does not depend on the number of threads: equal bits for any.

#include <algorithm>
#include <tuple>

#include "layer_norm.h"
#include "packed.h"

namespace pera {
namespace {

std::tuple<Tensor, Tensor, Tensor> sequence_norm(
    const Tensor& x_,
    const Tensor& weight_,
    const Tensor& bias_,
    double eps,
    const std::optional<Tensor>& keep,
    Ints groups,
    Ints kept_counts,
    bool avx512) {
  const Tensor x = as_contiguous(x_), weight = floats(weight_), bias = floats(bias_);
  const Packing packing(groups, keep, kept_counts);
  const int64_t dim = x.size(1);
  check_value(
      x.size(0) == packing.tokens && weight.numel() == dim && bias.numel() == dim, "shapes do not fit groups ", groups);
  Tensor y = new_empty(x, {packing.kept_tokens, dim});
  Tensor mean = new_empty(x, {packing.kept_tokens}, ScalarType::Float), rstd = empty_like(mean);
  float* means = mean.mutable_data_ptr<float>();
  float* rstds = rstd.mutable_data_ptr<float>();
  dispatch(x.scalar_type(), "sequence_norm", [&]<typename T>(T) {
    const T* from = x.const_data_ptr<T>();
    T* to = y.mutable_data_ptr<T>();
    const float *w = weight.const_data_ptr<float>(), *b = bias.const_data_ptr<float>();
    parallel_for(0, packing.tokens, 16, [&](int64_t begin, int64_t end) {
      packing.visit_stream(begin, end, [&](Span span) {
        if (const int64_t row = span.packed; row != kDropped) {
          normalise_rows(
              from + span.stream * dim, w, b, span.rows, dim, static_cast<float>(eps), to + row * dim, means + row,
              rstds + row, avx512);
        }
      });
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> sequence_norm_backward(
    const Tensor& grad_,
    const Tensor& x_,
    const Tensor& weight_,
    const Tensor& mean_,
    const Tensor& rstd_,
    const std::optional<Tensor>& keep,
    Ints groups,
    Ints kept_counts,
    bool avx512) {
  const Tensor x = as_contiguous(x_), grad = as_contiguous(grad_, x.scalar_type()), weight = floats(weight_);
  const Tensor mean = floats(mean_), rstd = floats(rstd_);
  const Packing packing(groups, keep, kept_counts);
  const int64_t dim = x.size(1), step = rows_per_task(packing.tokens);
  check_value(
      x.size(0) == packing.tokens && weight.numel() == dim && grad.numel() == packing.kept_tokens * dim &&
          mean.numel() == packing.kept_tokens && rstd.numel() == packing.kept_tokens,
      "shapes do not fit groups ", groups);
  const int64_t tasks = (packing.tokens + step - 1) / step;
  Tensor grad_x = empty_like(x), grad_weight = new_empty(weight, {dim}), grad_bias = new_empty(weight, {dim});
  Tensor partials = new_empty(weight, {tasks, 2, dim}), sums = new_empty(weight, {2, dim});
  float *partial = partials.mutable_data_ptr<float>(), *sum = sums.mutable_data_ptr<float>();
  dispatch(x.scalar_type(), "sequence_norm_backward", [&]<typename T>(T) {
    const T *from = x.const_data_ptr<T>(), *g = grad.const_data_ptr<T>();
    T* to = grad_x.mutable_data_ptr<T>();
    const float *w = weight.const_data_ptr<float>(), *m = mean.const_data_ptr<float>();
    const float* s = rstd.const_data_ptr<float>();
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        float* columns = partial + task * 2 * dim;
        zero(columns, 2 * dim);
        packing.visit_stream(task * step, std::min((task + 1) * step, packing.tokens), [&](Span span) {
          if (span.packed == kDropped) {
            zero(to + span.stream * dim, span.rows * dim);
            return;
          }
          const int64_t row = span.packed, first = span.stream * dim;
          const T* no_other = nullptr;
          normalise_backward_rows(
              g + row * dim, from + first, w, m + row, s + row, no_other, span.rows, dim, to + first, columns,
              columns + dim, avx512);
        });
      }
    });
  });
  sum_tasks(partial, tasks, 2 * dim, sum);
  std::copy_n(sum, dim, grad_weight.mutable_data_ptr<float>());
  std::copy_n(sum + dim, dim, grad_bias.mutable_data_ptr<float>());
  const auto type = weight_.scalar_type();
  return {grad_x, as_type(grad_weight, type), as_type(grad_bias, type)};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def(
      "sequence_norm(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? keep, int[] groups, int[] kept_counts, "
      "bool avx512) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sequence_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd, Tensor? keep, "
      "int[] groups, int[] kept_counts, bool avx512) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("sequence_norm", TORCH_BOX(&sequence_norm));
  m.impl("sequence_norm_backward", TORCH_BOX(&sequence_norm_backward));
}

} // namespace pera
