// Native CPU kernels of `mask_tokens`; arguments and results are those of op.py.
//
// Backward, one task owns a position, so every sum has one writer and one order.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "position_sums.h"

namespace {

using pera::for_lanes;

constexpr int64_t kGrain = 16; // rows

template <typename T>
void copy(T* to, const T* from, int64_t n) {
  std::memcpy(static_cast<void*>(to), from, n * sizeof(T));
}

at::Tensor mask_tokens(
    const at::Tensor& tokens_,
    const at::Tensor& mask_token_,
    const at::Tensor& pos_,
    const at::Tensor& index_) {
  const at::Tensor tokens = tokens_.contiguous(), mask_token = pera::floats(mask_token_), pos = pera::floats(pos_);
  const at::Tensor index = pera::patch_numbers(index_, pos.size(0) - 1);
  const int64_t sequences = index.size(0), added = index.size(1), dim = tokens.size(1);
  TORCH_CHECK_VALUE(sequences > 0 && tokens.size(0) % sequences == 0, "tokens are not sequences of equal length");
  TORCH_CHECK_VALUE(mask_token.numel() == dim && pos.size(1) == dim, "mask_token and pos must have D values a row");
  const int64_t length = tokens.size(0) / sequences, grown = length + added;
  at::Tensor out = at::empty({sequences * grown, dim}, tokens.options());
  const int64_t* patch = index.const_data_ptr<int64_t>();
  const float *mask = mask_token.const_data_ptr<float>(), *position = pos.const_data_ptr<float>();
  PERA_DISPATCH_LANES(tokens.scalar_type(), "mask_tokens", [&] {
    const scalar_t* from = tokens.const_data_ptr<scalar_t>();
    scalar_t* result = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, sequences * grown, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t sequence = row / grown, i = row % grown;
        if (i < length) { // as many rows at once as there are
          const int64_t rows = std::min(length - i, end - row);
          copy(result + row * dim, from + (sequence * length + i) * dim, rows * dim);
          row += rows - 1;
          continue;
        }
        const float* added_position = position + (1 + patch[sequence * added + i - length]) * dim;
        scalar_t* to = result + row * dim;
        for_lanes(dim, [&](int64_t c, auto lanes, auto) {
          lanes.store(to + c, lanes.load(mask + c) + lanes.load(added_position + c));
        });
      }
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mask_tokens_backward(
    const at::Tensor& grad_,
    const at::Tensor& pos,
    const at::Tensor& index_) {
  const at::Tensor grad = grad_.contiguous(), index = pera::patch_numbers(index_, pos.size(0) - 1);
  const int64_t sequences = index.size(0), added = index.size(1), dim = grad.size(1);
  TORCH_CHECK_VALUE(sequences > 0 && grad.size(0) % sequences == 0, "grad holds no sequences of equal length");
  const int64_t grown = grad.size(0) / sequences, length = grown - added;
  TORCH_CHECK_VALUE(length >= 0 && pos.size(1) == dim, "grad must hold the grown sequences and pos D values a row");
  at::Tensor grad_tokens = at::empty({sequences * length, dim}, grad.options());
  at::Tensor grad_pos = at::empty(pos.sizes(), pos.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  at::Tensor grad_mask = at::empty({dim}, grad_pos.options());
  const pera::RowsOfPositions rows(index, pos.size(0), grown, length, /*cls=*/false);
  PERA_DISPATCH_LANES(grad.scalar_type(), "mask_tokens_backward", [&] {
    const scalar_t* from = grad.const_data_ptr<scalar_t>();
    scalar_t* to = grad_tokens.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, sequences, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        copy(to + i * length * dim, from + i * grown * dim, length * dim);
      }
    });
    pera::sum_positions<scalar_t>(
        from, rows, dim, grad_pos.mutable_data_ptr<float>(), grad_mask.mutable_data_ptr<float>(), nullptr);
  });
  const auto type = pos.scalar_type();
  return {grad_tokens, grad_mask.to(type), grad_pos.to(type)};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def("mask_tokens(Tensor tokens, Tensor mask_token, Tensor pos, Tensor index) -> Tensor");
  m.def("mask_tokens_backward(Tensor grad, Tensor pos, Tensor index) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("mask_tokens", &mask_tokens);
  m.impl("mask_tokens_backward", &mask_tokens_backward);
}
