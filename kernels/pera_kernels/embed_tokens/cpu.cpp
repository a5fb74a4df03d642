// Native CPU kernels of `embed_tokens`: what stands around the matrix product, which is PyTorch's.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "position_sums.h"

namespace {

using pera::for_lanes;

constexpr int64_t kGrain = 16; // rows

// product [N * n, D] -> tokens [N * (1 + n), D]: bias and position added, cls in front of each sequence; rounded once.
at::Tensor embed_tokens_pack(
    const at::Tensor& product_,
    const at::Tensor& bias_,
    const at::Tensor& pos_,
    const at::Tensor& cls_,
    const at::Tensor& index_) {
  const at::Tensor product = product_.contiguous(), bias = pera::floats(bias_), pos = pera::floats(pos_);
  const at::Tensor cls = pera::floats(cls_), index = pera::patch_numbers(index_, pos.size(0) - 1);
  const int64_t n = index.size(1), length = 1 + n, dim = product.size(1);
  TORCH_CHECK_VALUE(product.size(0) == index.numel(), "product must have a row for each patch of index");
  TORCH_CHECK_VALUE(
      bias.numel() == dim && cls.numel() == dim && pos.size(1) == dim, "bias, cls and pos must have D values a row");
  at::Tensor tokens = at::empty({index.size(0) * length, dim}, product.options());
  const int64_t* patch = index.const_data_ptr<int64_t>();
  const float *bias_row = bias.const_data_ptr<float>(), *cls_row = cls.const_data_ptr<float>();
  const float* positions = pos.const_data_ptr<float>();
  PERA_DISPATCH_LANES(product.scalar_type(), "embed_tokens_pack", [&] {
    const scalar_t* patches = product.const_data_ptr<scalar_t>();
    scalar_t* result = tokens.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, index.size(0) * length, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        scalar_t* __restrict__ to = result + row * dim;
        const int64_t sequence = row / length, j = row % length - 1;
        if (j < 0) {
          for_lanes(dim, [&](int64_t c, auto lanes, auto) {
            lanes.store(to + c, lanes.load(cls_row + c) + lanes.load(positions + c));
          });
          continue;
        }
        const scalar_t* from = patches + (sequence * n + j) * dim;
        const float* position = positions + (1 + patch[sequence * n + j]) * dim;
        for_lanes(dim, [&](int64_t c, auto lanes, auto) {
          lanes.store(to + c, lanes.load(from + c) + lanes.load(bias_row + c) + lanes.load(position + c));
        });
      }
    });
  });
  return tokens;
}

// grad [N * (1 + n), D] -> its rows of patches [N * n, D] for the gradient of the projection, the gradients of bias [D]
// and of pos [1 + L, D], both in the dtype of pos. The gradient of cls is that of pos[0].
std::tuple<at::Tensor, at::Tensor, at::Tensor> embed_tokens_sums(
    const at::Tensor& grad_,
    const at::Tensor& pos,
    const at::Tensor& index_) {
  const at::Tensor grad = grad_.contiguous(), index = pera::patch_numbers(index_, pos.size(0) - 1);
  const int64_t length = 1 + index.size(1), dim = grad.size(1);
  TORCH_CHECK_VALUE(
      grad.size(0) == index.size(0) * length && pos.size(1) == dim, "grad must hold the packed tokens of index");
  at::Tensor patches = at::empty({index.numel(), dim}, grad.options());
  at::Tensor grad_pos = at::empty(pos.sizes(), pos.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  at::Tensor grad_bias = at::empty({dim}, grad_pos.options());
  const pera::RowsOfPositions rows(index, pos.size(0), length, 1, /*cls=*/true);
  PERA_DISPATCH_LANES(grad.scalar_type(), "embed_tokens_sums", [&] {
    pera::sum_positions(
        grad.const_data_ptr<scalar_t>(), rows, dim, grad_pos.mutable_data_ptr<float>(),
        grad_bias.mutable_data_ptr<float>(), patches.mutable_data_ptr<scalar_t>());
  });
  const auto type = pos.scalar_type();
  return {patches, grad_bias.to(type), grad_pos.to(type)};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def("embed_tokens_pack(Tensor product, Tensor bias, Tensor pos, Tensor cls, Tensor index) -> Tensor");
  m.def("embed_tokens_sums(Tensor grad, Tensor pos, Tensor index) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("embed_tokens_pack", &embed_tokens_pack);
  m.impl("embed_tokens_sums", &embed_tokens_sums);
}
