// Native CPU kernels of `adamw_ema`; the arithmetic is that of reference.py, the table that of native.py.
//
// Tensors are found by their addresses, so that one parallel region serves parameters of all shapes. A task is a chunk of
// one tensor, and a chunk's sum does not depend on the number of threads.

#include <cmath>

#include "lanes.h"

namespace pera {
namespace {

constexpr int64_t kChunk = 16384; // values: 64 KiB of each tensor

// A row of the table. What is null is not there.
struct Slot {
  float *param, *exp_avg, *exp_avg_sq, *teacher;
  void *copy, *teacher_copy;
  float* step;
  int64_t count;
};
static_assert(sizeof(Slot) == 8 * sizeof(int64_t));

struct Table {
  const Slot* slots;
  const float* const* gradients; // of each slot, or null
  const int64_t* ends; // [size + 1]: chunks of all slots before
  int64_t size;

  Table(const Tensor& table, const Tensor& grads, const Tensor& chunks)
      : slots(reinterpret_cast<const Slot*>(table.const_data_ptr<int64_t>())),
        gradients(reinterpret_cast<const float* const*>(grads.const_data_ptr<int64_t>())),
        ends(chunks.const_data_ptr<int64_t>()),
        size(grads.numel()) {
    check_value(
        table.is_contiguous() && grads.is_contiguous() && chunks.is_contiguous() && table.numel() == 8 * size &&
            chunks.numel() == size + 1,
        "table must be int64 [n, 8], grads [n], chunks [n + 1]");
  }

  // Calls run(slot number, its first value, number of values, number of the chunk) in parallel.
  template <typename Run>
  void each_chunk(const Run& run) const {
    parallel_for(0, ends[size], 1, [&](int64_t begin, int64_t end) {
      int64_t slot = std::upper_bound(ends, ends + size + 1, begin) - ends - 1;
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        while (ends[slot + 1] <= chunk) {
          ++slot;
        }
        const int64_t first = (chunk - ends[slot]) * kChunk;
        run(slot, first, std::min(kChunk, slots[slot].count - first), chunk);
      }
    });
  }
};

// Fills scalars [4] (norm, ok, multiplier, infinite) and corrections [n, 2]; counts the steps.
void adamw_ema_prepare(
    const Tensor& table_, // int64 [n, 8]
    const Tensor& grads, // int64 [n]
    const Tensor& chunks, // int64 [n + 1]
    const Tensor& losses, // [any]
    const std::optional<Tensor>& grad_scale, // []
    double factor,
    double clip,
    double beta1,
    double beta2,
    Tensor corrections, // [n, 2]
    Tensor scalars) { // [4]
  const Table table(table_, grads, chunks);
  Tensor partials = new_zeros(scalars, {std::max<int64_t>(table.ends[table.size], 1)});
  float* partial = partials.mutable_data_ptr<float>();
  table.each_chunk([&](int64_t slot, int64_t first, int64_t n, int64_t chunk) {
    if (const float* gradient = table.gradients[slot]) {
      Sums sums;
      for_lanes(n, [&](int64_t i, auto lanes, auto part) {
        const Floats g = lanes.load(gradient + first + i);
        sums.slots[part] += g * g;
      });
      partial[chunk] = sums.total();
    }
  });
  double squares = 0.0;
  for (int64_t chunk = 0; chunk < table.ends[table.size]; ++chunk) {
    squares += partial[chunk];
  }
  const float scale = static_cast<float>(grad_scale ? factor / *grad_scale->const_data_ptr<float>() : factor);
  const float norm = static_cast<float>(std::sqrt(squares)) * scale;
  bool ok = std::isfinite(norm);
  float* found = scalars.mutable_data_ptr<float>();
  found[3] = ok ? 0.0f : 1.0f;
  const float* loss = losses.const_data_ptr<float>();
  for (int64_t i = 0, n = losses.numel(); i < n; ++i) {
    ok = ok && std::isfinite(loss[i]);
  }
  found[0] = norm;
  found[1] = ok ? 1.0f : 0.0f;
  found[2] = scale / std::max((norm + 1e-6f) / static_cast<float>(clip), 1.0f);
  float* correction = corrections.mutable_data_ptr<float>();
  for (int64_t i = 0; i < table.size; ++i) {
    float* step = table.slots[i].step;
    if (table.gradients[i] && step) {
      *step += found[1];
      correction[2 * i] = static_cast<float>(1.0 / (1.0 - std::pow(beta1, *step)));
      correction[2 * i + 1] = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, *step)));
    }
  }
}

inline Floats square_root(Floats x) {
#ifdef __AVX__
  return _mm256_sqrt_ps(x);
#else
  for (int64_t i = 0; i < kLanes; ++i) {
    x[i] = std::sqrt(x[i]);
  }
  return x;
#endif
}

