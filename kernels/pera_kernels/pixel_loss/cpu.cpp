// Native CPU kernels of `pixel_loss`; arguments and results are those of op.py.
//
// The target of one row at a time is made in the L1 cache: the patch's own pixels, coloured as in visible_patches, in the
// order of `pred`. Every row has one sum; the sums are added in the order of the rows: equal bits for any number of
// threads. The backward makes the targets again and writes the gradient once.

#include <algorithm>
#include <optional>
#include <vector>

#include "tensors.h"
#include "visible_patches/color.h"
#include "visible_patches/patches.h"

namespace pera {
namespace {

using patches::Colors;
using patches::Grid;
using patches::color_channels;
using patches::copy_pixels;
using patches::dispatch_pixels;
using patches::is_raw;
using patches::kLanes;
using patches::load;
using patches::store;
using patches::sum;

// Everything but `pred`, checked, and the targets that follow from it.
class Targets {
 public:
  Targets(
      const Tensor& crops,
      const Tensor& index,
      const std::optional<Tensor>& order,
      const std::optional<Tensor>& factors,
      const std::optional<Tensor>& gray_mean,
      Doubles mean,
      Doubles std,
      int64_t patch_size,
      std::optional<Ints> rgb)
      : crops_(crops),
        dtype_(crops.scalar_type()),
        data_(crops.const_data_ptr()),
        strides_(crops.strides()),
        is_raw_(is_raw(dtype_)),
        channels_(crops.size(is_raw_ ? 3 : 1)),
        pixels_(patch_size * patch_size),
        rgb_(color_channels(channels_, rgb)),
        grid_(index, crops.size(is_raw_ ? 1 : 2), crops.size(is_raw_ ? 2 : 3), patch_size),
        colors_(order, factors, gray_mean) {
    if (!is_raw_) {
      dispatch_with_double(dtype_, "pixel_loss", [](auto) {}); // raises here, as it must not in a thread
    }
    const auto per_channel = static_cast<size_t>(channels_);
    check_value(
        !is_raw_ || (mean.size() == per_channel && std.size() == per_channel),
        "mean and std must have a value a channel");
    check_value(!colors_.on || gray_mean.has_value(), "gray_mean must come with order");
    for (size_t c = 0; is_raw_ && c < per_channel; ++c) {
      center_.push_back(static_cast<float>(mean[c]));
      scale_.push_back(static_cast<float>(1.0 / std[c]));
    }
  }

  int64_t rows() const {
    return grid_.rows;
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
      dispatch_with_double(dtype_, "pixel_loss", [&]<typename In>(In) { from_views<In>(crop, y, x, target); });
      return target;
    }
    float* planes = scratch.planes.data();
    dispatch_pixels(dtype_, [&]<typename Pixel>(Pixel) {
      const auto* pixels = static_cast<const Pixel*>(data_);
      const Pixel* patch = pixels + crop * strides_[0] + y * strides_[1] + x * strides_[2];
      auto* packed = reinterpret_cast<Pixel*>(scratch.packed.data());
      copy_pixels(patch, grid_.patch_size, grid_.patch_size, channels_, strides_, packed);
      unpack(packed, channels_, pixels_, planes);
    });
    if (colors_.on) {
      apply_colors(
          planes, channels_, rgb_, pixels_, colors_.order(crop), kColorOps, colors_.factors(crop),
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
    const int64_t p = grid_.patch_size;
    for (int64_t c = 0; c < channels_; ++c) {
      const In* plane = static_cast<const In*>(data_) + crop * strides_[0] + c * strides_[1];
      for (int64_t line = 0; line < p; ++line) {
        const In* from = plane + (y + line) * strides_[2] + x * strides_[3];
        for (int64_t i = 0; i < p; ++i) {
          target[(line * p + i) * channels_ + c] = static_cast<float>(from[i * strides_[3]]);
        }
      }
    }
  }

  const Tensor crops_; // asked once for what follows, and not in every row
  const ScalarType dtype_;
  const void* const data_;
  const Ints strides_; // of N, H, W, C, or of N, C, H, W
  const bool is_raw_;
  const int64_t channels_, pixels_;
  const Rgb rgb_;
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
  parallel_for(0, targets.rows(), 16, [&](int64_t begin, int64_t end) {
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
  parallel_for(0, targets.rows(), 16, [&](int64_t begin, int64_t end) {
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

Tensor checked(const Tensor& pred, const Targets& targets) {
  check_value(
      pred.dim() == 2 && pred.size(0) == targets.rows() && pred.size(1) == targets.values(),
      "pred must be [", targets.rows(), ", ", targets.values(), "], got ", pred.sizes());
  return as_contiguous(pred);
}

Tensor pixel_loss(
    const Tensor& pred,
    const Tensor& crops,
    const Tensor& index,
    const std::optional<Tensor>& order,
    const std::optional<Tensor>& factors,
    const std::optional<Tensor>& gray_mean,
    Doubles mean,
    Doubles std,
    int64_t patch_size,
    std::optional<Ints> rgb) {
  const Targets targets(crops, index, order, factors, gray_mean, mean, std, patch_size, rgb);
  const Tensor rows = checked(pred, targets);
  double total = 0.0;
  dispatch(rows.scalar_type(), "pixel_loss", [&]<typename In>(In) {
    total = sum_of_rows(rows.const_data_ptr<In>(), targets);
  });
  const double count = static_cast<double>(std::max<int64_t>(targets.rows(), 1));
  Tensor loss = new_empty(rows, {}, ScalarType::Float);
  *loss.mutable_data_ptr<float>() = static_cast<float>(total / count);
  return loss;
}

Tensor pixel_loss_backward(
    const Tensor& grad,
    const Tensor& pred,
    const Tensor& crops,
    const Tensor& index,
    const std::optional<Tensor>& order,
    const std::optional<Tensor>& factors,
    const std::optional<Tensor>& gray_mean,
    Doubles mean,
    Doubles std,
    int64_t patch_size,
    std::optional<Ints> rgb) {
  const Targets targets(crops, index, order, factors, gray_mean, mean, std, patch_size, rgb);
  const Tensor rows = checked(pred, targets);
  check_value(grad.numel() == 1, "grad must be one value");
  Tensor result = empty_like(rows);
  const double count = static_cast<double>(std::max<int64_t>(targets.rows(), 1));
  const auto scale = static_cast<float>(*as_type(grad, ScalarType::Double).const_data_ptr<double>() * 2.0 / count);
  dispatch(rows.scalar_type(), "pixel_loss_backward", [&]<typename In>(In) {
    scaled_difference(rows.const_data_ptr<In>(), targets, scale, result.mutable_data_ptr<In>());
  });
  return result;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def(
      "pixel_loss(Tensor pred, Tensor crops, Tensor index, Tensor? order, Tensor? factors, Tensor? gray_mean, "
      "float[] mean, float[] std, int patch_size, int[]? rgb=None) -> Tensor");
  m.def(
      "pixel_loss_backward(Tensor grad, Tensor pred, Tensor crops, Tensor index, Tensor? order, Tensor? factors, "
      "Tensor? gray_mean, float[] mean, float[] std, int patch_size, int[]? rgb=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("pixel_loss", TORCH_BOX(&pixel_loss));
  m.impl("pixel_loss_backward", TORCH_BOX(&pixel_loss_backward));
}

} // namespace pera
