// Native CPU kernels of `pixel_loss`; arguments and results are those of op.py.
//
// The target of one row at a time is made in the L1 cache: the patch's own pixels, coloured as in visible_patches, in the
// order of `pred`. Every row has one sum; the sums are added in the order of the rows: equal bits for any number of
// threads. The backward makes the targets again and writes the gradient once.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "visible_patches/color.h"
#include "visible_patches/patches.h"

namespace {

using pera::patches::Colors;
using pera::patches::Grid;
using pera::patches::color_channels;
using pera::patches::copy_pixels;
using pera::patches::dispatch_pixels;
using pera::patches::is_raw;
using pera::patches::kLanes;
using pera::patches::load;
using pera::patches::store;
using pera::patches::sum;

// Everything but `pred`, checked, and the targets that follow from it.
class Targets {
 public:
  Targets(
      const at::Tensor& crops,
      const at::Tensor& index,
      const std::optional<at::Tensor>& order,
      const std::optional<at::Tensor>& factors,
      const std::optional<at::Tensor>& gray_mean,
      at::ArrayRef<double> mean,
      at::ArrayRef<double> std,
      int64_t patch_size,
      at::OptionalIntArrayRef rgb)
      : crops_(crops),
        is_raw_(is_raw(crops)),
        channels_(crops.size(is_raw_ ? 3 : 1)),
        pixels_(patch_size * patch_size),
        rgb_(color_channels(channels_, rgb)),
        grid_(index, crops.size(is_raw_ ? 1 : 2), crops.size(is_raw_ ? 2 : 3), patch_size),
        colors_(order, factors, gray_mean ? *gray_mean : at::Tensor()) {
    const auto per_channel = static_cast<size_t>(channels_);
    TORCH_CHECK_VALUE(
        !is_raw_ || (mean.size() == per_channel && std.size() == per_channel),
        "mean and std must have a value a channel");
    TORCH_CHECK_VALUE(!colors_.on || gray_mean.has_value(), "gray_mean must come with order");
    for (size_t c = 0; is_raw_ && c < per_channel; ++c) {
      center_.push_back(static_cast<float>(mean[c]));
      scale_.push_back(static_cast<float>(1.0 / std[c]));
    }
  }

  int64_t rows() const {
    return grid_.index.numel();
  }

  int64_t values() const { // of a row
    return pixels_ * channels_;
  }

  // Memory that one thread works in.
  struct Scratch {
    std::vector<uint16_t> packed; // of either pixel type
    std::vector<float> planes, target;
  };

  Scratch scratch() const {
    return {std::vector<uint16_t>(values()), std::vector<float>(values()), std::vector<float>(values())};
  }

  // The target of `row`, elements in order (row, column, channel), in scratch.target.
  const float* operator()(int64_t row, Scratch& scratch) const {
    const auto [crop, y, x] = grid_(row);
    float* target = scratch.target.data();
    if (!is_raw_) {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, crops_.scalar_type(), "pixel_loss", [&] {
        from_views<scalar_t>(crop, y, x, target);
      });
      return target;
    }
    float* planes = scratch.planes.data();
    dispatch_pixels(crops_, [&]<typename Pixel>(Pixel) {
      const at::IntArrayRef strides = crops_.strides();
      const Pixel* patch = crops_.const_data_ptr<Pixel>() + crop * strides[0] + y * strides[1] + x * strides[2];
      auto* packed = reinterpret_cast<Pixel*>(scratch.packed.data());
      copy_pixels(patch, grid_.patch_size, grid_.patch_size, channels_, strides, packed);
      pera::unpack(packed, channels_, pixels_, planes);
    });
    if (colors_.on) {
      pera::apply_colors(
          planes, channels_, rgb_, pixels_, colors_.order(crop), pera::kColorOps, colors_.factors(crop),
          colors_.mean_gray(crop));
    }
    normalise(planes, target);
    return target;
  }

 private:
  // Planes to interleaved, normalised pixels.
  void normalise(const float* __restrict__ planes, float* __restrict__ target) const {
    const int64_t n = pixels_;
    if (channels_ == 3) {
      const float r0 = center_[0], g0 = center_[1], b0 = center_[2];
      const float r1 = scale_[0], g1 = scale_[1], b1 = scale_[2];
      for (int64_t i = 0; i < n; ++i) {
        target[3 * i] = (planes[i] - r0) * r1;
        target[3 * i + 1] = (planes[n + i] - g0) * g1;
        target[3 * i + 2] = (planes[2 * n + i] - b0) * b1;
      }
      return;
    }
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t i = 0; i < n; ++i) {
        target[channels_ * i + c] = (planes[c * n + i] - center_[c]) * scale_[c];
      }
    }
  }

  template <typename In>
  void from_views(int64_t crop, int64_t y, int64_t x, float* __restrict__ target) const {
    const at::IntArrayRef strides = crops_.strides(); // of N, C, H, W
    const int64_t p = grid_.patch_size;
    for (int64_t c = 0; c < channels_; ++c) {
      const In* plane = crops_.const_data_ptr<In>() + crop * strides[0] + c * strides[1];
      for (int64_t line = 0; line < p; ++line) {
        const In* from = plane + (y + line) * strides[2] + x * strides[3];
        for (int64_t i = 0; i < p; ++i) {
          target[(line * p + i) * channels_ + c] = static_cast<float>(from[i * strides[3]]);
        }
      }
    }
  }

  const at::Tensor crops_;
  const bool is_raw_;
  const int64_t channels_, pixels_;
  const pera::Rgb rgb_;
  const Grid grid_;
  const Colors colors_;
  std::vector<float> center_, scale_;
};

