// Selection and sparse attention inside a decode step: the same kernels as one by one. With a list for each
// head of a group, every head is a sequence of its own over the same pages.
#pragma once
#include <numeric>
#include <vector>

#include "decode.h"
#include "row_selection.h"

namespace {

class SelectedBatch {
 public:
  SelectedBatch(const Model &m, const Step &step) : step_(step), kv_heads_(m.num_kv_heads), d_(m.head_dim) {
    if (!step.selecting) return;
    copies_ = step.selecting->lists_per_group, heads_ = m.num_q_heads / copies_;
    for (int copy = 0; copy < copies_; ++copy) {
      lengths_.insert(lengths_.end(), step.seq_lens, step.seq_lens + step.batch);
      for (int64_t b = 0; b < step.batch; ++b) {
        const int32_t *row = step.block_table + b * step.table_stride;
        table_.insert(table_.end(), row, row + step.max_blocks);
      }
    }
    const size_t lists = lengths_.size() * kv_heads_;
    indices_.resize(lists * step.selecting->config->budget), counts_.resize(lists);
    slots_.resize(lengths_.size() + 1);
    std::iota(slots_.begin(), slots_.end(), 0);
    std::fill_n(step.selecting->counts, step.batch, 0);
  }

  bool selects(int layer) const { return step_.selecting && !step_.selecting->dense_layers[layer]; }

  // q and out [batch, num_q_heads, head_dim]
  template <class T>
  void attend(PagedKV kv, int layer, const T *q, float scale, T *out) {
    kv.block_table = table_.data(), kv.seq_lens = lengths_.data();
    kv.table_stride = step_.max_blocks, kv.batch = int64_t(lengths_.size());
    const int64_t width = int64_t(heads_) * d_;
    std::vector<T> rows(kv.batch * width), found(kv.batch * width);
    std::vector<float> lse(kv.batch * heads_);
    for_heads([&](int64_t from, int64_t to) { std::copy_n(q + from, d_, &rows[to]); });
    const Queries queries{rows.data(), {width, d_}, nullptr, kv.batch, heads_, scale};
    const Lists lists{indices_.data(), counts_.data(), slots_.data(), step_.selecting->config->budget};
    select_by_row<T>(kv, queries, step_.stats[layer], *step_.selecting->config, lists);
    decode<T>(kv, queries, lists, Outputs{found.data(), lse.data()});
    for_heads([&](int64_t to, int64_t from) { std::copy_n(&found[from], d_, out + to); });
    for (size_t i = 0; i < counts_.size(); ++i)
      step_.selecting->counts[int64_t(i) / kv_heads_ % step_.batch] += counts_[i];
  }

 private:
  // Where each head of each sequence lies among the batch's queries, and among those that share lists.
  template <class F>
  void for_heads(F f) const {
    const int group = heads_ / kv_heads_;  // that share a list
    for (int copy = 0; copy < copies_; ++copy)
      for (int64_t b = 0; b < step_.batch; ++b)
        for (int head = 0; head < heads_; ++head) {
          const int first = head / group * group * copies_, own = head % group * copies_ + copy;
          f(((b * copies_ * heads_) + first + own) * d_, ((copy * step_.batch + b) * heads_ + head) * d_);
        }
  }

  const Step &step_;
  const int kv_heads_, d_;
  int copies_ = 1, heads_ = 0;
  std::vector<int32_t> table_, lengths_, indices_, counts_, slots_;
};

}  // namespace
