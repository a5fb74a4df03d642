// Native CPU kernels of `add_norm`; arguments and results are those of op.py.
//
// A few rows of the stream at a time, so that what one half of the work writes the other reads from the cache. Column sums
// are kept per task of rows and added in the order of the tasks, whose size does not depend on the number of threads.

#include <algorithm>
#include <tuple>

#include "avx512.h"
#include "layer_norm.h"
#include "packed.h"

namespace pera {
namespace {

constexpr int64_t kRows = 8; // at a time

std::optional<Tensor> floats(const std::optional<Tensor>& parameter) {
  return parameter ? std::optional(pera::floats(*parameter)) : std::nullopt;
}

const float* data(const std::optional<Tensor>& floats) {
  return floats ? floats->const_data_ptr<float>() : nullptr;
}

// to = x + scale * (y + y_bias), of rows * dim values; to may be x.
template <typename T>
void add_rows(
    const T* x,
    const T* y,
    const float* y_bias,
    float scale,
    int64_t rows,
    int64_t dim,
    T* to,
    [[maybe_unused]] bool avx512) {
#ifdef PERA_AVX512
  if (avx512) {
    return avx512::add_rows(kType<T>, x, y, y_bias, scale, rows, dim, to);
  }
#endif
  if (!y_bias) {
    for_lanes(rows * dim, [&](int64_t i, auto lanes, auto) {
      lanes.store(to + i, lanes.load(x + i) + lanes.load(y + i) * scale);
    });
    return;
  }
  for (int64_t first = 0; first < rows * dim; first += dim) {
    for_lanes(dim, [&](int64_t i, auto lanes, auto) {
      const Floats branch = lanes.load(y + first + i) + lanes.load(y_bias + i);
      lanes.store(to + first + i, lanes.load(x + first + i) + branch * scale);
    });
  }
}

// to = scale * grad [rows, dim], unless `to` is null; its columns are added to sums [dim], unless that is null.
template <typename T>
void scale_rows(
    const T* grad, float scale, int64_t rows, int64_t dim, T* to, float* sums, [[maybe_unused]] bool avx512) {
#ifdef PERA_AVX512
  if (avx512) {
    return avx512::scale_rows(kType<T>, grad, scale, rows, dim, to, sums);
  }
#endif
  for (int64_t first = 0; first < rows * dim; first += dim) {
    for_lanes(dim, [&](int64_t i, auto lanes, auto) {
      const Floats value = lanes.load(grad + first + i) * scale;
      if (to) {
        lanes.store(to + first + i, value);
      }
      if (sums) {
        lanes.store(sums + i, lanes.load(sums + i) + value);
      }
    });
  }
}

// The sum goes to `out`, which may be x. Returns normalised rows, mean, rstd; no rows without a weight.
std::tuple<Tensor, Tensor, Tensor> add_norm(
    const Tensor& x_,
    const Tensor& y_,
    const std::optional<Tensor>& y_bias_,
    const std::optional<Tensor>& weight_,
    const std::optional<Tensor>& bias_,
    double eps,
    Ints groups,
    const std::optional<Tensor>& add_keep,
    Ints add_counts,
    const std::optional<Tensor>& norm_keep,
    Ints norm_counts,
    Tensor out,
    bool avx512) {
  const Tensor x = as_contiguous(x_), y = as_contiguous(y_, x.scalar_type());
  const auto y_bias = floats(y_bias_), weight = floats(weight_), bias = floats(bias_);
  const Packing add(groups, add_keep, add_counts), norm(groups, norm_keep, norm_counts);
  const int64_t dim = x.size(1), normed_rows = weight ? norm.kept_tokens : 0;
  check_value(
      x.size(0) == add.tokens && y.numel() == add.kept_tokens * dim && equal(out.sizes(), x.sizes()) &&
          (!y_bias || y_bias->numel() == dim) && weight.has_value() == bias.has_value() &&
          (!weight || (weight->numel() == dim && bias->numel() == dim)),
      "shapes do not fit groups ", groups);
  check_value(out.is_contiguous() && out.scalar_type() == x.scalar_type(), "out must be contiguous, in the dtype of x");
  Tensor normed = new_empty(x, {normed_rows, dim});
  Tensor mean = new_empty(x, {normed_rows}, ScalarType::Float), rstd = empty_like(mean);
  float *means = mean.mutable_data_ptr<float>(), *rstds = rstd.mutable_data_ptr<float>();
  const float *yb = data(y_bias), *w = data(weight), *b = data(bias);
  dispatch(x.scalar_type(), "add_norm", [&]<typename T>(T) {
    const T *from = x.const_data_ptr<T>(), *branch = y.const_data_ptr<T>();
    T *stream = out.mutable_data_ptr<T>(), *to = normed.mutable_data_ptr<T>();
    const auto run = [&](int64_t begin, int64_t end) {
      add.visit_stream(begin, end, [&](Span span) {
        const int64_t first = span.stream * dim;
        if (span.packed != kDropped) {
          const float scale = add.scale(span.stream);
          add_rows(from + first, branch + span.packed * dim, yb, scale, span.rows, dim, stream + first, avx512);
        } else if (stream != from) {
          std::copy_n(from + first, span.rows * dim, stream + first);
        }
      });
      if (!w) {
        return;
      }
      norm.visit_stream(begin, end, [&](Span span) {
        if (const int64_t row = span.packed; row != kDropped) {
          normalise_rows(
              stream + span.stream * dim, w, b, span.rows, dim, static_cast<float>(eps), to + row * dim, means + row,
              rstds + row, avx512);
        }
      });
    };
    parallel_for(0, add.tokens, 2 * kRows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row += kRows) {
        run(row, std::min(row + kRows, end));
      }
    });
  });
  return {normed, mean, rstd};
}

