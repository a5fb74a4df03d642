// Native CPU kernels of `visible_patches` and `contrast_mean`; arguments and results are those of op.py.
//
// A patch (16x16x3: 768 bytes) is copied out of the crop, unpacked into planes, coloured in the L1 cache and written
// once. One thread owns a row, or a tile of a crop, and partial sums are added in a fixed order: equal bits for any
// number of threads.

#include <optional>
#include <type_traits>
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
using patches::store;
using patches::sum;

constexpr int64_t kTilePixels = 2048; // of contrast_mean: 24 KiB of planes

// Sum of the gray of a few lines of one crop, after `steps` operations of its order.
template <typename Pixel>
float tile_gray(
    const Pixel* pixels,
    int64_t rows,
    Ints sizes, // of N, H, W, C
    Ints strides,
    const Rgb& rgb,
    const int32_t* order,
    int steps,
    const float* factors,
    std::vector<Pixel>& packed,
    std::vector<float>& planes) {
  const int64_t columns = sizes[2], channels = sizes[3], n = rows * columns;
  packed.resize(n * channels);
  planes.resize(n * (channels + 1));
  copy_pixels(pixels, rows, columns, channels, strides, packed.data());
  unpack(packed.data(), channels, n, planes.data());
  apply_colors(planes.data(), channels, rgb, n, order, steps, factors, 0.0f);
  float* gray = planes.data() + n * channels;
  gray_plane(planes.data(), channels, rgb, n, gray);
  return sum(gray, n);
}

