// Softmax attention of one head of one sequence, forward and backward: bfloat16 operands, float32 sums.
//
// Matrices are cut into tiles of 1 KiB, the shape of AMX: an A tile is 16 rows of 32 values, a B tile 32 rows of 16
// values, two rows interleaved. Both engines multiply them: AMX a tile at a time, AVX512-BF16 row by row. A whole row of
// scores is kept, so its softmax needs no correction. The backward pass computes scores transposed (a lane is a query):
// its results are then operands of the next product as they come.
//
// No inline function of another header may be compiled here: see CMakeLists.txt.
#include "avx512.h"
#include "tiles512.h"

namespace pera {

namespace {

constexpr int64_t kTile = 1024; // bytes
constexpr int64_t kBlock = 32; // rows and columns of a product: two tiles by two
constexpr int64_t kKeyBlocks = 8; // of which the gradient of q is summed at once
constexpr float kLog2E = 1.44269504f;
constexpr float kFar = 1e30f; // finite: the difference of two infinities would be no number

int64_t round_up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

// Hands out parts of the scratch memory.
struct Scratch {
  char* next;
  char* bytes(int64_t n) {
    char* part = next;
    next += round_up(n, 64);
    return part;
  }
  float* floats(int64_t n) {
    return reinterpret_cast<float*>(bytes(4 * n));
  }
};

// Tiles of an operand, [outer][inner]: inner is the direction of the sum.
struct Tiles {
  char* data;
  int64_t inner;
  char* at(int64_t outer_, int64_t inner_ = 0) const {
    return data + (outer_ * inner + inner_) * kTile;
  }
  int64_t step() const {
    return inner * kTile;
  }
};

Tiles make_tiles(Scratch& scratch, int64_t outer, int64_t inner) {
  return {scratch.bytes(outer * inner * kTile), inner};
}

__m512i to_bf16(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

__m256i to_bf16(__m512 x) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
}

__m512 to_floats(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

void store_16(uint16_t* to, __m256i x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
}

// A tiles of x, its rows filled up with zeros to a multiple of 32.
Tiles rows_by_columns(Scratch& scratch, HeadRows x, int64_t rows, int64_t dim) {
  const int64_t padded = round_up(rows, kBlock);
  const Tiles tiles = make_tiles(scratch, padded / 16, dim / 32);
  for (int64_t row = 0; row < padded; ++row) {
    for (int64_t i = 0; i < dim / 32; ++i) {
      const __m512i value = row < rows ? _mm512_loadu_si512(x.data + row * x.stride + 32 * i) : _mm512_setzero_si512();
      _mm512_store_si512(tiles.at(row / 16, i) + 64 * (row % 16), value);
    }
  }
  return tiles;
}

// B tiles of x, summed over rows: [columns / 16][rows / 32].
Tiles interleaved_rows(Scratch& scratch, HeadRows x, int64_t rows, int64_t dim) {
  const int64_t padded = round_up(rows, kBlock);
  const Tiles tiles = make_tiles(scratch, dim / 16, padded / 32);
  for (int64_t row = 0; row < padded; row += 2) {
    for (int64_t i = 0; i < dim / 16; ++i) {
      const uint16_t* from = x.data + row * x.stride + 16 * i;
      const __m256i first = row < rows ? load_16(from) : _mm256_setzero_si256();
      const __m256i second = row + 1 < rows ? load_16(from + x.stride) : _mm256_setzero_si256();
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
      _mm512_store_si512(tiles.at(i, row / 32) + 64 * (row % 32 / 2), interleave(both));
    }
  }
  return tiles;
}

// Each tile transposed: A tiles of x become B tiles of x', summed over columns; B tiles become A tiles likewise.
void transpose_in_place(Tiles tiles, int64_t outer) {
  for (int64_t i = 0; i < outer * tiles.inner; ++i) {
    transpose(tiles.data + i * kTile, tiles.data + i * kTile);
  }
}

struct Amx {
  // All that was stored lies in memory: GCC does not know that the instructions on tiles read it.
  static void written() {
    asm volatile("" ::: "memory");
  }
  static void begin() {
    alignas(64) char config[64] = {};
    config[0] = 1; // palette
    for (int tile = 0; tile < 8; ++tile) {
      const uint16_t bytes = 64;
      __builtin_memcpy(config + 16 + 2 * tile, &bytes, 2);
      config[48 + tile] = 16; // rows
    }
    written();
    _tile_loadconfig(config);
  }
  static void end() {
    _tile_release();
  }
  // c [32, 32] (+)= a b, with two A tiles a_step bytes apart and two B tiles b_step apart, and `inner` more of each.
  static void product(
      const char* a, int64_t a_step, const char* b, int64_t b_step, int64_t inner, float* c, int64_t width, bool more) {
    written();
    if (more) {
      _tile_loadd(0, c, 4 * width);
      _tile_loadd(1, c + 16, 4 * width);
      _tile_loadd(2, c + 16 * width, 4 * width);
      _tile_loadd(3, c + 16 * width + 16, 4 * width);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t i = 0; i < inner; ++i, a += kTile, b += kTile) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + b_step, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + a_step, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * width);
    _tile_stored(1, c + 16, 4 * width);
    _tile_stored(2, c + 16 * width, 4 * width);
    _tile_stored(3, c + 16 * width + 16, 4 * width);
  }
};

struct Avx512Bf16 {
  static void begin() {}
  static void end() {}
  static void product(
      const char* a, int64_t a_step, const char* b, int64_t b_step, int64_t inner, float* c, int64_t width, bool more) {
    constexpr int kRows = 8;
    for (int64_t row = 0; row < 32; row += kRows, c += kRows * width) {
      const char* rows = a + row / 16 * a_step + row % 16 * 64;
      __m512 sums[kRows][2];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sums[r][0] = more ? _mm512_loadu_ps(c + r * width) : _mm512_setzero_ps();
        sums[r][1] = more ? _mm512_loadu_ps(c + r * width + 16) : _mm512_setzero_ps();
      }
      for (int64_t i = 0; i < inner; ++i) {
        for (int pair = 0; pair < 16; ++pair) {
          const char* left = rows + i * kTile + 4 * pair;
          const char* right = b + i * kTile + 64 * pair;
          const __m512bh b0 = reinterpret_cast<__m512bh>(_mm512_load_si512(right));
          const __m512bh b1 = reinterpret_cast<__m512bh>(_mm512_load_si512(right + b_step));
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            int32_t two;
            __builtin_memcpy(&two, left + 64 * r, 4);
            const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], x, b0);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], x, b1);
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        _mm512_storeu_ps(c + r * width, sums[r][0]);
        _mm512_storeu_ps(c + r * width + 16, sums[r][1]);
      }
    }
  }
};

