// Attention of one head of one sequence in bfloat16: avx512.cpp has the kernels, cpu.cpp calls them.
//
// Plain C, as avx512.cpp includes it: see CMakeLists.txt.
#pragma once

#include <stdint.h>

namespace pera {

// Whose products.
enum class Engine { kAvx512Bf16, kAmx };

// A matrix of bfloat16 whose rows are contiguous: one head of a sequence.
struct HeadRows {
  const uint16_t* data;
  int64_t stride; // of rows, in values
};
struct HeadRowsOut {
  uint16_t* data;
  int64_t stride;
};
struct HeadSums { // one float a query
  float* data;
  int64_t stride;
};

struct AttentionShape {
  int64_t queries, keys;
  int64_t dim; // of the head: a multiple of 32
  float scale; // of the scores
};

// Bytes of scratch memory that a call needs, aligned to 64.
int64_t attention_scratch(AttentionShape shape);
int64_t attention_backward_scratch(AttentionShape shape);

// For each thread, before its first call and after its last.
void attention_begin(Engine engine);
void attention_end(Engine engine);

// out = softmax(scale q k') v; lse = log-sum-exp of each query's scaled scores.
void attention_head(
    Engine engine,
    AttentionShape shape,
    HeadRows q,
    HeadRows k,
    HeadRows v,
    HeadRowsOut out,
    HeadSums lse,
    void* scratch);

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
    void* scratch);

} // namespace pera