Tensor contrast_mean(
    const Tensor& crops,
    const Tensor& order,
    const Tensor& factors,
    std::optional<Ints> rgb_channels) {
  check_value(crops.dim() == 4 && is_raw(crops.scalar_type()), "crops must be uint8 or uint16 [N, H, W, C]");
  const Rgb rgb = color_channels(crops.size(3), rgb_channels);
  const int64_t count = crops.size(0), height = crops.size(1), width = crops.size(2);
  const Ints sizes = crops.sizes(), strides = crops.strides();
  const Colors colors(order, factors, std::nullopt);
  Tensor means = new_zeros(crops, {count}, ScalarType::Float);
  const int64_t tile_rows = std::max<int64_t>(1, kTilePixels / std::max<int64_t>(width, 1));
  const int64_t tiles = (height + tile_rows - 1) / tile_rows;

  // Only crops whose order holds contrast are read; `steps` operations come before it.
  std::vector<int64_t> wanted;
  std::vector<int> steps;
  for (int64_t crop = 0; crop < count; ++crop) {
    const int32_t* codes = colors.order(crop);
    const int32_t* place = std::find(codes, codes + kColorOps, static_cast<int32_t>(kContrast));
    if (place != codes + kColorOps) {
      wanted.push_back(crop);
      steps.push_back(static_cast<int>(place - codes));
    }
  }
  std::vector<float> sums(wanted.size() * tiles);
  dispatch_pixels(crops.scalar_type(), [&]<typename Pixel>(Pixel) {
    const Pixel* pixels = crops.const_data_ptr<Pixel>();
    parallel_for(0, static_cast<int64_t>(sums.size()), 4, [&](int64_t begin, int64_t end) {
      std::vector<Pixel> packed;
      std::vector<float> planes;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t crop = wanted[i / tiles], top = i % tiles * tile_rows;
        const Pixel* tile = pixels + crop * strides[0] + top * strides[1];
        const int64_t rows = std::min(tile_rows, height - top);
        sums[i] = tile_gray(
            tile, rows, sizes, strides, rgb, colors.order(crop), steps[i / tiles], colors.factors(crop), packed,
            planes);
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
    const Tensor& crops, // [N, H, W, C]
    const Grid& grid,
    const Rgb& rgb,
    const Colors& colors,
    Doubles mean,
    Doubles std,
    Tensor& rows) {
  const int64_t p = grid.patch_size, channels = crops.size(3), n = p * p;
  const Ints strides = crops.strides();
  const Pixel* pixels = crops.const_data_ptr<Pixel>();
  Out* result = rows.mutable_data_ptr<Out>();
  parallel_for(0, rows.size(0), 16, [&](int64_t begin, int64_t end) {
    std::vector<Pixel> packed(n * channels);
    std::vector<float> planes(n * channels);
    for (int64_t row = begin; row < end; ++row) {
      const auto [crop, y, x] = grid(row);
      const Pixel* patch = pixels + crop * strides[0] + y * strides[1] + x * strides[2];
      copy_pixels(patch, p, p, channels, strides, packed.data());
      unpack(packed.data(), channels, n, planes.data());
      if (colors.on) {
        apply_colors(
            planes.data(), channels, rgb, n, colors.order(crop), kColorOps, colors.factors(crop),
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
void rows_of_floats(const Tensor& crops, const Grid& grid, Tensor& rows) { // crops: [N, C, H, W]
  const int64_t p = grid.patch_size, channels = crops.size(1);
  const int64_t sn = crops.stride(0), sc = crops.stride(1), sy = crops.stride(2), sx = crops.stride(3);
  const In* pixels = crops.const_data_ptr<In>();
  Out* result = rows.mutable_data_ptr<Out>();
  parallel_for(0, rows.size(0), 16, [&](int64_t begin, int64_t end) {
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

Tensor visible_patches(
    const Tensor& crops,
    const Tensor& index,
    const std::optional<Tensor>& order,
    const std::optional<Tensor>& factors,
    const std::optional<Tensor>& gray_mean,
    Doubles mean,
    Doubles std,
    int64_t patch_size,
    ScalarType dtype,
    std::optional<Ints> rgb_channels) {
  check_value(crops.dim() == 4 && index.dim() == 2 && index.size(0) == crops.size(0), "index must be [N, n]");
  const bool raw = is_raw(crops.scalar_type());
  const int64_t height = crops.size(raw ? 1 : 2), width = crops.size(raw ? 2 : 3);
  const int64_t channels = crops.size(raw ? 3 : 1);
  check_value(
      patch_size > 0 && height % patch_size == 0 && width % patch_size == 0, "crops must be whole patches");
  const Grid grid(index, height, width, patch_size);
  Tensor rows = new_empty(crops, {grid.rows, channels * patch_size * patch_size}, dtype);
  if (!raw) {
    dispatch_with_double(crops.scalar_type(), "visible_patches", [&]<typename In>(In) {
      dispatch_with_double(dtype, "visible_patches", [&]<typename Out>(Out) {
        rows_of_floats<In, Out>(crops, grid, rows);
      });
    });
    return rows;
  }
  const auto per_channel = static_cast<size_t>(channels);
  check_value(mean.size() == per_channel && std.size() == per_channel, "mean and std must have a value a channel");
  const bool jitters = order.has_value() && factors.has_value();
  std::optional<Tensor> means;
  if (jitters) {
    means = gray_mean ? *gray_mean : contrast_mean(crops, *order, *factors, rgb_channels);
  }
  const Colors colors(order, factors, means);
  const Rgb rgb = color_channels(channels, rgb_channels);
  dispatch_with_double(dtype, "visible_patches", [&]<typename Out>(Out) {
    dispatch_pixels(crops.scalar_type(), [&]<typename Pixel>(Pixel) {
      rows_of_pixels<Pixel, Out>(crops, grid, rgb, colors, mean, std, rows);
    });
  });
  return rows;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def("contrast_mean(Tensor crops, Tensor order, Tensor factors, int[]? rgb=None) -> Tensor");
  m.def(
      "visible_patches(Tensor crops, Tensor index, Tensor? order, Tensor? factors, Tensor? gray_mean, "
      "float[] mean, float[] std, int patch_size, ScalarType dtype, int[]? rgb=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("contrast_mean", TORCH_BOX(&contrast_mean));
  m.impl("visible_patches", TORCH_BOX(&visible_patches));
}

} // namespace pera