struct Values {
  float lr, decay, beta2, weight1, weight2, eps, weight_ema;
};

// Brings what will be read soon into the cache: these are more streams than a processor follows by itself.
inline void fetch(const float* at) {
  __builtin_prefetch(at + 256);
}

template <typename Copy, bool kTrained, bool kTeacher>
void update_chunk(const Slot& slot, const float* gradient, int64_t first, int64_t n, Values v, float multiplier,
                  float step_size, float root) {
  float *param = slot.param + first, *teacher = kTeacher ? slot.teacher + first : nullptr;
  float *avg = kTrained ? slot.exp_avg + first : nullptr, *square = kTrained ? slot.exp_avg_sq + first : nullptr;
  const float* grad = kTrained ? gradient + first : nullptr;
  Copy* copy = slot.copy ? static_cast<Copy*>(slot.copy) + first : nullptr;
  Copy* teacher_copy = kTeacher && slot.teacher_copy ? static_cast<Copy*>(slot.teacher_copy) + first : nullptr;
  for_lanes(n, [&](int64_t i, auto lanes, auto part) {
    constexpr bool kNewLine = part % 2 == 0;
    if constexpr (kNewLine) {
      fetch(param + i);
    }
    Floats p = lanes.load(param + i);
    if constexpr (kTrained) {
      if constexpr (kNewLine) {
        fetch(grad + i);
        fetch(avg + i);
        fetch(square + i);
      }
      const Floats g = lanes.load(grad + i) * multiplier;
      Floats m = lanes.load(avg + i), s = lanes.load(square + i);
      m += v.weight1 * (g - m);
      s = v.beta2 * s + v.weight2 * g * g;
      p -= v.decay * p;
      p -= step_size * m / (square_root(s) * root + v.eps);
      lanes.store(avg + i, m);
      lanes.store(square + i, s);
      lanes.store(param + i, p);
    }
    if (copy) {
      lanes.store(copy + i, p);
    }
    if constexpr (kTeacher) {
      if constexpr (kNewLine) {
        fetch(teacher + i);
      }
      Floats t = lanes.load(teacher + i);
      t += v.weight_ema * (p - t);
      lanes.store(teacher + i, t);
      if (teacher_copy) {
        lanes.store(teacher_copy + i, t);
      }
    }
  });
}

// The update that `adamw_ema_prepare` allowed; writes nothing unless it did.
void adamw_ema_apply(
    const Tensor& table_, // int64 [n, 8]
    const Tensor& grads, // int64 [n]
    const Tensor& chunks, // int64 [n + 1]
    const Tensor& corrections, // [n, 2]
    const Tensor& scalars, // [4]
    double lr,
    double weight_decay,
    double beta1,
    double beta2,
    double eps,
    double momentum,
    bool half) { // dtype of the copies: half, else bfloat16
  const Table table(table_, grads, chunks);
  const float* found = scalars.const_data_ptr<float>();
  if (!(found[1] > 0)) {
    return;
  }
  const float multiplier = found[2], *correction = corrections.const_data_ptr<float>();
  const auto single = [](double value) { return static_cast<float>(value); };
  const Values values{single(lr), single(lr * weight_decay), single(beta2), single(1 - beta1), single(1 - beta2),
                      single(eps), single(1 - momentum)};
  const auto run = [&]<typename Copy>(Copy) {
    table.each_chunk([&](int64_t i, int64_t first, int64_t n, int64_t) {
      const Slot& slot = table.slots[i];
      const float* gradient = slot.step ? table.gradients[i] : nullptr;
      const auto update = gradient ? (slot.teacher ? update_chunk<Copy, true, true> : update_chunk<Copy, true, false>)
                                   : (slot.teacher ? update_chunk<Copy, false, true> : update_chunk<Copy, false, false>);
      const float step_size = values.lr * correction[2 * i], root = correction[2 * i + 1];
      update(slot, gradient, first, n, values, multiplier, step_size, root);
    });
  };
  half ? run(Half()) : run(BFloat16());
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def(
      "adamw_ema_prepare(Tensor table, Tensor grads, Tensor chunks, Tensor losses, Tensor? grad_scale, float factor, "
      "float clip, float beta1, float beta2, Tensor(a!) corrections, Tensor(b!) scalars) -> ()");
  m.def(
      "adamw_ema_apply(Tensor table, Tensor grads, Tensor chunks, Tensor corrections, Tensor scalars, float lr, "
      "float weight_decay, float beta1, float beta2, float eps, float momentum, bool half) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("adamw_ema_prepare", TORCH_BOX(&adamw_ema_prepare));
  m.impl("adamw_ema_apply", TORCH_BOX(&adamw_ema_apply));
}

} // namespace pera