// Sum of squared differences of n values.
template <typename In>
float squared_error(const In* __restrict__ pred, const float* __restrict__ target, int64_t n) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float difference = load(pred, i + lane) - target[i + lane];
      lanes[lane] += difference * difference;
    }
  }
  float total = 0.0f;
  for (; i < n; ++i) {
    const float difference = load(pred, i) - target[i];
    total += difference * difference;
  }
  return total + sum(lanes, kLanes);
}

// Sum over all rows, each row's own sum added in the order of the rows.
template <typename In>
double sum_of_rows(const In* pred, const Targets& targets) {
  const int64_t n = targets.values();
  std::vector<float> sums(targets.rows());
  at::parallel_for(0, targets.rows(), 16, [&](int64_t begin, int64_t end) {
    auto scratch = targets.scratch();
    for (int64_t row = begin; row < end; ++row) {
      sums[row] = squared_error(pred + row * n, targets(row, scratch), n);
    }
  });
  double total = 0.0;
  for (const float part : sums) {
    total += part;
  }
  return total;
}

// result = (pred - target) * scale
template <typename In>
void scaled_difference(const In* pred, const Targets& targets, float scale, In* result) {
  const int64_t n = targets.values();
  at::parallel_for(0, targets.rows(), 16, [&](int64_t begin, int64_t end) {
    auto scratch = targets.scratch();
    for (int64_t row = begin; row < end; ++row) {
      const float* __restrict__ target = targets(row, scratch);
      const In* __restrict__ in = pred + row * n;
      In* __restrict__ out = result + row * n;
      for (int64_t i = 0; i < n; ++i) {
        store(out, i, (load(in, i) - target[i]) * scale);
      }
    }
  });
}

at::Tensor checked(const at::Tensor& pred, const Targets& targets) {
  TORCH_CHECK_VALUE(
      pred.dim() == 2 && pred.size(0) == targets.rows() && pred.size(1) == targets.values(),
      "pred must be [", targets.rows(), ", ", targets.values(), "], got ", pred.sizes());
  return pred.contiguous();
}

at::Tensor pixel_loss(
    const at::Tensor& pred,
    const at::Tensor& crops,
    const at::Tensor& index,
    const std::optional<at::Tensor>& order,
    const std::optional<at::Tensor>& factors,
    const std::optional<at::Tensor>& gray_mean,
    at::ArrayRef<double> mean,
    at::ArrayRef<double> std,
    int64_t patch_size,
    at::OptionalIntArrayRef rgb) {
  const Targets targets(crops, index, order, factors, gray_mean, mean, std, patch_size, rgb);
  const at::Tensor rows = checked(pred, targets);
  double total = 0.0;
  const auto run = [&]<typename In>(In) { total = sum_of_rows(rows.const_data_ptr<In>(), targets); };
  AT_DISPATCH_SWITCH(
      rows.scalar_type(), "pixel_loss",
      AT_DISPATCH_CASE(at::kFloat, [&] { run(scalar_t()); })
      AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES([&] { run(scalar_t()); }));
  const double count = static_cast<double>(std::max<int64_t>(targets.rows(), 1));
  return at::scalar_tensor(total / count, rows.options().dtype(at::kFloat));
}

at::Tensor pixel_loss_backward(
    const at::Tensor& grad,
    const at::Tensor& pred,
    const at::Tensor& crops,
    const at::Tensor& index,
    const std::optional<at::Tensor>& order,
    const std::optional<at::Tensor>& factors,
    const std::optional<at::Tensor>& gray_mean,
    at::ArrayRef<double> mean,
    at::ArrayRef<double> std,
    int64_t patch_size,
    at::OptionalIntArrayRef rgb) {
  const Targets targets(crops, index, order, factors, gray_mean, mean, std, patch_size, rgb);
  const at::Tensor rows = checked(pred, targets);
  at::Tensor result = at::empty_like(rows);
  const double count = static_cast<double>(std::max<int64_t>(targets.rows(), 1));
  const auto scale = static_cast<float>(grad.item<double>() * 2.0 / count);
  const auto run = [&]<typename In>(In) {
    scaled_difference(rows.const_data_ptr<In>(), targets, scale, result.mutable_data_ptr<In>());
  };
  AT_DISPATCH_SWITCH(
      rows.scalar_type(), "pixel_loss_backward",
      AT_DISPATCH_CASE(at::kFloat, [&] { run(scalar_t()); })
      AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES([&] { run(scalar_t()); }));
  return result;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def(
      "pixel_loss(Tensor pred, Tensor crops, Tensor index, Tensor? order, Tensor? factors, Tensor? gray_mean, "
      "float[] mean, float[] std, int patch_size, int[]? rgb=None) -> Tensor");
  m.def(
      "pixel_loss_backward(Tensor grad, Tensor pred, Tensor crops, Tensor index, Tensor? order, Tensor? factors, "
      "Tensor? gray_mean, float[] mean, float[] std, int patch_size, int[]? rgb=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("pixel_loss", &pixel_loss);
  m.impl("pixel_loss_backward", &pixel_loss_backward);
}