// 2^x, relative error 3e-6, a thousandth of what rounding to bfloat16 makes; 0 for x below -150.
__m512 power_of_two(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole); // in [-.5, .5], where the polynomial has the least relative error
  __m512 p = _mm512_set1_ps(9.57010188e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.59178618e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40247448e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93121815e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.99999261e-1f));
  return _mm512_scalef_ps(p, whole);
}

// c [32, width] = a b, over all `width` columns.
template <typename Engine>
void product_of_rows(Tiles a, int64_t a_tile, Tiles b, int64_t width, float* c, int64_t stride, bool more = false) {
  for (int64_t column = 0; column < width; column += kBlock) {
    Engine::product(
        a.at(a_tile), a.step(), b.at(column / 16), b.step(), a.inner, c + column, stride, more);
  }
}

// Rows of float32 times a factor, rounded to bfloat16.
void store_rows(const float* from, int64_t width, int64_t rows, int64_t dim, const float* factors, HeadRowsOut to) {
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 factor = _mm512_set1_ps(factors[r]);
    for (int64_t i = 0; i < dim; i += 16) {
      store_16(to.data + r * to.stride + i, to_bf16(_mm512_mul_ps(_mm512_load_ps(from + r * width + i), factor)));
    }
  }
}

// Softmax of 32 rows of scores, numbers beyond `keys` left out: numerators to A tiles, 1 / sum, and the log-sum-exps.
void softmax_rows(
    float* scores, int64_t stride, AttentionShape shape, int64_t rows, Tiles numerators, float* factors, HeadSums lse) {
  const int64_t padded = round_up(shape.keys, kBlock), last = padded - kBlock;
  const uint32_t beyond = ~0u << 1 << (shape.keys - last - 1); // of the last block, the numbers that are no keys
  const __m512 scale = _mm512_set1_ps(shape.scale * kLog2E), far = _mm512_set1_ps(-kFar);
  float maxima[kBlock];
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * stride;
    _mm512_mask_store_ps(row + last, static_cast<__mmask16>(beyond), far);
    _mm512_mask_store_ps(row + last + 16, static_cast<__mmask16>(beyond >> 16), far);
    __m512 most0 = _mm512_load_ps(row), most1 = most0;
    for (int64_t i = 0; i < padded; i += 32) {
      most0 = _mm512_max_ps(most0, _mm512_load_ps(row + i));
      most1 = _mm512_max_ps(most1, _mm512_load_ps(row + i + 16));
    }
    maxima[r] = _mm512_reduce_max_ps(_mm512_max_ps(most0, most1));
    const __m512 shift = _mm512_mul_ps(_mm512_set1_ps(maxima[r]), scale);
    __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
    char* to = numerators.at(r / 16) + 64 * (r % 16);
    for (int64_t i = 0; i < padded; i += 32, to += kTile) {
      const __m512 p0 = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(row + i), scale, shift));
      const __m512 p1 = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(row + i + 16), scale, shift));
      sum0 = _mm512_add_ps(sum0, p0);
      sum1 = _mm512_add_ps(sum1, p1);
      _mm512_store_si512(to, to_bf16(p0, p1));
    }
    factors[r] = _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
  }
  for (int64_t r = 0; r < rows; ++r) { // apart: a call of logf would cost the registers above
    lse.data[r * lse.stride] = maxima[r] * shape.scale + __builtin_logf(factors[r]);
    factors[r] = 1.0f / factors[r];
  }
}

