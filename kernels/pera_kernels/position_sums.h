// Gradient of a position embedding on the CPU: the sum of the token rows at each position, and of all of them.
#pragma once

#include <vector>

#include "packed.h"

namespace pera {

// Rows of packed tokens [N * length, D], sorted by their position; equal positions in the order of the rows.
struct RowsOfPositions {
  // index: int64 [N, n], patch of token `first + j` of each sequence; cls: token 0 is at position 0.
  RowsOfPositions(const Tensor& index, int64_t positions, int64_t length, int64_t first, bool cls)
      : ends(positions), tokens(index.numel() + (cls ? index.size(0) : 0)), rows(tokens.size()) {
    const int64_t* patch = index.const_data_ptr<int64_t>();
    const int64_t sequences = index.size(0), n = index.size(1);
    for (int64_t i = 0; i < sequences * n; ++i) {
      ++ends[1 + patch[i]];
    }
    ends[0] = cls ? sequences : 0;
    for (int64_t p = 1; p < positions; ++p) {
      ends[p] += ends[p - 1];
    }
    std::vector<int64_t> next(positions, 0);
    std::copy(ends.begin(), ends.end() - 1, next.begin() + 1);
    for (int64_t i = 0; i < sequences; ++i) {
      if (cls) {
        tokens[next[0]++] = i * length;
      }
      for (int64_t j = 0; j < n; ++j) {
        const int64_t at_ = next[1 + patch[i * n + j]]++;
        tokens[at_] = i * length + first + j;
        rows[at_] = i * n + j;
      }
    }
  }
  std::vector<int64_t> ends; // [positions], of each position's tokens
  std::vector<int64_t> tokens; // rows of the packed tokens
  std::vector<int64_t> rows; // rows of index.flatten(); of no meaning for cls
};

// grad [N * length, D] -> pos [positions, D] and patches [D] = sum of pos[1:], float32. Where `copied` is given, rows
// of patches are copied there, in the order of the index: [N * n, D].
//
// A task owns some positions of some columns and sums patches for them; tasks are added in a fixed order.
template <typename T>
void sum_positions(const T* grad, const RowsOfPositions& of, int64_t dim, float* pos, float* patches, T* copied) {
  constexpr int64_t kColumns = 256, kTasks = 16;
  const int64_t positions = of.ends.size(), step = (positions + kTasks - 1) / kTasks;
  const int64_t blocks = (dim + kColumns - 1) / kColumns;
  std::vector<float> partials(kTasks * dim, 0.0f);
  parallel_for(0, kTasks * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = i / blocks, first = i % blocks * kColumns, n = std::min(kColumns, dim - first);
      float* partial = partials.data() + task * dim + first;
      for (int64_t p = task * step; p < std::min((task + 1) * step, positions); ++p) {
        float* __restrict__ to = pos + p * dim + first;
        zero(to, n);
        for (int64_t k = p ? of.ends[p - 1] : 0; k < of.ends[p]; ++k) {
          const T* from = grad + of.tokens[k] * dim + first;
          for_lanes(n, [&](int64_t c, auto lanes, auto) { lanes.store(to + c, lanes.load(to + c) + lanes.load(from + c)); });
          if (copied && p) {
            std::memcpy(static_cast<void*>(copied + of.rows[k] * dim + first), from, n * sizeof(T));
          }
        }
        if (p) {
          add(partial, to, n);
        }
      }
    }
  });
  sum_tasks(partials.data(), kTasks, dim, patches);
}

} // namespace pera
