// What the native kernels of visible_patches and pixel_loss share: arguments as the loops read them, and half types.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <type_traits>

#include "visible_patches/color.h"

namespace pera::patches {

constexpr int64_t kLanes = 16; // partial sums that a compiler may keep in vector registers

// Whether crops are integer pixels [N, H, W, C]; else they are views [N, C, H, W] that are normalised already.
inline bool is_raw(const at::Tensor& crops) {
  return crops.scalar_type() == at::kByte || crops.scalar_type() == at::kUInt16;
}

// Calls `run` with a value of the crops' pixel type.
template <typename Run>
inline void dispatch_pixels(const at::Tensor& crops, const Run& run) {
  if (crops.scalar_type() == at::kByte) {
    run(uint8_t());
  } else {
    run(uint16_t());
  }
}

// The argument `rgb` of the ops; without it the three channels of three are red, green and blue.
inline Rgb color_channels(int64_t channels, at::OptionalIntArrayRef rgb) {
  if (!rgb.has_value()) {
    return {channels == 3};
  }
  if (rgb->empty()) {
    return {};
  }
  TORCH_CHECK_VALUE(rgb->size() == 3, "rgb must be three numbers or []");
  for (const int64_t channel : *rgb) {
    TORCH_CHECK_VALUE(channel >= 0 && channel < channels, "rgb must be in [0, ", channels, ")");
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
  if constexpr (std::is_same_v<In, at::BFloat16>) {
    return std::bit_cast<float>(static_cast<uint32_t>(in[i].x) << 16);
  } else {
    return static_cast<float>(in[i]);
  }
}

template <typename Out>
inline void store(Out* out, int64_t i, float x) {
  if constexpr (std::is_same_v<Out, at::BFloat16>) {
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
    at::IntArrayRef strides, // of N, H, W, C
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

// Colour arguments in the types that the kernels read; `on` is false for crops that stay as they are.
struct Colors {
  Colors(const std::optional<at::Tensor>& order, const std::optional<at::Tensor>& factors, const at::Tensor& mean_gray)
      : on(order.has_value() && factors.has_value()) {
    if (on) {
      order_ = order->to(at::kInt).contiguous();
      factors_ = factors->to(at::kFloat).contiguous();
      TORCH_CHECK_VALUE(order_.dim() == 2 && order_.size(1) == kColorOps, "order must be [N, 4]");
      TORCH_CHECK_VALUE(factors_.sizes() == order_.sizes(), "factors must be [N, 4], as order");
    }
    if (mean_gray.defined()) {
      mean_gray_ = mean_gray.to(at::kFloat).contiguous();
    }
  }
  const int32_t* order(int64_t crop) const {
    return order_.const_data_ptr<int32_t>() + crop * kColorOps;
  }
  const float* factors(int64_t crop) const {
    return factors_.const_data_ptr<float>() + crop * kColorOps;
  }
  float mean_gray(int64_t crop) const {
    return mean_gray_.defined() ? mean_gray_.const_data_ptr<float>()[crop] : 0.0f;
  }
  const bool on;

 private:
  at::Tensor order_, factors_, mean_gray_;
};

// Which crop a row of the result belongs to and where its patch begins. Numbers outside the grid raise.
struct Grid {
  Grid(const at::Tensor& index_, int64_t height, int64_t width, int64_t patch_size)
      : index(index_.to(at::kLong).contiguous()),
        per_crop(index.size(1)),
        columns(width / patch_size),
        patches(height / patch_size * columns),
        patch_size(patch_size) {
    const int64_t* values = index.const_data_ptr<int64_t>();
    int64_t low = 0, high = 0;
    for (int64_t i = 0; i < index.numel(); ++i) {
      low = std::min(low, values[i]);
      high = std::max(high, values[i]);
    }
    TORCH_CHECK_VALUE(
        low >= 0 && high < patches, "index must be in [0, ", patches, "), got values from ", low, " to ", high);
  }
  struct Place {
    int64_t crop, y, x;
  };
  Place operator()(int64_t row) const {
    const int64_t patch = index.const_data_ptr<int64_t>()[row];
    return {row / per_crop, patch / columns * patch_size, patch % columns * patch_size};
  }
  const at::Tensor index;
  const int64_t per_crop, columns, patches, patch_size;
};

} // namespace pera::patches
