// What the native kernels of visible_patches and pixel_loss share: arguments as the loops read them, and half types.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <type_traits>

#include "tensors.h"
#include "visible_patches/color.h"

namespace pera::patches {

constexpr int64_t kLanes = 16; // partial sums that a compiler may keep in vector registers

// Whether crops of that dtype are integer pixels [N, H, W, C]; else they are views [N, C, H, W], normalised already.
inline bool is_raw(ScalarType dtype) {
  return dtype == ScalarType::Byte || dtype == ScalarType::UInt16;
}

// Calls `run` with a value of the pixel type of raw crops.
template <typename Run>
inline void dispatch_pixels(ScalarType dtype, const Run& run) {
  if (dtype == ScalarType::Byte) {
    run(uint8_t());
  } else {
    run(uint16_t());
  }
}

// The argument `rgb` of the ops; without it the three channels of three are red, green and blue.
inline Rgb color_channels(int64_t channels, std::optional<Ints> rgb) {
  if (!rgb.has_value()) {
    return {channels == 3};
  }
  if (rgb->empty()) {
    return {};
  }
  check_value(rgb->size() == 3, "rgb must be three numbers or []");
  for (const int64_t channel : *rgb) {
    check_value(channel >= 0 && channel < channels, "rgb must be in [0, ", channels, ")");
  }
  return {true, (*rgb)[0], (*rgb)[1], (*rgb)[2]};
}

// Round to nearest even, as c10::BFloat16 does, in a form that vectorises.
inline uint16_t to_bfloat16_bits(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

// From half types to float, in a form that vectorises.
template <typename In>
inline float load(const In* in, int64_t i) {
  if constexpr (std::is_same_v<In, BFloat16>) {
    return std::bit_cast<float>(static_cast<uint32_t>(in[i].x) << 16);
  } else {
    return static_cast<float>(in[i]);
  }
}

template <typename Out>
inline void store(Out* out, int64_t i, float x) {
  if constexpr (std::is_same_v<Out, BFloat16>) {
    out[i].x = to_bfloat16_bits(x);
  } else {
    out[i] = static_cast<Out>(x);
  }
}

// `rows` lines of `columns` pixels of an NHWC image, wherever they lie, to packed ones.
template <typename Pixel>
inline void copy_pixels(
    const Pixel* from,
    int64_t rows,
    int64_t columns,
    int64_t channels,
    Ints strides, // of N, H, W, C
    Pixel* to) {
  const bool is_packed = strides[3] == 1 && strides[2] == channels;
  for (int64_t y = 0; y < rows; ++y, from += strides[1]) {
    if (is_packed) {
      std::memcpy(to, from, columns * channels * sizeof(Pixel));
      to += columns * channels;
      continue;
    }
    for (int64_t x = 0; x < columns; ++x) {
      for (int64_t c = 0; c < channels; ++c) {
        *to++ = from[x * strides[2] + c * strides[3]];
      }
    }
  }
}

// In a fixed order: equal bits on every run.
inline float sum(const float* x, int64_t n) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += x[i + lane];
    }
  }
  float total = 0.0f;
  for (; i < n; ++i) {
    total += x[i];
  }
  for (float lane : lanes) {
    total += lane;
  }
  return total;
}

// Colour arguments in the types that the kernels read; `on` is false for crops that stay as they are. The pointers are
// taken once, as asking a tensor for one in every row of a loop costs time.
struct Colors {
  Colors(
      const std::optional<Tensor>& order,
      const std::optional<Tensor>& factors,
      const std::optional<Tensor>& mean_gray)
      : on(order.has_value() && factors.has_value()) {
    if (on) {
      order_ = as_contiguous(*order, ScalarType::Int);
      factors_ = as_contiguous(*factors, ScalarType::Float);
      check_value(order_.dim() == 2 && order_.size(1) == kColorOps, "order must be [N, 4]");
      check_value(equal(factors_.sizes(), order_.sizes()), "factors must be [N, 4], as order");
      order_values_ = order_.const_data_ptr<int32_t>();
      factor_values_ = factors_.const_data_ptr<float>();
    }
    if (mean_gray) {
      mean_gray_ = as_contiguous(*mean_gray, ScalarType::Float);
      mean_gray_values_ = mean_gray_.const_data_ptr<float>();
    }
  }
  const int32_t* order(int64_t crop) const {
    return order_values_ + crop * kColorOps;
  }
  const float* factors(int64_t crop) const {
    return factor_values_ + crop * kColorOps;
  }
  float mean_gray(int64_t crop) const {
    return mean_gray_values_ ? mean_gray_values_[crop] : 0.0f;
  }
  const bool on;

 private:
  Tensor order_, factors_, mean_gray_;
  const int32_t* order_values_ = nullptr;
  const float *factor_values_ = nullptr, *mean_gray_values_ = nullptr;
};

// Which crop a row of the result belongs to and where its patch begins. Numbers outside the grid raise.
struct Grid {
  Grid(const Tensor& index_, int64_t height, int64_t width, int64_t patch_size)
      : index(as_contiguous(index_, ScalarType::Long)),
        numbers(index.const_data_ptr<int64_t>()),
        rows(index.numel()),
        per_crop(index.size(1)),
        columns(width / patch_size),
        patches(height / patch_size * columns),
        patch_size(patch_size) {
    int64_t low = 0, high = 0;
    for (int64_t i = 0; i < rows; ++i) {
      low = std::min(low, numbers[i]);
      high = std::max(high, numbers[i]);
    }
    check_value(
        low >= 0 && high < patches, "index must be in [0, ", patches, "), got values from ", low, " to ", high);
  }
  struct Place {
    int64_t crop, y, x;
  };
  Place operator()(int64_t row) const {
    const int64_t patch = numbers[row];
    return {row / per_crop, patch / columns * patch_size, patch % columns * patch_size};
  }
  const Tensor index;
  const int64_t* const numbers; // of the patches: the values of index
  const int64_t rows, per_crop, columns, patches, patch_size;
};

} // namespace pera::patches
