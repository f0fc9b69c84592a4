"""C++ text of the operator attend: attention to a cache."""

ATTENTION = r"""
struct AttendName { static constexpr const char* name = "bwla::attend"; };
using AttendRoute = Route<AttendName, Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, double, bool,
                                             const Maybe&, const Maybe&)>;

// Floats [batch, tokens, heads, size] in any order but that of channels, by address: making tensors of them costs as
// much as the attention of a small model. data is null where a tensor does not fit.
struct Heads {
  const float* data = nullptr;
  int64_t batch = 0, tokens = 0, heads = 0, size = 0, by_batch = 0, by_token = 0, by_head = 0;

  // Of a tensor with these axes.
  Heads(const Tensor& t, int64_t token_axis, int64_t head_axis) {
    if (!dense_cpu(t) || t.scalar_type() != at::kFloat || t.dim() != 4 || t.numel() == 0 || t.stride(3) != 1) return;
    batch = t.size(0), tokens = t.size(token_axis), heads = t.size(head_axis), size = t.size(3);
    by_batch = t.stride(0), by_token = t.stride(token_axis), by_head = t.stride(head_axis);
    data = t.const_data_ptr<float>();
  }

  // Of n heads from channel `first` on of x [batch, tokens, channels], or of x with heads apart.
  Heads(const Tensor& x, int64_t first, int64_t n, int64_t size) : heads(n), size(size), by_head(size) {
    if (!dense_cpu(x) || x.scalar_type() != at::kFloat || x.dim() < 3 || !x.is_contiguous() || x.numel() == 0) return;
    batch = x.size(0), tokens = x.size(1), by_token = x.numel() / (batch * tokens), by_batch = tokens * by_token;
    if (first >= 0 && first + n * size <= by_token) data = x.const_data_ptr<float>() + first;
  }

  bool is_like(const Heads& other, int64_t n) const {
    return data && batch == other.batch && tokens == other.tokens && heads == n && size == other.size;
  }
};

// Whether these are keys or values that queries can read, with their scales where they are codes.
bool is_cache(const Tensor& t, const Maybe& scale, const Heads& x, const Tensor& like) {
  const auto type = t.scalar_type();
  const bool codes = type == at::kChar, one = x.tokens == 1;
  if (!dense_cpu(t) || t.dim() != 4 || !(type == at::kFloat || (one && (codes || type == at::kBFloat16)))) return false;
  if (t.sizes() != like.sizes() || type != like.scalar_type() || t.stride(-1) != 1) return false;
  if (codes != scale.has_value() || t.size(0) != x.batch || t.size(3) != x.size || t.size(1) == 0) return false;
  if (x.heads % t.size(1) != 0) return false;
  return !scale || (dense_cpu(*scale) && scale->scalar_type() == at::kFloat && scale->dim() == 4 &&
                    scale->sizes().slice(0, 3) == t.sizes().slice(0, 3) && scale->size(3) == 1);
}

// Whether this is added to scores, or says which of them count.
bool is_mask(const Maybe& mask, const Heads& x, int64_t length) {
  if (!mask) return true;
  const Tensor& m = *mask;
  if (!dense_cpu(m) || (m.scalar_type() != at::kFloat && m.scalar_type() != at::kBool)) return false;
  return m.dim() == 4 && m.size(2) == x.tokens && m.size(3) == length && (length == 1 || m.stride(3) == 1) &&
         (m.size(0) == x.batch || m.size(0) == 1) && (m.size(1) == x.heads || m.size(1) == 1);
}

Cached cached(const Tensor& t, const Maybe& scale) {
  Cached c{t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), nullptr, 0, 0, 0};
  if (scale) {
    c.scale = scale->const_data_ptr<float>();
    c.scale_batch = scale->stride(0), c.scale_head = scale->stride(1), c.scale_token = scale->stride(2);
  }
  return c;
}

bool attends(const Heads& query, const Tensor& key, const Tensor& value, const Maybe& mask, bool causal,
             const Maybe& key_scale, const Maybe& value_scale) {
  return query.data && is_cache(key, key_scale, query, value) &&
         is_cache(value, value_scale, query, key) && key.size(2) > 0 && is_mask(mask, query, key.size(2)) &&
         !(causal && mask);
}

// Attention to operands that fit, to y [batch, tokens, heads, size]; cos and sin turn queries of several tokens.
void attend_to(const Heads& query, const Tensor& key, const Tensor& value, const Maybe& mask, double scale, bool causal,
               const Maybe& key_scale, const Maybe& value_scale, float* y, const Maybe& cos = {},
               const Maybe& sin = {}) {
  Attention a{};
  if (cos) {
    a.cos = cos->const_data_ptr<float>(), a.sin = sin->const_data_ptr<float>();
    a.turn_batch = cos->size(0) == 1 ? 0 : cos->stride(0), a.turn_token = cos->stride(1);
  }
  a.queries = query.data;
  a.query_batch = query.by_batch, a.query_head = query.by_head, a.query_token = query.by_token;
  if (mask) {
    a.mask = mask->const_data_ptr(), a.mask_bytes = mask->element_size(), a.mask_token = mask->stride(2);
    a.mask_batch = mask->size(0) == 1 ? 0 : mask->stride(0), a.mask_head = mask->size(1) == 1 ? 0 : mask->stride(1);
  }
  a.y = y;
  a.keys = cached(key, key_scale), a.values = cached(value, value_scale);
  a.batch = query.batch, a.heads = key.size(1), a.group = query.heads / key.size(1), a.tokens = query.tokens;
  a.length = key.size(2), a.size = query.size, a.bytes = key.element_size(), a.scale = (float)scale;
  a.causal = causal && a.tokens > 1;
  kernels.attend(&a, at::get_num_threads());
}

Tensor attend(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& mask, double scale,
              bool causal, const Maybe& key_scale, const Maybe& value_scale) {
  const bool good = is_input(query) && query.dim() == 4 && query.numel() > 0;
  const Tensor floats = good && !(query.scalar_type() == at::kFloat && query.stride(3) == 1) ? plain(query) : query;
  const Heads rows(floats, 2, 1);
  if (!good || !attends(rows, key, value, mask, causal, key_scale, value_scale))
    return AttendRoute::portable(query, key, value, mask, scale, causal, key_scale, value_scale);
  Tensor y = new_floats({rows.batch, rows.tokens, rows.heads, rows.size});
  attend_to(rows, key, value, mask, scale, causal, key_scale, value_scale, y.mutable_data_ptr<float>());
  return typed_like(y.transpose(1, 2), query);
}
"""