// add_keep: none also where no branch was added.
std::tuple<Tensor, Tensor, Tensor> add_norm_backward(
    const std::optional<Tensor>& grad_,
    const std::optional<Tensor>& grad_normed_,
    const Tensor& x_,
    const std::optional<Tensor>& weight_,
    const std::optional<Tensor>& mean_,
    const std::optional<Tensor>& rstd_,
    Ints groups,
    const std::optional<Tensor>& add_keep,
    Ints add_counts,
    const std::optional<Tensor>& norm_keep,
    Ints norm_counts,
    bool has_bias,
    bool avx512) {
  const Tensor x = as_contiguous(x_);
  const auto as_x = [&](const std::optional<Tensor>& t) {
    return t ? std::optional(as_contiguous(*t, x.scalar_type())) : std::nullopt;
  };
  const auto grad = as_x(grad_), grad_normed = as_x(grad_normed_);
  const auto weight = floats(weight_), mean = floats(mean_), rstd = floats(rstd_);
  const Packing add(groups, add_keep, add_counts), norm(groups, norm_keep, norm_counts);
  const int64_t dim = x.size(1), rows = add.tokens, step = rows_per_task(rows), tasks = (rows + step - 1) / step;
  const bool has_norm = grad_normed && weight && mean && rstd;
  check_value(
      x.size(0) == rows && (!grad || equal(grad->sizes(), x.sizes())) &&
          (!has_norm ||
           (grad_normed->numel() == norm.kept_tokens * dim && weight->numel() == dim &&
            mean->numel() == norm.kept_tokens && rstd->numel() == norm.kept_tokens)),
      "shapes do not fit groups ", groups);
  Tensor grad_x = empty_like(x), grad_y = new_empty(x, {add_keep ? add.kept_tokens : 0, dim});
  Tensor partials = new_empty(x, {tasks, 3, dim}, ScalarType::Float), sums = new_empty(partials, {3, dim});
  float* partial = partials.mutable_data_ptr<float>();
  const float *w = data(weight), *m = data(mean), *s = data(rstd);
  dispatch(x.scalar_type(), "add_norm_backward", [&]<typename T>(T) {
    const T *from = x.const_data_ptr<T>(), *g = grad ? grad->const_data_ptr<T>() : nullptr;
    const T* h = has_norm ? grad_normed->const_data_ptr<T>() : nullptr;
    T *to = grad_x.mutable_data_ptr<T>(), *branch = add_keep ? grad_y.mutable_data_ptr<T>() : nullptr;
    const auto run = [&](int64_t begin, int64_t end, float* columns) {
      norm.visit_stream(begin, end, [&](Span span) {
        const int64_t first = span.stream * dim, n = span.rows * dim;
        if (!h || span.packed == kDropped) {
          g ? std::copy_n(g + first, n, to + first) : std::fill_n(to + first, n, T(0));
          return;
        }
        const int64_t row = span.packed;
        normalise_backward_rows(
            h + row * dim, from + first, w, m + row, s + row, g ? g + first : nullptr, span.rows, dim, to + first,
            columns, columns + dim, avx512);
      });
      if (!branch && !has_bias) {
        return;
      }
      add.visit_stream(begin, end, [&](Span span) {
        if (span.packed == kDropped) {
          return;
        }
        scale_rows(
            to + span.stream * dim, add.scale(span.stream), span.rows, dim, branch ? branch + span.packed * dim : nullptr,
            has_bias ? columns + 2 * dim : nullptr, avx512);
      });
    };
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        float* columns = partial + task * 3 * dim;
        zero(columns, 3 * dim);
        const int64_t last = std::min((task + 1) * step, rows);
        for (int64_t row = task * step; row < last; row += kRows) {
          run(row, std::min(row + kRows, last), columns);
        }
      }
    });
  });
  sum_tasks(partial, tasks, 3 * dim, sums.mutable_data_ptr<float>());
  return {grad_x, grad_y, sums};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def(
      "add_norm(Tensor x, Tensor y, Tensor? y_bias, Tensor? weight, Tensor? bias, float eps, int[] groups, "
      "Tensor? add_keep, int[] add_counts, Tensor? norm_keep, int[] norm_counts, Tensor(a!) out, bool avx512) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "add_norm_backward(Tensor? grad, Tensor? grad_normed, Tensor x, Tensor? weight, Tensor? mean, Tensor? rstd, "
      "int[] groups, Tensor? add_keep, int[] add_counts, Tensor? norm_keep, int[] norm_counts, bool has_bias, "
      "bool avx512) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("add_norm", TORCH_BOX(&add_norm));
  m.impl("add_norm_backward", TORCH_BOX(&add_norm_backward));
}

} // namespace pera
