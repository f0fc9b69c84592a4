"""C++ text of the operator attend: attention to a cache."""

ATTENTION = r"""
struct AttendName { static constexpr const char* name = "bwla::attend"; };
using AttendRoute = Route<AttendName, Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, double, bool,
                                             const Maybe&, const Maybe&)>;

// Whether these are keys or values that queries of x can read, with their scales where they are codes.
bool is_cache(const Tensor& t, const Maybe& scale, const Tensor& x, const Tensor& like) {
  const auto type = t.scalar_type();
  const bool codes = type == at::kChar, one = x.size(2) == 1;
  if (!dense_cpu(t) || t.dim() != 4 || !(type == at::kFloat || (one && (codes || type == at::kBFloat16)))) return false;
  if (t.sizes() != like.sizes() || type != like.scalar_type() || t.stride(-1) != 1) return false;
  if (codes != scale.has_value() || t.size(0) != x.size(0) || t.size(3) != x.size(3) || t.size(1) == 0) return false;
  if (x.size(1) % t.size(1) != 0) return false;
  return !scale || (dense_cpu(*scale) && scale->scalar_type() == at::kFloat && scale->dim() == 4 &&
                    scale->sizes().slice(0, 3) == t.sizes().slice(0, 3) && scale->size(3) == 1);
}

// Whether this is added to scores, or says which of them count.
bool is_mask(const Maybe& mask, const Tensor& x, int64_t length) {
  if (!mask) return true;
  const Tensor& m = *mask;
  if (!dense_cpu(m) || (m.scalar_type() != at::kFloat && m.scalar_type() != at::kBool)) return false;
  return m.dim() == 4 && m.size(2) == x.size(2) && m.size(3) == length && (length == 1 || m.stride(3) == 1) &&
         (m.size(0) == x.size(0) || m.size(0) == 1) && (m.size(1) == x.size(1) || m.size(1) == 1);
}

Cached cached(const Tensor& t, const Maybe& scale) {
  Cached c{t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), nullptr, 0, 0, 0};
  if (scale) {
    c.scale = scale->const_data_ptr<float>();
    c.scale_batch = scale->stride(0), c.scale_head = scale->stride(1), c.scale_token = scale->stride(2);
  }
  return c;
}

bool attends(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& mask, bool causal,
             const Maybe& key_scale, const Maybe& value_scale) {
  return is_input(query) && query.dim() == 4 && query.numel() > 0 && kernels.attends(query.size(2)) &&
         is_cache(key, key_scale, query, value) && is_cache(value, value_scale, query, key) && key.size(2) > 0 &&
         is_mask(mask, query, key.size(2)) && !(causal && mask);
}

// Attention to operands that fit: [batch, tokens, heads, size] float32, contiguous.
Tensor attended(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& mask, double scale,
                bool causal, const Maybe& key_scale, const Maybe& value_scale) {
  const Tensor rows = query.scalar_type() == at::kFloat && query.stride(3) == 1 ? query : plain(query);
  Tensor y = new_floats({query.size(0), query.size(2), query.size(1), query.size(3)});
  Attention a{};
  a.queries = rows.const_data_ptr<float>();
  a.query_batch = rows.stride(0), a.query_head = rows.stride(1), a.query_token = rows.stride(2);
  if (mask) {
    a.mask = mask->const_data_ptr(), a.mask_bytes = mask->element_size(), a.mask_token = mask->stride(2);
    a.mask_batch = mask->size(0) == 1 ? 0 : mask->stride(0), a.mask_head = mask->size(1) == 1 ? 0 : mask->stride(1);
  }
  a.y = y.mutable_data_ptr<float>();
  a.keys = cached(key, key_scale), a.values = cached(value, value_scale);
  a.batch = query.size(0), a.heads = key.size(1), a.group = query.size(1) / key.size(1), a.tokens = query.size(2);
  a.length = key.size(2), a.size = query.size(3), a.bytes = key.element_size(), a.scale = (float)scale;
  a.causal = causal && a.tokens > 1;
  kernels.attend(&a, at::get_num_threads());
  return y;
}

Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& mask, double scale,
              bool causal, const Maybe& key_scale, const Maybe& value_scale) {
  if (!attends(query, key, value, mask, causal, key_scale, value_scale))
    return AttendRoute::portable(query, key, value, mask, scale, causal, key_scale, value_scale);
  return typed_like(
      attended(query, key, value, mask, scale, causal, key_scale, value_scale).transpose(1, 2), query);
}
"""
