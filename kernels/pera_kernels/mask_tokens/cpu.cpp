// Native CPU kernels of `mask_tokens`; arguments and results are those of op.py.
//
// Backward, one task owns a position, so every sum has one writer and one order.

#include <tuple>

#include "position_sums.h"

namespace pera {
namespace {

constexpr int64_t kGrain = 16; // rows

template <typename T>
void copy(T* to, const T* from, int64_t n) {
  std::memcpy(static_cast<void*>(to), from, n * sizeof(T));
}

Tensor mask_tokens(const Tensor& tokens_, const Tensor& mask_token_, const Tensor& pos_, const Tensor& index_) {
  const Tensor tokens = as_contiguous(tokens_), mask_token = floats(mask_token_), pos = floats(pos_);
  const Tensor index = patch_numbers(index_, pos.size(0) - 1);
  const int64_t sequences = index.size(0), added = index.size(1), dim = tokens.size(1);
  check_value(sequences > 0 && tokens.size(0) % sequences == 0, "tokens are not sequences of equal length");
  check_value(mask_token.numel() == dim && pos.size(1) == dim, "mask_token and pos must have D values a row");
  const int64_t length = tokens.size(0) / sequences, grown = length + added;
  Tensor out = new_empty(tokens, {sequences * grown, dim});
  const int64_t* patch = index.const_data_ptr<int64_t>();
  const float *mask = mask_token.const_data_ptr<float>(), *position = pos.const_data_ptr<float>();
  dispatch(tokens.scalar_type(), "mask_tokens", [&]<typename T>(T) {
    const T* from = tokens.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    parallel_for(0, sequences * grown, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t sequence = row / grown, i = row % grown;
        if (i < length) { // as many rows at once as there are
          const int64_t rows = std::min(length - i, end - row);
          copy(result + row * dim, from + (sequence * length + i) * dim, rows * dim);
          row += rows - 1;
          continue;
        }
        const float* added_position = position + (1 + patch[sequence * added + i - length]) * dim;
        T* to = result + row * dim;
        for_lanes(dim, [&](int64_t c, auto lanes, auto) {
          lanes.store(to + c, lanes.load(mask + c) + lanes.load(added_position + c));
        });
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> mask_tokens_backward(const Tensor& grad_, const Tensor& pos, const Tensor& index_) {
  const Tensor grad = as_contiguous(grad_), index = patch_numbers(index_, pos.size(0) - 1);
  const int64_t sequences = index.size(0), added = index.size(1), dim = grad.size(1);
  check_value(sequences > 0 && grad.size(0) % sequences == 0, "grad holds no sequences of equal length");
  const int64_t grown = grad.size(0) / sequences, length = grown - added;
  check_value(length >= 0 && pos.size(1) == dim, "grad must hold the grown sequences and pos D values a row");
  Tensor grad_tokens = new_empty(grad, {sequences * length, dim});
  Tensor grad_pos = new_empty(pos, pos.sizes(), ScalarType::Float);
  Tensor grad_mask = new_empty(grad_pos, {dim});
  const RowsOfPositions rows(index, pos.size(0), grown, length, /*cls=*/false);
  dispatch(grad.scalar_type(), "mask_tokens_backward", [&]<typename T>(T) {
    const T* from = grad.const_data_ptr<T>();
    T* to = grad_tokens.mutable_data_ptr<T>();
    parallel_for(0, sequences, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        copy(to + i * length * dim, from + i * grown * dim, length * dim);
      }
    });
    sum_positions<T>(
        from, rows, dim, grad_pos.mutable_data_ptr<float>(), grad_mask.mutable_data_ptr<float>(), nullptr);
  });
  const auto type = pos.scalar_type();
  return {grad_tokens, as_type(grad_mask, type), as_type(grad_pos, type)};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def("mask_tokens(Tensor tokens, Tensor mask_token, Tensor pos, Tensor index) -> Tensor");
  m.def("mask_tokens_backward(Tensor grad, Tensor pos, Tensor index) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("mask_tokens", TORCH_BOX(&mask_tokens));
  m.impl("mask_tokens_backward", TORCH_BOX(&mask_tokens_backward));
}

} // namespace pera