template <typename Engine>
void forward(
    AttentionShape shape, HeadRows q, HeadRows k, HeadRows v, HeadRowsOut out, HeadSums lse, void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const int64_t keys = round_up(shape.keys, kBlock), stride = keys + 16, dim = shape.dim;
  const Tiles key_tiles = rows_by_columns(scratch, k, shape.keys, dim);
  transpose_in_place(key_tiles, keys / 16);
  const Tiles value_tiles = interleaved_rows(scratch, v, shape.keys, dim);
  const Tiles numerators = make_tiles(scratch, 2, keys / 32);
  float* scores = scratch.floats(kBlock * stride);
  float* sums = scratch.floats(kBlock * dim);
  float* factors = scratch.floats(kBlock);
  __builtin_memset(numerators.data, 0, 2 * numerators.step()); // rows beyond the last query are multiplied too
  for (int64_t first = 0; first < shape.queries; first += kBlock) {
    const int64_t rows = shape.queries - first < kBlock ? shape.queries - first : kBlock;
    Scratch rest = scratch;
    const Tiles queries = rows_by_columns(rest, {q.data + first * q.stride, q.stride}, rows, dim);
    product_of_rows<Engine>(queries, 0, key_tiles, keys, scores, stride);
    softmax_rows(scores, stride, shape, rows, numerators, factors, {lse.data + first * lse.stride, lse.stride});
    product_of_rows<Engine>(numerators, 0, value_tiles, dim, sums, dim);
    store_rows(sums, dim, rows, dim, factors, {out.data + first * out.stride, out.stride});
  }
}

// Of each query: the sum of grad * out, and the log-sum-exp times log2(e). Both are 0 for the rows of zeros that fill up.
void query_sums(
    AttentionShape shape, HeadRows grad, HeadRows out, HeadSums lse, float* products, float* log_sums) {
  for (int64_t i = 0; i < round_up(shape.queries, kBlock); ++i) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < shape.dim && i < shape.queries; j += 16) {
      const __m512 g = to_floats(load_16(grad.data + i * grad.stride + j));
      sum = _mm512_fmadd_ps(g, to_floats(load_16(out.data + i * out.stride + j)), sum);
    }
    products[i] = _mm512_reduce_add_ps(sum);
    log_sums[i] = i < shape.queries ? lse.data[i * lse.stride] * kLog2E : 0.0f;
  }
}

// One block of scores and of gradients of probabilities, both transposed [32 keys, 32 queries].
struct ScoreBlock {
  alignas(64) float scores[kBlock * kBlock];
  alignas(64) float grads[kBlock * kBlock];
};

