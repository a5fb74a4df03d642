// Native CPU kernels of `visible_patches` and `contrast_mean`; arguments and results are those of op.py.
//
// A patch (16x16x3: 768 bytes) is copied out of the crop, unpacked into planes, coloured in the L1 cache and written
// once. One thread owns a row, or a tile of a crop, and partial sums are added in a fixed order: equal bits for any
// number of threads.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>
#include <type_traits>
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
using pera::patches::store;
using pera::patches::sum;
using pera::Rgb;

constexpr int64_t kTilePixels = 2048; // of contrast_mean: 24 KiB of planes

// Sum of the gray of a few lines of one crop, after `steps` operations of its order.
template <typename Pixel>
float tile_gray(
    const Pixel* pixels,
    int64_t rows,
    const at::Tensor& crops,
    const Rgb& rgb,
    const int32_t* order,
    int steps,
    const float* factors,
    std::vector<Pixel>& packed,
    std::vector<float>& planes) {
  const int64_t columns = crops.size(2), channels = crops.size(3), n = rows * columns;
  packed.resize(n * channels);
  planes.resize(n * (channels + 1));
  copy_pixels(pixels, rows, columns, channels, crops.strides(), packed.data());
  pera::unpack(packed.data(), channels, n, planes.data());
  pera::apply_colors(planes.data(), channels, rgb, n, order, steps, factors, 0.0f);
  float* gray = planes.data() + n * channels;
  pera::gray_plane(planes.data(), channels, rgb, n, gray);
  return sum(gray, n);
}

at::Tensor contrast_mean(
    const at::Tensor& crops,
    const at::Tensor& order,
    const at::Tensor& factors,
    at::OptionalIntArrayRef rgb_channels) {
  TORCH_CHECK_VALUE(crops.dim() == 4 && is_raw(crops), "crops must be uint8 or uint16 [N, H, W, C]");
  const Rgb rgb = color_channels(crops.size(3), rgb_channels);
  const int64_t count = crops.size(0), height = crops.size(1), width = crops.size(2);
  const Colors colors(order, factors, at::Tensor());
  at::Tensor means = at::zeros({count}, crops.options().dtype(at::kFloat));
  const int64_t tile_rows = std::max<int64_t>(1, kTilePixels / std::max<int64_t>(width, 1));
  const int64_t tiles = (height + tile_rows - 1) / tile_rows;

  // Only crops whose order holds contrast are read; `steps` operations come before it.
  std::vector<int64_t> wanted;
  std::vector<int> steps;
  for (int64_t crop = 0; crop < count; ++crop) {
    const int32_t* codes = colors.order(crop);
    const int32_t* place = std::find(codes, codes + pera::kColorOps, static_cast<int32_t>(pera::kContrast));
    if (place != codes + pera::kColorOps) {
      wanted.push_back(crop);
      steps.push_back(static_cast<int>(place - codes));
    }
  }
  std::vector<float> sums(wanted.size() * tiles);
  dispatch_pixels(crops, [&]<typename Pixel>(Pixel) {
    const Pixel* pixels = crops.const_data_ptr<Pixel>();
    at::parallel_for(0, static_cast<int64_t>(sums.size()), 4, [&](int64_t begin, int64_t end) {
      std::vector<Pixel> packed;
      std::vector<float> planes;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t crop = wanted[i / tiles], top = i % tiles * tile_rows;
        const Pixel* tile = pixels + crop * crops.stride(0) + top * crops.stride(1);
        const int64_t rows = std::min(tile_rows, height - top);
        sums[i] = tile_gray(
            tile, rows, crops, rgb, colors.order(crop), steps[i / tiles], colors.factors(crop), packed, planes);
      }
    });
  });
  float* out = means.mutable_data_ptr<float>();
  for (size_t i = 0; i < wanted.size(); ++i) {
    double total = 0.0;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      total += sums[i * tiles + tile];
    }
    out[wanted[i]] = static_cast<float>(total / static_cast<double>(height * width));
  }
  return means;
}

