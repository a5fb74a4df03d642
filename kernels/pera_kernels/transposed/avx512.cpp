// Transposes matrices of 16-bit values in blocks of 32 x 32: whole cache lines are read, and written past the caches.
//
// No inline function of another header may be compiled here: see CMakeLists.txt.
#include "avx512.h"
#include "tiles512.h"

namespace pera {

namespace {

constexpr int64_t kBlock = 32;

int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// A block at the edge has fewer rows or columns; `to` has room for 32 values in each of its rows, aligned to 64 bytes.
void transpose_block(
    const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, uint16_t* to, int64_t to_stride) {
  alignas(64) char tiles[2][1024]; // columns 0 to 15, and 16 to 31
  const auto read = static_cast<__mmask32>(~0u >> (kBlock - columns));
  for (int64_t row = 0; row < kBlock; row += 2) {
    const __m512i zero = _mm512_setzero_si512();
    const uint16_t* at = from + row * stride;
    const __m512i first = row < rows ? _mm512_maskz_loadu_epi16(read, at) : zero;
    const __m512i second = row + 1 < rows ? _mm512_maskz_loadu_epi16(read, at + stride) : zero;
    _mm512_store_si512(tiles[0] + 32 * row, interleave(_mm512_shuffle_i64x2(first, second, 0x44)));
    _mm512_store_si512(tiles[1] + 32 * row, interleave(_mm512_shuffle_i64x2(first, second, 0xee)));
  }
  transpose(tiles[0], tiles[0]);
  transpose(tiles[1], tiles[1]);
  for (int64_t column = 0; column < columns; ++column) {
    const char* row = tiles[column / 16] + column % 16 * 64;
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + column * to_stride), _mm512_load_si512(row));
  }
}

} // namespace

void transpose_columns(
    const uint16_t* from,
    int64_t rows,
    int64_t columns,
    int64_t stride,
    int64_t begin,
    int64_t end,
    uint16_t* to,
    int64_t to_stride) {
  end = least(end, columns);
  for (int64_t row = 0; row < rows; row += kBlock) {
    for (int64_t column = begin; column < end; column += kBlock) {
      const int64_t height = least(rows - row, kBlock), width = least(end - column, kBlock);
      transpose_block(from + row * stride + column, stride, height, width, to + column * to_stride + row, to_stride);
    }
  }
  _mm_sfence();
}

} // namespace pera