// From them the probabilities p and the gradients of the scores, in the forms of which the products are made.
void score_gradients(
    const ScoreBlock& block,
    int64_t keys, // that exist
    float scale,
    const float* log_sums, // [32]
    const float* products, // [32]
    Tiles p, // A tiles [2][queries / 32]
    Tiles ds, // likewise
    int64_t query_tile, // of 32
    char* ds_first, // B tile of the first 16 queries
    char* ds_second) {
  const __m512 factor = _mm512_set1_ps(scale * kLog2E);
  __m512 logs[2], deltas[2];
  for (int half = 0; half < 2; ++half) {
    logs[half] = _mm512_load_ps(log_sums + 16 * half);
    deltas[half] = _mm512_load_ps(products + 16 * half);
  }
  for (int64_t key = 0; key < kBlock; key += 2) {
    __m512 gradient[2][2]; // [key][half]
    for (int64_t j = 0; j < 2; ++j) {
      __m512 probability[2];
      const int64_t row = (key + j) * kBlock;
      for (int half = 0; half < 2; ++half) {
        probability[half] = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(block.scores + row + 16 * half), factor, logs[half]));
        if (key + j >= keys) { // its score is 0, which may be far above the log-sum-exp
          probability[half] = _mm512_setzero_ps();
        }
        const __m512 difference = _mm512_sub_ps(_mm512_load_ps(block.grads + row + 16 * half), deltas[half]);
        gradient[j][half] = _mm512_mul_ps(probability[half], difference);
      }
      const int64_t place = (key + j) % 16 * 64;
      _mm512_store_si512(p.at((key + j) / 16, query_tile) + place, to_bf16(probability[0], probability[1]));
      _mm512_store_si512(ds.at((key + j) / 16, query_tile) + place, to_bf16(gradient[j][0], gradient[j][1]));
    }
    _mm512_store_si512(ds_first + 32 * key, interleave(to_bf16(gradient[0][0], gradient[1][0])));
    _mm512_store_si512(ds_second + 32 * key, interleave(to_bf16(gradient[0][1], gradient[1][1])));
  }
}

// from [dim, rows] float32 -> to [rows, dim] bfloat16, times a factor.
void store_transposed(const float* from, int64_t stride, int64_t rows, int64_t dim, float factor, HeadRowsOut to) {
  alignas(64) float tile[16 * 16];
  for (int64_t first = 0; first < rows; first += 16) {
    for (int64_t i = 0; i < dim; i += 16) {
      for (int64_t j = 0; j < 16; ++j) {
        _mm512_store_ps(tile + 16 * j, _mm512_load_ps(from + (i + j) * stride + first));
      }
      transpose(reinterpret_cast<const char*>(tile), reinterpret_cast<char*>(tile));
      for (int64_t j = 0; j < 16 && first + j < rows; ++j) {
        const __m512 value = _mm512_mul_ps(_mm512_load_ps(tile + 16 * j), _mm512_set1_ps(factor));
        store_16(to.data + (first + j) * to.stride + i, to_bf16(value));
      }
    }
  }
}

