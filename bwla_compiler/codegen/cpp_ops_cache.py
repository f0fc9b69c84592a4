"""C++ text of the operator cached_attention: RoPE, writing to a static cache, and attention to it."""

CACHE = r"""
struct CachedAttentionName { static constexpr const char* name = "bwla::cached_attention"; };
using CachedAttentionRoute =
    Route<CachedAttentionName,
          Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Tensor&, const Tensor&,
                 const Tensor&, const Maybe&, double, const Maybe&, const Maybe&, const Maybe&)>;

// Whether these are rows [batch, tokens, heads, size] of floats.
bool are_rows(const Tensor& t, const Tensor& query, int64_t heads) {
  return dense_cpu(t) && t.scalar_type() == at::kFloat && t.dim() == 4 && t.size(0) == query.size(0) &&
         t.size(1) == query.size(1) && t.size(2) == heads && t.size(3) == query.size(3) && t.stride(3) == 1;
}

// Whether these are sines or cosines of the angles by which rows are turned.
bool are_turns(const Maybe& t, const Tensor& query) {
  return !t || (dense_cpu(*t) && t->scalar_type() == at::kFloat && t->dim() == 3 && t->size(1) == query.size(1) &&
                t->size(2) == query.size(3) && query.size(3) % 2 == 0 && t->stride(2) == 1 &&
                (t->size(0) == 1 || t->size(0) == query.size(0)));
}

// The place of the first token in a cache of so many; -1 where they do not all fit.
int64_t first_place(const Tensor& start, int64_t tokens, int64_t length) {
  if (!dense_cpu(start) || start.scalar_type() != at::kLong || start.numel() != 1) return -1;
  const int64_t first = *start.const_data_ptr<int64_t>();
  return first >= 0 && first <= length - tokens ? first : -1;
}

// Put rows [batch, tokens, heads, size], turned or not, into y [batch, heads, length, size] from token `first` on.
void place(const Tensor& x, const Maybe& cos, const Maybe& sin, const Tensor& y, int64_t first, const Maybe& scale,
           int64_t first_scale) {
  Rows r{};
  r.x = x.const_data_ptr<float>(), r.x_batch = x.stride(0), r.x_token = x.stride(1), r.x_head = x.stride(2);
  r.batch = x.size(0), r.tokens = x.size(1), r.heads = x.size(2), r.size = x.size(3);
  if (cos) {
    r.cos = cos->const_data_ptr<float>(), r.sin = sin->const_data_ptr<float>();
    r.turn_batch = cos->size(0) == 1 ? 0 : cos->stride(0), r.turn_token = cos->stride(1);
  }
  r.y = (char*)y.mutable_data_ptr() + first * y.stride(2) * y.element_size();
  r.y_batch = y.stride(0), r.y_head = y.stride(1), r.y_token = y.stride(2);
  if (scale) {
    r.scale = scale->mutable_data_ptr<float>() + first_scale * scale->stride(2);
    r.scale_batch = scale->stride(0), r.scale_head = scale->stride(1), r.scale_token = scale->stride(2);
  }
  kernels.place(&r, at::get_num_threads());
}

void mark_edited(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// Operands of cached_attention that fit, and the places of the first token.
struct CachedCall {
  const Tensor &query, &key, &value;
  const Maybe &cos, &sin;
  const Tensor &keys, &values;
  const Maybe &mask, &key_scale, &value_scale;
  int64_t first, first_scale;

  CachedCall(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& cos, const Maybe& sin,
             const Tensor& keys, const Tensor& values, const Tensor& start, const Maybe& mask, const Maybe& key_scale,
             const Maybe& value_scale, const Maybe& scale_start)
      : query(query), key(key), value(value), cos(cos), sin(sin), keys(keys), values(values), mask(mask),
        key_scale(key_scale), value_scale(value_scale) {
    const bool shaped = keys.dim() == 4 && query.dim() == 4 && query.numel() > 0;
    first = shaped ? first_place(start, query.size(1), keys.size(2)) : -1;
    first_scale = !shaped ? -1 : scale_start ? first_place(*scale_start, query.size(1), keys.size(2)) : 0;
  }

  bool fits() const {
    if (first < 0 || first_scale < 0 || !are_rows(query, query, query.size(2))) return false;
    const auto type = keys.scalar_type();
    const bool same = cos.has_value() == sin.has_value() &&
                      (!cos || (cos->sizes() == sin->sizes() && cos->strides() == sin->strides()));
    return (type == at::kFloat || type == at::kChar) && are_rows(key, query, keys.size(1)) &&
           are_rows(value, query, keys.size(1)) && same && are_turns(cos, query) && are_turns(sin, query) &&
           attends(query.transpose(1, 2), keys, values, mask, false, key_scale, value_scale);
  }

  // The result [batch, tokens, heads * size].
  Tensor run(double scale) const {
    Tensor turned = query;
    if (cos) {
      turned = new_floats(query.sizes());
      place(query, cos, sin, turned.transpose(1, 2), 0, NOTHING, 0);
    }
    place(key, cos, sin, keys, first, key_scale, first_scale);
    place(value, NOTHING, NOTHING, values, first, value_scale, first_scale);
    for (const Tensor& t : {keys, values}) mark_edited(t);
    for (const Maybe& t : {key_scale, value_scale})
      if (t) mark_edited(*t);
    return attended(turned.transpose(1, 2), keys, values, mask, scale, false, key_scale, value_scale).flatten(2);
  }
};

Tensor cached_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& cos, const Maybe& sin,
                        const Tensor& keys, const Tensor& values, const Tensor& start, const Maybe& mask, double scale,
                        const Maybe& key_scale, const Maybe& value_scale, const Maybe& scale_start) {
  const CachedCall call(query, key, value, cos, sin, keys, values, start, mask, key_scale, value_scale, scale_start);
  if (!call.fits())
    return CachedAttentionRoute::portable(query, key, value, cos, sin, keys, values, start, mask, scale, key_scale,
                                          value_scale, scale_start);
  return call.run(scale);
}
"""
