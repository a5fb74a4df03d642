// Packed token groups on the CPU: which rows of the stream a branch sees (packing.py has the definition), and which
// rows of packed tokens show a position.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "lanes.h"
#include "tensors.h"

namespace pera {

// Rows that lie next to each other in the stream and in the branch's packed rows.
struct Span {
  int64_t stream; // first row in the stream
  int64_t packed; // first row in the branch; kDropped: the branch does not see the sequence
  int64_t rows;
};

constexpr int64_t kDropped = -1;

struct Packing {
  // groups: n0, len0, n1, len1, ...; keep: kept sequences, group by group, or none: all are kept.
  Packing(Ints groups, const std::optional<Tensor>& keep, Ints kept_counts) {
    check_value(groups.size() % 2 == 0, "groups must hold pairs (sequences, length), got ", groups);
    const size_t num_groups = groups.size() / 2;
    for (size_t g = 0; g < num_groups; ++g) {
      tokens += groups[2 * g] * groups[2 * g + 1];
    }
    scales.assign(num_groups, 1.0f);
    if (!keep) {
      kept_tokens = tokens;
      starts.push_back(0);
      spans.push_back({0, 0, tokens});
      return;
    }
    const Tensor names = as_contiguous(*keep, ScalarType::Long);
    const int64_t* name = names.const_data_ptr<int64_t>();
    int64_t total = 0;
    for (const int64_t k : kept_counts) {
      total += k;
    }
    check_value(
        kept_counts.size() == num_groups && names.numel() == total, "kept_counts ", kept_counts,
        " does not fit groups ", groups, " and keep");
    int64_t stream = 0;
    for (size_t g = 0; g < num_groups; ++g) {
      const int64_t n = groups[2 * g], length = groups[2 * g + 1];
      const size_t first = spans.size();
      for (int64_t s = 0; s < n; ++s) {
        starts.push_back(stream + s * length);
        spans.push_back({stream + s * length, kDropped, length});
      }
      for (int64_t k = 0; k < kept_counts[g]; ++k, ++name, kept_tokens += length) {
        check_index(*name >= 0 && *name < n, "keep must be in [0, ", n, "), got ", *name);
        check_value(spans[first + *name].packed == kDropped, "keep names a sequence twice: ", *name);
        spans[first + *name].packed = kept_tokens;
      }
      const auto count = static_cast<double>(kept_counts[g]);
      scales[g] = count ? static_cast<float>(static_cast<double>(n) / count) : 0.0f;
      group_ends.push_back(stream + n * length);
      stream += n * length;
    }
  }

  // Calls visit(span) for what lies in rows [begin, end) of the stream.
  template <typename Visit>
  void visit_stream(int64_t begin, int64_t end, Visit visit) const {
    auto next = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; ++next) {
      const Span& span = spans[next];
      const int64_t skip = begin - span.stream, rows = std::min(span.rows - skip, end - begin);
      if (rows > 0) { // not an empty sequence
        visit(Span{begin, span.packed == kDropped ? kDropped : span.packed + skip, rows});
        begin += rows;
      }
    }
  }

  // n / kept of the group that a row of the stream belongs to.
  float scale(int64_t stream) const {
    return scales[std::upper_bound(group_ends.begin(), group_ends.end(), stream) - group_ends.begin()];
  }

  int64_t tokens = 0, kept_tokens = 0;
  std::vector<float> scales; // of each group

 private:
  std::vector<Span> spans; // in the order of the stream
  std::vector<int64_t> starts; // their first rows
  std::vector<int64_t> group_ends;
};

// Rows a task takes: a constant, so that partial sums are the same for any number of threads. About 64 tasks, for
// any number of threads that is usual.
inline int64_t rows_per_task(int64_t rows) {
  return std::max<int64_t>((rows + 63) / 64, 16);
}

// partials [tasks, n] float32 -> sums [n], tasks in ascending order.
inline void sum_tasks(const float* partials, int64_t tasks, int64_t n, float* sums) {
  constexpr int64_t kColumns = 256;
  parallel_for(0, (n + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kColumns, count = std::min(end * kColumns, n) - first;
    zero(sums + first, count);
    for (int64_t task = 0; task < tasks; ++task) {
      add(sums + first, partials + task * n + first, count);
    }
  });
}

// A parameter as the kernels read it.
inline Tensor floats(const Tensor& parameter) {
  return as_contiguous(parameter, ScalarType::Float);
}

// Patch numbers as the kernels read them: int64 [N, n], each in [0, positions).
inline Tensor patch_numbers(const Tensor& index, int64_t positions) {
  Tensor result = as_contiguous(index, ScalarType::Long);
  const int64_t* patch = result.const_data_ptr<int64_t>();
  for (int64_t i = 0, n = result.numel(); i < n; ++i) {
    check_index(patch[i] >= 0 && patch[i] < positions, "index must be in [0, ", positions, "), got ", patch[i]);
  }
  return result;
}

} // namespace pera