template <typename Engine>
void backward(
    AttentionShape shape,
    HeadRows grad,
    HeadRows q,
    HeadRows k,
    HeadRows v,
    HeadRows out,
    HeadSums lse,
    HeadRowsOut grad_q,
    HeadRowsOut grad_k,
    HeadRowsOut grad_v,
    void* memory) {
  Scratch scratch{static_cast<char*>(memory)};
  const int64_t queries = round_up(shape.queries, kBlock), keys = round_up(shape.keys, kBlock), dim = shape.dim;
  const int64_t stride = queries + 16;
  const Tiles key_rows = rows_by_columns(scratch, k, shape.keys, dim);
  const Tiles value_rows = rows_by_columns(scratch, v, shape.keys, dim);
  const Tiles queries_by_dim = rows_by_columns(scratch, q, shape.queries, dim);
  const Tiles grads_by_dim = rows_by_columns(scratch, grad, shape.queries, dim);
  transpose_in_place(queries_by_dim, queries / 16);
  transpose_in_place(grads_by_dim, queries / 16);
  const Tiles query_rows = interleaved_rows(scratch, q, shape.queries, dim);
  const Tiles grad_rows = interleaved_rows(scratch, grad, shape.queries, dim);
  const Tiles keys_by_dim = interleaved_rows(scratch, k, shape.keys, dim);
  transpose_in_place(keys_by_dim, dim / 16);
  const Tiles p = make_tiles(scratch, 2, queries / 32), ds = make_tiles(scratch, 2, queries / 32);
  const Tiles ds_rows = make_tiles(scratch, queries / 16, kKeyBlocks);
  float* q_sums = scratch.floats(dim * stride); // transposed
  float* sums = scratch.floats(kBlock * dim);
  float* log_sums = scratch.floats(queries);
  float* products = scratch.floats(queries);
  auto& block = *reinterpret_cast<ScoreBlock*>(scratch.bytes(sizeof(ScoreBlock)));
  float ones[kBlock], scales[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) {
    ones[i] = 1.0f;
    scales[i] = shape.scale;
  }
  query_sums(shape, grad, out, lse, products, log_sums);
  int64_t group = 0; // first key block whose gradients of scores wait to be summed
  for (int64_t key_block = 0; key_block < keys / kBlock; ++key_block) {
    const int64_t first = key_block * kBlock;
    const int64_t rows = shape.keys - first < kBlock ? shape.keys - first : kBlock;
    for (int64_t query = 0; query < queries; query += kBlock) {
      const int64_t tile = query / 16;
      const auto multiply = [&](Tiles a, Tiles b, float* c) {
        Engine::product(a.at(2 * key_block), a.step(), b.at(tile), b.step(), dim / 32, c, kBlock, false);
      };
      multiply(key_rows, queries_by_dim, block.scores);
      multiply(value_rows, grads_by_dim, block.grads);
      score_gradients(
          block, rows, shape.scale, log_sums + query, products + query, p, ds, query / 32,
          ds_rows.at(tile, key_block - group), ds_rows.at(tile + 1, key_block - group));
    }
    product_of_rows<Engine>(p, 0, grad_rows, dim, sums, dim);
    store_rows(sums, dim, rows, dim, ones, {grad_v.data + first * grad_v.stride, grad_v.stride});
    product_of_rows<Engine>(ds, 0, query_rows, dim, sums, dim);
    store_rows(sums, dim, rows, dim, scales, {grad_k.data + first * grad_k.stride, grad_k.stride});
    const int64_t waiting = key_block + 1 - group;
    if (waiting == kKeyBlocks || first + kBlock >= keys) {
      for (int64_t i = 0; i < dim; i += kBlock) {
        for (int64_t query = 0; query < queries; query += kBlock) {
          Engine::product(
              keys_by_dim.at(i / 16, group), keys_by_dim.step(), ds_rows.at(query / 16), ds_rows.step(), waiting,
              q_sums + i * stride + query, stride, group > 0);
        }
      }
      group = key_block + 1;
    }
  }
  store_transposed(q_sums, stride, shape.queries, dim, shape.scale, grad_q);
}

} // namespace

int64_t attention_scratch(AttentionShape shape) {
  const int64_t keys = round_up(shape.keys, kBlock), dim = shape.dim;
  return 2 * 2 * keys * dim + 2 * kBlock * keys + 4 * kBlock * (keys + 16 + dim + 1) + 2 * kBlock * dim;
}

int64_t attention_backward_scratch(AttentionShape shape) {
  const int64_t keys = round_up(shape.keys, kBlock), queries = round_up(shape.queries, kBlock), dim = shape.dim;
  return 2 * dim * (3 * keys + 4 * queries) + 2 * 2 * kBlock * queries + 2 * kKeyBlocks * kBlock * queries +
      4 * dim * (queries + 16) + 4 * kBlock * dim + 2 * 4 * queries + static_cast<int64_t>(sizeof(ScoreBlock));
}

void attention_begin(Engine engine) {
  engine == Engine::kAmx ? Amx::begin() : Avx512Bf16::begin();
}

void attention_end(Engine engine) {
  engine == Engine::kAmx ? Amx::end() : Avx512Bf16::end();
}

void attention_head(
    Engine engine,
    AttentionShape shape,
    HeadRows q,
    HeadRows k,
    HeadRows v,
    HeadRowsOut out,
    HeadSums lse,
    void* scratch) {
  const auto run = engine == Engine::kAmx ? forward<Amx> : forward<Avx512Bf16>;
  run(shape, q, k, v, out, lse, scratch);
}

void attention_head_backward(
    Engine engine,
    AttentionShape shape,
    HeadRows grad,
    HeadRows q,
    HeadRows k,
    HeadRows v,
    HeadRows out,
    HeadSums lse,
    HeadRowsOut grad_q,
    HeadRowsOut grad_k,
    HeadRowsOut grad_v,
    void* scratch) {
  const auto run = engine == Engine::kAmx ? backward<Amx> : backward<Avx512Bf16>;
  run(shape, grad, q, k, v, out, lse, grad_q, grad_k, grad_v, scratch);
}

} // namespace pera
