// Native CPU kernel of `crop_resize`; arguments and results are those of dispatch.py.
//
// One line of the result at a time: the lines of the window that it is made of are summed into a line of floats, which
// stays in the cache, and that is then narrowed. Lanes run over the values of a line downwards, and over a pixel's
// channels sideways. One thread: the loader's threads each have an image of their own.

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "tensors.h"

namespace pera {
namespace {

using torch::headeronly::DeviceType;
using torch::stable::Device;

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

Tensor pixels_at(const void* data, Ints sizes, Ints strides, ScalarType dtype) {
  return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, Device(DeviceType::CPU), dtype);
}

// While it lives, what PyTorch does in this thread is not shared out to a team. The loader's threads each have an image of
// their own, and a team for each of them is many times as many threads as there are cores.
class OneThread {
 public:
  OneThread() {
    if (set_ == nullptr || get_ == nullptr) {
      return;
    }
    torch::stable::get_num_threads(); // PyTorch sets the number when a thread first asks for it: let that be before
    before_ = get_();
    set_(1);
  }
  ~OneThread() {
    if (before_ > 0) {
      set_(before_);
    }
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  // Of the OpenMP library that PyTorch runs on, whichever it is: it is loaded with its symbols visible. The number is the
  // calling thread's own. Null in a build of PyTorch without OpenMP.
  static inline const auto set_ = reinterpret_cast<void (*)(int)>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"));
  static inline const auto get_ = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
  int before_ = 0;
};

// PyTorch's own resize of a window [h, w, channels], uint8 with 1 or 3 channels, into memory without gaps.
void resize_by_torch(const uint8_t* window, Ints sizes, int64_t line, int64_t side, uint8_t* result) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const int64_t height = sizes[0], width = sizes[1], channels = sizes[2];
  const std::array<int64_t, 4> from_sizes{1, channels, height, width}, from_strides{height * line, 1, line, channels};
  const std::array<int64_t, 4> to_sizes{1, channels, side, side};
  const std::array<int64_t, 4> to_strides{side * side * channels, 1, side * channels, channels};
  const std::array<int64_t, 2> output_size{side, side};
  // The strides say channels-last, which is what the fast kernel looks for.
  std::array<StableIValue, 6> stack{
      from(pixels_at(window, from_sizes, from_strides, ScalarType::Byte)),
      from(Ints(output_size)),
      from(false), // align_corners
      from(std::nullopt), // scales_h
      from(std::nullopt), // scales_w
      from(pixels_at(result, to_sizes, to_strides, ScalarType::Byte))};
  const OneThread guard;
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::_upsample_bilinear2d_aa", "out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]); // takes what was returned, and lets go of it
}

// to[i] = from[n - 1 - i], pixels of 3 or 1 bytes. Four bytes at a time: the next pixel overwrites the fourth.
template <int64_t kChannels>
void mirror_line(const uint8_t* from, int64_t n, uint8_t* to) {
  const uint8_t* last = from + (n - 1) * kChannels;
  if constexpr (kChannels == 3) {
    for (int64_t i = 0; i + 1 < n; ++i) {
      std::memcpy(to + 3 * i, last - 3 * i, 4);
    }
    std::memcpy(to + 3 * (n - 1), from, 3);
  } else {
    std::reverse_copy(from, from + n, to);
  }
}

void plain_crop(
    const uint8_t* window, Ints sizes, int64_t line, bool flip_y, bool flip_x, int64_t side, uint8_t* result) {
  if (!flip_y && !flip_x) {
    return resize_by_torch(window, sizes, line, side, result);
  }
  static thread_local std::vector<uint8_t> upright;
  const int64_t bytes = side * sizes[2];
  upright.resize(side * bytes);
  resize_by_torch(window, sizes, line, side, upright.data());
  for (int64_t y = 0; y < side; ++y) {
    const uint8_t* from = upright.data() + (flip_y ? side - 1 - y : y) * bytes;
    if (!flip_x) {
      std::memcpy(result + y * bytes, from, bytes);
    } else if (sizes[2] == 3) {
      mirror_line<3>(from, side, result + y * bytes);
    } else {
      mirror_line<1>(from, side, result + y * bytes);
    }
  }
}

