// Colour operations on a few thousand pixels in planar float32: the native kernels' share of torchvision's adjust_*.
//
// Pixels lie as C planes of n floats, x[c * n + i], in [0, 1], small enough to stay in the L1 cache while one operation
// after the other goes over them. The loops are plain, without branches, for the compiler to vectorise.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace pera {

enum ColorOp : int32_t { kBrightness = 0, kContrast = 1, kSaturation = 2, kHue = 3, kGrayscale = 4 };

constexpr int kColorOps = 4; // places in an order, and factors

// `condition ? yes : no` on the bits. A compiler that heeds floating-point traps makes a branch of a choice between
// computed floats, and the loop around it stays scalar (GCC 12 without -fno-trapping-math); this one vectorises.
inline float select(bool condition, float yes, float no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return std::bit_cast<float>((std::bit_cast<uint32_t>(yes) & mask) | (std::bit_cast<uint32_t>(no) & ~mask));
}

inline float unit_clamp(float x) {
  return select(x > 1.0f, 1.0f, select(x < 0.0f, 0.0f, x));
}

inline float luma(float r, float g, float b) {
  return 0.2989f * r + 0.587f * g + 0.114f * b;
}

// x = clamp(factor * x + offset), which is brightness (offset 0) and contrast (offset (1 - factor) * mean gray).
inline void scale_offset(float* __restrict__ x, int64_t count, float factor, float offset) {
  for (int64_t i = 0; i < count; ++i) {
    x[i] = unit_clamp(factor * x[i] + offset);
  }
}

// Blends with each pixel's own gray: saturation; factor 0 is grayscale.
inline void saturate(float* __restrict__ r, float* __restrict__ g, float* __restrict__ b, int64_t n, float factor) {
  const float rest = 1.0f - factor;
  for (int64_t i = 0; i < n; ++i) {
    const float gray = rest * luma(r[i], g[i], b[i]);
    r[i] = unit_clamp(factor * r[i] + gray);
    g[i] = unit_clamp(factor * g[i] + gray);
    b[i] = unit_clamp(factor * b[i] + gray);
  }
}

// Turns the hue by `turns`. HSV without its saturation: every channel is min + chroma * w(hue), 0 <= w <= 1, and hue is
// counted in sixths of a turn.
inline void shift_hue(float* __restrict__ r, float* __restrict__ g, float* __restrict__ b, int64_t n, float turns) {
  const float sixths = 6.0f * (turns - std::floor(turns)); // in [0, 6]
  for (int64_t i = 0; i < n; ++i) {
    const float red = r[i], green = g[i], blue = b[i];
    const float high = std::max(red, std::max(green, blue));
    const float low = std::min(red, std::min(green, blue));
    const float chroma = high - low;
    const float inverse = 1.0f / select(chroma > 0.0f, chroma, 1.0f);
    const float from_red = (green - blue) * inverse;
    const float from_green = (blue - red) * inverse + 2.0f;
    const float from_blue = (red - green) * inverse + 4.0f;
    float hue = select(high == red, from_red, select(high == green, from_green, from_blue)) + sixths; // in [-1, 11]
    hue = select(hue >= 6.0f, hue - 6.0f, hue);
    hue = select(hue < 0.0f, hue + 6.0f, hue); // in [0, 6]
    r[i] = low + chroma * unit_clamp(std::fabs(hue - 3.0f) - 1.0f);
    g[i] = low + chroma * unit_clamp(2.0f - std::fabs(hue - 2.0f));
    b[i] = low + chroma * unit_clamp(2.0f - std::fabs(hue - 4.0f));
  }
}

// Which planes are red, green and blue, if any are.
struct Rgb {
  bool on = false;
  int64_t red = 0, green = 1, blue = 2;
};

// Luma of images that are nothing but RGB, else the mean over channels: out[i] of n pixels.
inline void gray_plane(const float* __restrict__ x, int64_t channels, const Rgb& rgb, int64_t n, float* __restrict__ out) {
  if (rgb.on && channels == 3) {
    const float* __restrict__ r = x + rgb.red * n;
    const float* __restrict__ g = x + rgb.green * n;
    const float* __restrict__ b = x + rgb.blue * n;
    for (int64_t i = 0; i < n; ++i) {
      out[i] = luma(r[i], g[i], b[i]);
    }
    return;
  }
  std::fill_n(out, n, 0.0f);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] += x[c * n + i];
    }
  }
  const float share = 1.0f / static_cast<float>(channels);
  for (int64_t i = 0; i < n; ++i) {
    out[i] *= share;
  }
}

// Applies `count` operations of an order from left to right. Factors stand at the index of their operation's code.
inline void apply_colors(
    float* x,
    int64_t channels,
    const Rgb& rgb,
    int64_t n,
    const int32_t* order,
    int count,
    const float* factors,
    float mean_gray) {
  float* const r = x + rgb.red * n; // read and written only if rgb.on
  float* const g = x + rgb.green * n;
  float* const b = x + rgb.blue * n;
  for (int step = 0; step < count; ++step) {
    switch (order[step]) {
      case kBrightness:
        scale_offset(x, channels * n, factors[kBrightness], 0.0f);
        break;
      case kContrast:
        scale_offset(x, channels * n, factors[kContrast], (1.0f - factors[kContrast]) * mean_gray);
        break;
      case kSaturation:
        if (rgb.on) {
          saturate(r, g, b, n, factors[kSaturation]);
        }
        break;
      case kHue:
        if (rgb.on) {
          shift_hue(r, g, b, n, factors[kHue]);
        }
        break;
      case kGrayscale:
        if (rgb.on) {
          saturate(r, g, b, n, 0.0f);
        }
        break;
      default: // nothing
        break;
    }
  }
}

// Interleaved uint8 or uint16 (n pixels of C channels) to planes of floats in [0, 1].
template <typename Pixel>
inline void unpack(const Pixel* __restrict__ pixels, int64_t channels, int64_t n, float* __restrict__ x) {
  constexpr float unit = 1.0f / static_cast<float>(std::numeric_limits<Pixel>::max());
  if (channels == 3) {
    float* __restrict__ r = x;
    float* __restrict__ g = x + n;
    float* __restrict__ b = x + 2 * n;
    for (int64_t i = 0; i < n; ++i) {
      r[i] = unit * static_cast<float>(pixels[3 * i]);
      g[i] = unit * static_cast<float>(pixels[3 * i + 1]);
      b[i] = unit * static_cast<float>(pixels[3 * i + 2]);
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < n; ++i) {
      x[c * n + i] = unit * static_cast<float>(pixels[channels * i + c]);
    }
  }
}

} // namespace pera
