// ai3::attention: what the dispatcher calls it with, brought to the matrices that its algorithms read.
#include <utility>
#include <vector>

#include "device.h"

namespace ai3 {
namespace {

// Its memory is [...,L,H,F]: the features of all heads of a query lie together, as the linear behind attention reads
// them.
Tensor empty_attended(const Tensor& query, int64_t width) {
  const int64_t ndim = query.dim();
  std::vector<int64_t> sizes(query.sizes().begin(), query.sizes().end()), strides(sizes.size());
  sizes.back() = width;
  std::vector<int64_t> order;  // from the innermost dimension outwards
  for (int64_t d = ndim - 1; d >= 0; --d) order.push_back(d);
  if (ndim > 2) std::swap(order[1], order[2]);
  int64_t stride = 1;
  for (int64_t d : order) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t dtype = 0;
  AI3_CALL(aoti_torch_get_dtype(query.get(), &dtype));
  return empty_strided(place_of(query), dtype, sizes, strides);
}

// With elements of the last dimension beside each other.
Tensor dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : torch::stable::contiguous(t);
}

// A term of the scores, broadcast to them by strides of 0.
ai3_tensor score_view(const char* op, const Tensor& term, const Tensor& query, int64_t keys) {
  const int64_t ndim = query.dim(), missing = ndim - term.dim();
  AI3_CHECK(missing >= 0 && term.dim() >= 1 && term.size(term.dim() - 1) == keys, op,
            ": what is added to the scores has not their ", keys, " columns");
  ai3_tensor view{};
  view.data = const_cast<void*>(term.const_data_ptr());
  view.ndim = static_cast<int32_t>(ndim);
  for (int64_t d = 0; d < ndim; ++d) {
    const int64_t size = d < missing ? 1 : term.size(d - missing), all = d == ndim - 1 ? keys : query.size(d);
    AI3_CHECK(size == all || size == 1, op, ": what is added to the scores has ", size, " elements in dimension ", d,
              ", where they have ", all);
    view.size[d] = all;
    view.stride[d] = size == 1 ? 0 : term.stride(d - missing);
  }
  view.stride[ndim - 1] = 1;
  return view;
}

}  // namespace

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias,
                 const OptionalTensor& mask, double scale, bool is_causal, bool masked_is_zero, int64_t algorithm) {
  const char* op = "ai3::attention";
  const int64_t ndim = query.dim();
  AI3_CHECK(ndim >= 2 && ndim <= AI3_MAX_DIMS && key.dim() == ndim && value.dim() == ndim, op,
            ": expected query [...,L,E], key [...,S,E] and value [...,S,F] of the same number of dimensions, at most ",
            AI3_MAX_DIMS, ", got ", ndim, ", ", key.dim(), " and ", value.dim());
  for (int64_t d = 0; d < ndim - 2; ++d) {
    AI3_CHECK(query.size(d) == key.size(d) && query.size(d) == value.size(d), op,
              ": query, key and value differ in dimension ", d);
  }
  const int64_t keys = key.size(ndim - 2);
  AI3_CHECK(query.size(ndim - 1) == key.size(ndim - 1), op, ": queries of ", query.size(ndim - 1),
            " features do not fit keys of ", key.size(ndim - 1));
  AI3_CHECK(value.size(ndim - 2) == keys, op, ": ", keys, " keys do not fit ", value.size(ndim - 2), " values");
  check_like(op, "key", query, key);
  check_like(op, "value", query, value);
  check_like(op, "bias", query, bias);
  check_like(op, "mask", query, mask);

  const LoadedKernel& kernel = find_kernel(algorithm);
  Tensor result = empty_attended(query, value.size(ndim - 1));
  const Tensor q = dense_rows(query), k = dense_rows(key), v = dense_rows(value);
  const OptionalTensor terms[] = {bias ? OptionalTensor(dense_rows(*bias)) : bias,
                                  mask ? OptionalTensor(dense_rows(*mask)) : mask};
  ai3_args args{};
  set_device(args, kernel, query, true);
  args.input = any_view(q);
  args.key = any_view(k);
  args.value = any_view(v);
  args.output = any_view(result);
  if (terms[0]) args.score_bias = score_view(op, *terms[0], query, keys);
  if (terms[1]) args.score_mask = score_view(op, *terms[1], query, keys);
  args.scale = scale;
  args.is_causal = is_causal;
  args.masked_is_zero = masked_is_zero;
  check_supported(kernel, args);
  if (result.numel() > 0) run_ready(kernel, algorithm, args);
  return result;
}

}  // namespace ai3