template <typename Pixel, typename Out>
void rows_of_pixels(
    const at::Tensor& crops, // [N, H, W, C]
    const Grid& grid,
    const Rgb& rgb,
    const Colors& colors,
    at::ArrayRef<double> mean,
    at::ArrayRef<double> std,
    at::Tensor& rows) {
  const int64_t p = grid.patch_size, channels = crops.size(3), n = p * p;
  const Pixel* pixels = crops.const_data_ptr<Pixel>();
  Out* result = rows.mutable_data_ptr<Out>();
  at::parallel_for(0, rows.size(0), 16, [&](int64_t begin, int64_t end) {
    std::vector<Pixel> packed(n * channels);
    std::vector<float> planes(n * channels);
    for (int64_t row = begin; row < end; ++row) {
      const auto [crop, y, x] = grid(row);
      const Pixel* patch = pixels + crop * crops.stride(0) + y * crops.stride(1) + x * crops.stride(2);
      copy_pixels(patch, p, p, channels, crops.strides(), packed.data());
      pera::unpack(packed.data(), channels, n, planes.data());
      if (colors.on) {
        pera::apply_colors(
            planes.data(), channels, rgb, n, colors.order(crop), pera::kColorOps, colors.factors(crop),
            colors.mean_gray(crop));
      }
      for (int64_t c = 0; c < channels; ++c) {
        const float center = static_cast<float>(mean[c]), scale = static_cast<float>(1.0 / std[c]);
        const float* __restrict__ plane = planes.data() + c * n;
        Out* __restrict__ out = result + (row * channels + c) * n;
        for (int64_t i = 0; i < n; ++i) {
          store(out, i, (plane[i] - center) * scale);
        }
      }
    }
  });
}

template <typename In, typename Out>
void rows_of_floats(const at::Tensor& crops, const Grid& grid, at::Tensor& rows) { // crops: [N, C, H, W]
  const int64_t p = grid.patch_size, channels = crops.size(1);
  const int64_t sn = crops.stride(0), sc = crops.stride(1), sy = crops.stride(2), sx = crops.stride(3);
  const In* pixels = crops.const_data_ptr<In>();
  Out* result = rows.mutable_data_ptr<Out>();
  at::parallel_for(0, rows.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const auto [crop, y, x] = grid(row);
      Out* __restrict__ out = result + row * channels * p * p;
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t line = 0; line < p; ++line, out += p) {
          const In* __restrict__ from = pixels + crop * sn + c * sc + (y + line) * sy + x * sx;
          for (int64_t i = 0; i < p; ++i) {
            if constexpr (std::is_same_v<In, Out>) {
              out[i] = from[i * sx];
            } else {
              store(out, i, static_cast<float>(from[i * sx]));
            }
          }
        }
      }
    }
  });
}

at::Tensor visible_patches(
    const at::Tensor& crops,
    const at::Tensor& index,
    const std::optional<at::Tensor>& order,
    const std::optional<at::Tensor>& factors,
    const std::optional<at::Tensor>& gray_mean,
    at::ArrayRef<double> mean,
    at::ArrayRef<double> std,
    int64_t patch_size,
    at::ScalarType dtype,
    at::OptionalIntArrayRef rgb_channels) {
  TORCH_CHECK_VALUE(crops.dim() == 4 && index.dim() == 2 && index.size(0) == crops.size(0), "index must be [N, n]");
  const bool raw = is_raw(crops);
  const int64_t height = crops.size(raw ? 1 : 2), width = crops.size(raw ? 2 : 3);
  const int64_t channels = crops.size(raw ? 3 : 1);
  TORCH_CHECK_VALUE(
      patch_size > 0 && height % patch_size == 0 && width % patch_size == 0, "crops must be whole patches");
  const Grid grid(index, height, width, patch_size);
  at::Tensor rows = at::empty({index.numel(), channels * patch_size * patch_size}, crops.options().dtype(dtype));
  if (!raw) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, crops.scalar_type(), "visible_patches", [&] {
      using In = scalar_t;
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "visible_patches", [&] {
        rows_of_floats<In, scalar_t>(crops, grid, rows);
      });
    });
    return rows;
  }
  const auto per_channel = static_cast<size_t>(channels);
  TORCH_CHECK_VALUE(mean.size() == per_channel && std.size() == per_channel, "mean and std must have a value a channel");
  const bool jitters = order.has_value() && factors.has_value();
  const at::Tensor means = !jitters ? at::Tensor() : gray_mean ? *gray_mean : contrast_mean(crops, *order, *factors, rgb_channels);
  const Colors colors(order, factors, means);
  const Rgb rgb = color_channels(channels, rgb_channels);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "visible_patches", [&] {
    using Out = scalar_t;
    dispatch_pixels(crops, [&]<typename Pixel>(Pixel) {
      rows_of_pixels<Pixel, Out>(crops, grid, rgb, colors, mean, std, rows);
    });
  });
  return rows;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def("contrast_mean(Tensor crops, Tensor order, Tensor factors, int[]? rgb=None) -> Tensor");
  m.def(
      "visible_patches(Tensor crops, Tensor index, Tensor? order, Tensor? factors, Tensor? gray_mean, "
      "float[] mean, float[] std, int patch_size, ScalarType dtype, int[]? rgb=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("contrast_mean", &contrast_mean);
  m.impl("visible_patches", &visible_patches);
}
