// Native CPU kernel of `crop_resize`; arguments and results are those of dispatch.py.
//
// One line of the result at a time: the lines of the window that it is made of are summed into a line of floats, which
// stays in the cache, and that is then narrowed. Lanes run over the values of a line downwards, and over a pixel's
// channels sideways. One thread: the loader's threads each have an image of their own.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "tensors.h"

namespace pera {
namespace {

#ifdef __AVX2__
inline Floats as_floats(const uint8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

inline Floats as_floats(const uint16_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(read<__m128i>(from)));
}
#else
template <typename Pixel>
inline Floats as_floats(const Pixel* from) {
  Floats value;
  for (int64_t i = 0; i < kLanes; ++i) {
    value[i] = static_cast<float>(from[i]);
  }
  return value;
}
#endif

// What each place of a crop's line is made of: `count` values of the window from `first` on, by weight; a triangle of
// twice the window's share of a pixel, or of two of the window's pixels where that is more.
struct Taps {
  int64_t count = 0;
  std::vector<int64_t> first;
  std::vector<float> weights; // [places, count]

  Taps(int64_t window, int64_t side, bool flip) : first(side) {
    const double scale = static_cast<double>(window) / static_cast<double>(side);
    const double reach = std::max(scale, 1.0);
    count = std::min(window, static_cast<int64_t>(std::ceil(2.0 * reach)));
    weights.resize(side * count);
    std::vector<double> exact(count);
    for (int64_t place = 0; place < side; ++place) {
      const double center = scale * (static_cast<double>(flip ? side - 1 - place : place) + 0.5);
      const auto low = static_cast<int64_t>(std::ceil(center - reach - 0.5));
      const int64_t start = std::clamp<int64_t>(low, 0, window - count);
      double total = 0.0;
      for (int64_t i = 0; i < count; ++i) {
        const double distance = std::abs(static_cast<double>(start + i) + 0.5 - center);
        total += exact[i] = std::max(0.0, 1.0 - distance / reach);
      }
      for (int64_t i = 0; i < count; ++i) {
        weights[place * count + i] = static_cast<float>(exact[i] / total);
      }
      first[place] = start;
    }
  }
};

// line[i] = sum over the taps of weight * pixels[tap * stride + i], i < n
template <typename Pixel>
void sum_lines(const Pixel* pixels, int64_t stride, const float* weights, int64_t taps, int64_t n, float* line) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Floats total = {};
    for (int64_t tap = 0; tap < taps; ++tap) {
      total += weights[tap] * as_floats(pixels + tap * stride + i);
    }
    store(line + i, total);
  }
  for (; i < n; ++i) {
    float total = 0.0f;
    for (int64_t tap = 0; tap < taps; ++tap) {
      total += weights[tap] * static_cast<float>(pixels[tap * stride + i]);
    }
    line[i] = total;
  }
}

// out[place * channels + c] = sum over the taps of weight * line[(first + tap) * channels + c]. What lanes write beyond
// a pixel's channels the next pixel overwrites, so both lines are kLanes longer than what they hold.
template <int64_t kChannels>
void narrow(const float* line, const Taps& taps, int64_t channels, float* out) {
  const int64_t pixel = kChannels ? kChannels : channels, side = static_cast<int64_t>(taps.first.size());
  for (int64_t place = 0; place < side; ++place, out += pixel) {
    const float* from = line + taps.first[place] * pixel;
    const float* weights = taps.weights.data() + place * taps.count;
    for (int64_t c = 0; c < pixel; c += kLanes) {
      Floats total = {};
      for (int64_t tap = 0; tap < taps.count; ++tap) {
        total += weights[tap] * load(from + tap * pixel + c);
      }
      store(out + c, total);
    }
  }
}

template <typename Pixel>
void round_line(const float* __restrict__ line, int64_t n, Pixel* __restrict__ out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<Pixel>(static_cast<int32_t>(line[i] + 0.5f));
  }
}

template <typename Pixel>
void resize(const Tensor& window, bool flip_y, bool flip_x, Tensor& out) {
  const int64_t height = window.size(0), width = window.size(1), channels = window.size(2), side = out.size(0);
  const Taps down(height, side, flip_y), across(width, out.size(1), flip_x);
  const Pixel* pixels = window.const_data_ptr<Pixel>();
  Pixel* result = out.mutable_data_ptr<Pixel>();
  std::vector<float> line(width * channels + kLanes), narrowed(out.size(1) * channels + kLanes);
  for (int64_t y = 0; y < side; ++y, result += out.stride(0)) {
    const Pixel* from = pixels + down.first[y] * window.stride(0);
    sum_lines(from, window.stride(0), &down.weights[y * down.count], down.count, width * channels, line.data());
    switch (channels) {
      case 3:
        narrow<3>(line.data(), across, channels, narrowed.data());
        break;
      case 4:
        narrow<4>(line.data(), across, channels, narrowed.data());
        break;
      case 6:
        narrow<6>(line.data(), across, channels, narrowed.data());
        break;
      case 8:
        narrow<8>(line.data(), across, channels, narrowed.data());
        break;
      default:
        narrow<0>(line.data(), across, channels, narrowed.data());
    }
    round_line(narrowed.data(), out.size(1) * channels, result);
  }
}

void crop_resize(const Tensor& window, bool flip_y, bool flip_x, Tensor out) {
  check_value(window.dim() == 3 && out.dim() == 3 && window.size(2) == out.size(2), "window and out must be [H, W, C]");
  check_value(window.scalar_type() == out.scalar_type(), "window and out must be of one dtype");
  check_value(window.numel() > 0, "the window must hold pixels");
  for (const Tensor& image : {window, out}) {
    const bool lines = image.stride(2) == 1 && image.stride(1) == image.size(2);
    check_value(lines, "the values of a line must lie one after the other, got strides ", image.strides());
  }
  switch (window.scalar_type()) {
    case ScalarType::Byte:
      return resize<uint8_t>(window, flip_y, flip_x, out);
    case ScalarType::UInt16:
      return resize<uint16_t>(window, flip_y, flip_x, out);
    default:
      fail<std::invalid_argument>("window must be uint8 or uint16");
  }
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def("crop_resize(Tensor window, bool flip_y, bool flip_x, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("crop_resize", TORCH_BOX(&crop_resize));
}

} // namespace pera
