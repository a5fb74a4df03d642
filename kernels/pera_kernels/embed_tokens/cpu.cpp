// Native CPU kernels of `embed_tokens`: what stands around the matrix product, which is PyTorch's.

#include <tuple>

#include "position_sums.h"

namespace pera {
namespace {

constexpr int64_t kGrain = 16; // rows

// product [N * n, D] -> tokens [N * (1 + n), D]: bias and position added, cls in front of each sequence; rounded once.
Tensor embed_tokens_pack(
    const Tensor& product_,
    const Tensor& bias_,
    const Tensor& pos_,
    const Tensor& cls_,
    const Tensor& index_) {
  const Tensor product = as_contiguous(product_), bias = floats(bias_), pos = floats(pos_);
  const Tensor cls = floats(cls_), index = patch_numbers(index_, pos.size(0) - 1);
  const int64_t n = index.size(1), length = 1 + n, dim = product.size(1);
  check_value(product.size(0) == index.numel(), "product must have a row for each patch of index");
  check_value(
      bias.numel() == dim && cls.numel() == dim && pos.size(1) == dim, "bias, cls and pos must have D values a row");
  Tensor tokens = new_empty(product, {index.size(0) * length, dim});
  const int64_t* patch = index.const_data_ptr<int64_t>();
  const float *bias_row = bias.const_data_ptr<float>(), *cls_row = cls.const_data_ptr<float>();
  const float* positions = pos.const_data_ptr<float>();
  dispatch(product.scalar_type(), "embed_tokens_pack", [&]<typename T>(T) {
    const T* patches = product.const_data_ptr<T>();
    T* result = tokens.mutable_data_ptr<T>();
    parallel_for(0, index.size(0) * length, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* __restrict__ to = result + row * dim;
        const int64_t sequence = row / length, j = row % length - 1;
        if (j < 0) {
          for_lanes(dim, [&](int64_t c, auto lanes, auto) {
            lanes.store(to + c, lanes.load(cls_row + c) + lanes.load(positions + c));
          });
          continue;
        }
        const T* from = patches + (sequence * n + j) * dim;
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
std::tuple<Tensor, Tensor, Tensor> embed_tokens_sums(const Tensor& grad_, const Tensor& pos, const Tensor& index_) {
  const Tensor grad = as_contiguous(grad_), index = patch_numbers(index_, pos.size(0) - 1);
  const int64_t length = 1 + index.size(1), dim = grad.size(1);
  check_value(
      grad.size(0) == index.size(0) * length && pos.size(1) == dim, "grad must hold the packed tokens of index");
  Tensor patches = new_empty(grad, {index.numel(), dim});
  Tensor grad_pos = new_empty(pos, pos.sizes(), ScalarType::Float);
  Tensor grad_bias = new_empty(grad_pos, {dim});
  const RowsOfPositions rows(index, pos.size(0), length, 1, /*cls=*/true);
  dispatch(grad.scalar_type(), "embed_tokens_sums", [&]<typename T>(T) {
    sum_positions(
        grad.const_data_ptr<T>(), rows, dim, grad_pos.mutable_data_ptr<float>(),
        grad_bias.mutable_data_ptr<float>(), patches.mutable_data_ptr<T>());
  });
  const auto type = pos.scalar_type();
  return {patches, as_type(grad_bias, type), as_type(grad_pos, type)};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pera_native, m) {
  m.def("embed_tokens_pack(Tensor product, Tensor bias, Tensor pos, Tensor cls, Tensor index) -> Tensor");
  m.def("embed_tokens_sums(Tensor grad, Tensor pos, Tensor index) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pera_native, CPU, m) {
  m.impl("embed_tokens_pack", TORCH_BOX(&embed_tokens_pack));
  m.impl("embed_tokens_sums", TORCH_BOX(&embed_tokens_sums));
}

} // namespace pera
