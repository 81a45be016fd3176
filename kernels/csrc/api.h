// The C interface of the library: plain structs of pointers and strides, mirrored by ctypes in
// kvrelay_kernels/cpu/native/library.py. Strides are in elements. Knows nothing of torch or Python.
#pragma once
#include <cstdint>

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1 };

enum Status : int32_t {
  kOk = 0,
  kBadLengths = 1,    // cu_seqlens_q and seq_lens disagree with each other or with the table
  kBadTable = 2,      // a used block_table entry is no page
  kBadSelection = 3,  // a listed block lies outside its sequence
  kBadToken = 4,      // a token id outside the vocabulary
};

// One layer's paged keys and values: K and V are [num_blocks, num_kv_heads, 64, head_dim].
struct PagedKV {
  const void *k, *v;
  int64_t k_stride[3], v_stride[3];  // block, head, token; channels are contiguous
  const int32_t *block_table;        // [batch, max_blocks]
  const int32_t *seq_lens;           // [batch]
  int64_t table_stride, batch, max_blocks, num_blocks;
  int32_t num_kv_heads, head_dim, dtype, num_threads;
};

// Query rows [total_q, num_q_heads, head_dim]; cu_seqlens_q null means decode, one row a sequence.
struct Queries {
  const void *q;
  int64_t q_stride[2];  // row, head
  const int32_t *cu_seqlens_q;
  int64_t total_q;
  int32_t num_q_heads;
  float scale;
};

// Lists of blocks [slots, num_kv_heads, budget]; indices null means dense.
struct Lists {
  int32_t *indices, *counts;
  const int32_t *cu_q_blocks;
  int64_t budget;
};

struct Outputs {
  void *out;   // contiguous, like q
  float *lse;  // [total_q, num_q_heads]
};

// Statistics, contiguous [num_blocks, num_kv_heads, head_dim] (spread without the last), dtype of K.
struct Stats {
  void *mean, *minimum, *maximum, *spread, *coarse_minimum, *coarse_maximum;
};

struct TreeConfig {
  int64_t budget, sink_blocks, local_blocks, num_candidates, beam, sampled_queries, sibling_blocks, by_peak;
  double top_p;  // above 1: none
};

// Packed weights of a linear layer; num_in is even. `bias` may be null.
struct Linear {
  const void *weight;
  const float *bias;
  int64_t num_in, num_out;
  int32_t dtype;
};

// A decoder layer. gate_up holds the panels of gate and up alternately, its outputs counted with padding;
// qk_norm [num_q_heads + num_kv_heads, head_dim] may be null.
struct Layer {
  const float *input_norm, *qk_norm, *mlp_norm;
  Linear qkv, output, gate_up, down;
};

// A Llama-like decoder. `embedding` is packed too, and may be the head.
struct Model {
  const Layer *layers;
  Linear embedding, head;
  const float *norm, *inverse_frequencies;  // [hidden], [head_dim / 2]
  int64_t hidden, intermediate, vocab;
  int32_t num_layers, num_q_heads, num_kv_heads, head_dim, num_threads;
  float eps, rotary_factor;
};

// By what the queries of a step select. Heads of a KV group share a list, or each has its own.
struct Selecting {
  const TreeConfig *config;
  const uint8_t *dense_layers;  // [num_layers], not 0: reads everything
  int64_t *counts;              // [batch], blocks in the lists of all layers
  int32_t lists_per_group;      // 1, or the heads of a group
};

// One token of each of `batch` sequences. seq_lens count the new token; pages and statistics are those of every
// layer. `stats` null: none are kept; `selecting` null: everything is read.
struct Step {
  const int32_t *token_ids, *seq_lens, *block_table;
  const void *const *k_pages, *const *v_pages;
  int64_t k_stride[3], v_stride[3];
  int64_t batch, table_stride, max_blocks, num_blocks;
  int32_t kv_dtype;
  float *logits;  // [batch, vocab]
  const Stats *stats;
  const Selecting *selecting;
};

extern "C" {
int32_t kvr_supported();
uint32_t kvr_sources();  // CRC-32 of the files it was compiled from: setup.py and library.py compute it
int32_t kvr_prefill(const PagedKV *, const Queries *, const Lists *, const Outputs *);
int32_t kvr_decode(const PagedKV *, const Queries *, const Lists *, const Outputs *);
int32_t kvr_merge(const void *outs, const float *lses, int64_t splits, int64_t rows, int64_t head_dim,
                  int32_t dtype, int32_t num_threads, void *out, float *lse);
int32_t kvr_update_stats(const PagedKV *, const Stats *, const int32_t *num_new_tokens);
// `to` may be null. Else attention over the lists goes there, which is for prefill of heads with lists of their own
// that all rows of a block rank: as many query heads as KV heads, sampled_queries 64.
int32_t kvr_select_tree(const PagedKV *, const Queries *, const Stats *, const TreeConfig *, const Lists *,
                        const Outputs *to);
int64_t kvr_panel();
int32_t kvr_pack(const void *weights, const Linear *, void *to, int32_t num_threads);
int32_t kvr_linear(const float *x, int64_t rows, const Linear *, int32_t num_threads, float *out);
int32_t kvr_embed(const Model *, const int64_t *token_ids, int64_t rows, float *out);
int32_t kvr_rotary(const Model *, const int64_t *positions, int64_t rows, float *out);
int32_t kvr_before_attention(const Model *, int32_t layer, const float *hidden, const float *rotary, int64_t rows,
                             float *qkv);
int32_t kvr_after_attention(const Model *, int32_t layer, const float *attended, int64_t rows, float *hidden);
int32_t kvr_last_norm(const Model *, const float *hidden, int64_t rows, float *out);
int32_t kvr_step(const Model *, const Step *);
double kvr_sum_of_weights(const float *x, int64_t count, double temperature);
}
