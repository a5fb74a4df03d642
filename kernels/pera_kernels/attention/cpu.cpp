// Native CPU kernels of `attention`, for bfloat16 on processors with AVX512-BF16 or AMX: checks, and threads over the
// heads of all sequences. native.py calls them.
#ifdef PERA_AVX512

#include <cmath>
#include <cstdlib>
#include <memory>

#include "avx512.h"
#include "tensors.h"

namespace pera {
namespace {

void check_heads(const Tensor& x, const char* name, const Tensor& like, int64_t length) {
  check_value(
      x.dim() == 4 && x.scalar_type() == ScalarType::BFloat16 && x.stride(3) == 1, name,
      " must be bfloat16 [n, H, length, d] with contiguous rows");
  check_value(
      x.size(0) == like.size(0) && x.size(1) == like.size(1) && x.size(2) == length && x.size(3) == like.size(3), name,
      ' ', x.sizes(), " does not fit ", like.sizes());
}

AttentionShape check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse) {
  check_value(q.dim() == 4, "q must be [n, H, queries, d]");
  check_value(k.dim() == 4, "k must be [n, H, keys, d]");
  const int64_t queries = q.size(2), keys = k.size(2), dim = q.size(3);
  check_heads(q, "q", q, queries);
  check_heads(k, "k", q, keys);
  check_heads(v, "v", q, keys);
  check_heads(out, "out", q, queries);
  check_value(dim > 0 && dim % 32 == 0, "heads must have a multiple of 32 values, got ", dim);
  check_value(keys > 0, "there are no keys");
  check_value(
      lse.dim() == 3 && lse.scalar_type() == ScalarType::Float && lse.size(0) == q.size(0) &&
          lse.size(1) == q.size(1) && lse.size(2) == queries,
      "lse must be float32 [n, H, queries], got ", lse.sizes());
  return {queries, keys, dim, 1.0f / std::sqrt(static_cast<float>(dim))};
}

// Where the heads of a tensor [n, H, ...] begin, and the stride of their rows.
struct Heads {
  explicit Heads(const Tensor& x) : sequence(x.stride(0)), head(x.stride(1)), row(x.stride(2)) {}
  int64_t offset(int64_t s, int64_t h) const {
    return s * sequence + h * head;
  }
  int64_t sequence, head, row;
};

struct Read : Heads {
  explicit Read(const Tensor& x)
      : Heads(x), data(reinterpret_cast<const uint16_t*>(x.const_data_ptr<BFloat16>())) {}
  HeadRows at(int64_t s, int64_t h) const {
    return {data + offset(s, h), row};
  }
  const uint16_t* data;
};

struct Written : Heads {
  explicit Written(const Tensor& x) : Heads(x), data(reinterpret_cast<uint16_t*>(x.mutable_data_ptr<BFloat16>())) {}
  HeadRowsOut at(int64_t s, int64_t h) const {
    return {data + offset(s, h), row};
  }
  uint16_t* data;
};

struct LogSums : Heads {
  explicit LogSums(const Tensor& x) : Heads(x), data(x.mutable_data_ptr<float>()) {}
  HeadSums at(int64_t s, int64_t h) const {
    return {data + offset(s, h), row};
  }
  float* data;
};

// Calls run(sequence, head, scratch) for each head of each sequence, in all threads.
template <typename Run>
void for_heads(const Tensor& q, Engine engine, int64_t bytes, Run run) {
  const int64_t heads = q.size(1);
  parallel_for(0, q.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, decltype(&std::free)> scratch(
        std::aligned_alloc(64, (bytes + 63) / 64 * 64), &std::free);
    if (scratch == nullptr) {
      std::abort(); // less than a megabyte; nothing may be thrown here
    }
    attention_begin(engine);
    for (int64_t i = begin; i < end; ++i) {
      run(i / heads, i % heads, scratch.get());
    }
    attention_end(engine);
  });
}

Engine engine_of(bool amx) {
  return amx ? Engine::kAmx : Engine::kAvx512Bf16;
}

void attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& out_, const Tensor& lse_, bool amx) {
  const AttentionShape shape = check(q_, k_, v_, out_, lse_);
  const Read q(q_), k(k_), v(v_);
  const Written out(out_);
  const LogSums lse(lse_);
  for_heads(q_, engine_of(amx), attention_scratch(shape), [&](int64_t s, int64_t h, void* scratch) {
    attention_head(
        engine_of(amx), shape, q.at(s, h), k.at(s, h), v.at(s, h), out.at(s, h), lse.at(s, h), scratch);
  });
}

void attention_backward(
    const Tensor& grad_,
    const Tensor& q_,
    const Tensor& k_,
    const Tensor& v_,
    const Tensor& out_,
    const Tensor& lse_,
    const Tensor& grad_q_,
    const Tensor& grad_k_,
    const Tensor& grad_v_,
    bool amx) {
  const AttentionShape shape = check(q_, k_, v_, out_, lse_);
  check_heads(grad_, "grad", q_, shape.queries);
  check_heads(grad_q_, "grad_q", q_, shape.queries);
  check_heads(grad_k_, "grad_k", q_, shape.keys);
  check_heads(grad_v_, "grad_v", q_, shape.keys);
  const Read grad(grad_), q(q_), k(k_), v(v_), out(out_);
  const LogSums lse(lse_);
  const Written grad_q(grad_q_), grad_k(grad_k_), grad_v(grad_v_);
  for_heads(q_, engine_of(amx), attention_backward_scratch(shape), [&](int64_t s, int64_t h, void* scratch) {
    attention_head_backward(
        engine_of(amx), shape, grad.at(s, h), q.at(s, h), k.at(s, h), v.at(s, h), out.at(s, h), lse.at(s, h),
        grad_q.at(s, h), grad_k.at(s, h), grad_v.at(s, h), scratch);
  });
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, bool amx) -> ()");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor(a!) grad_q, "
      "Tensor(b!) grad_k, Tensor(c!) grad_v, bool amx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

} // namespace pera

#endif // PERA_AVX512
