// Products over the neighbours that a table names, straight from where the rows lie. Sums of bfloat16 numbers, where the
// processor has such products, are float32 until they are complete.
#pragma once

#include "../checks.h"

namespace sparkme {

// out (N, C_out): for each row of the table (N, K) the sum over its neighbours of their rows (.., C_in) times the tap's kernel;
// kernel (K, C_in / groups, C_out). With `transposed`, which is the rows' gradient, rows have C_out channels and out C_in.
Tensor sum_of_products(const Tensor &rows, const Tensor &kernel, const Tensor &table, int64_t groups, bool transposed);

// (K, C_left / groups, C_right): for each tap the sum over the table's rows of their neighbour's left row, transposed, times
// their right row.
Tensor outer_products(const Tensor &left, const Tensor &right, const Tensor &table, int64_t groups);

// left' (C_left, N) times right (N, C_right).
Tensor outer_product(const Tensor &left, const Tensor &right);

// The same, added to sums (C_left, C_right), or instead of them.
void add_outer_product(const Tensor &left, const Tensor &right, const Tensor &sums, bool first);

}  // namespace sparkme