template <typename Pixel>
void crops_of(const Tensor& image, const int64_t* start, const int64_t* end, int64_t slot, Tensor& out) {
  const int64_t crops = out.size(0), images = out.size(1), side = out.size(2), channels = out.size(4);
  const int64_t line = image.stride(0);
  const ScalarType dtype = image.scalar_type();
  const bool plain = dtype == ScalarType::Byte && (channels == 1 || channels == 3);
  const Pixel* pixels = image.const_data_ptr<Pixel>();
  Pixel* result = out.mutable_data_ptr<Pixel>();
  for (int64_t crop = 0; crop < crops; ++crop) {
    const int64_t place = crop * images + slot;
    const int64_t *a = start + 2 * place, *b = end + 2 * place;
    const int64_t top = std::min(a[0], b[0]), left = std::min(a[1], b[1]);
    const int64_t bottom = std::min(std::max(a[0], b[0]), image.size(0));
    const int64_t right = std::min(std::max(a[1], b[1]), image.size(1));
    const bool within = top >= 0 && left >= 0 && top < bottom && left < right;
    check_value(within, "crop ", crop, " of image ", slot, " has no pixel of it");
    const std::array<int64_t, 3> sizes{bottom - top, right - left, channels};
    const bool flip_y = a[0] > b[0], flip_x = a[1] > b[1];
    const Pixel* window = pixels + top * line + left * channels;
    Pixel* to = result + place * side * side * channels;
    if constexpr (std::is_same_v<Pixel, uint8_t>) {
      if (plain) {
        plain_crop(window, sizes, line, flip_y, flip_x, side, to);
        continue;
      }
    }
    const std::array<int64_t, 3> strides{line, channels, 1}, to_sizes{side, side, channels};
    const std::array<int64_t, 3> to_strides{side * channels, channels, 1};
    Tensor there = pixels_at(to, to_sizes, to_strides, dtype);
    resize<Pixel>(pixels_at(window, sizes, strides, dtype), flip_y, flip_x, there);
  }
}

void crops_of_image(const Tensor& image, const Tensor& start, const Tensor& end, int64_t slot, Tensor out) {
  check_value(image.dim() == 3 && out.dim() == 5 && image.size(2) == out.size(4), "image must be [H, W, C] and out ",
              "[crops, images, side, side, C]");
  check_value(image.scalar_type() == out.scalar_type(), "image and out must be of one dtype");
  check_value(image.stride(2) == 1 && image.stride(1) == image.size(2) && out.is_contiguous() &&
              out.size(2) == out.size(3), "image and out must lie in memory line by line, out without gaps");
  check_index(slot >= 0 && slot < out.size(1), "slot ", slot, " of ", out.size(1));
  const std::array<int64_t, 3> corners{out.size(0), out.size(1), 2};
  for (const Tensor& corner : {start, end}) {
    check_value(corner.scalar_type() == ScalarType::Long && corner.is_contiguous() &&
                equal(corner.sizes(), Ints(corners)), "start and end must be int64 [crops, images, 2]");
  }
  const int64_t *from = start.const_data_ptr<int64_t>(), *to = end.const_data_ptr<int64_t>();
  switch (image.scalar_type()) {
    case ScalarType::Byte:
      return crops_of<uint8_t>(image, from, to, slot, out);
    case ScalarType::UInt16:
      return crops_of<uint16_t>(image, from, to, slot, out);
    default:
      fail<std::invalid_argument>("image must be uint8 or uint16");
  }
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def("crop_resize(Tensor window, bool flip_y, bool flip_x, Tensor(a!) out) -> ()");
  m.def("crops_of_image(Tensor image, Tensor start, Tensor end, int slot, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("crop_resize", TORCH_BOX(&crop_resize));
  m.impl("crops_of_image", TORCH_BOX(&crops_of_image));
}

} // namespace pera
