"""C++ text of the operator cached_attention: RoPE, writing to a static cache, and attention to it."""

CACHE = r"""
struct CachedAttentionName { static constexpr const char* name = "bwla::cached_attention"; };
using CachedAttentionRoute =
    Route<CachedAttentionName,
          Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Tensor&, const Tensor&,
                 const Tensor&, const Maybe&, double, const Maybe&, const Maybe&, const Maybe&)>;

// Whether these are sines or cosines of the angles by which rows are turned.
bool are_turns(const Maybe& t, const Heads& x) {
  return !t || (dense_cpu(*t) && t->scalar_type() == at::kFloat && t->dim() == 3 && t->size(1) == x.tokens &&
                t->size(2) == x.size && x.size % 2 == 0 && t->stride(2) == 1 &&
                (t->size(0) == 1 || t->size(0) == x.batch));
}

// The place of the first token in a cache of so many; -1 where they do not all fit.
int64_t first_place(const Tensor& start, int64_t tokens, int64_t length) {
  if (!dense_cpu(start) || start.scalar_type() != at::kLong || start.numel() != 1) return -1;
  const int64_t first = *start.const_data_ptr<int64_t>();
  return first >= 0 && first <= length - tokens ? first : -1;
}

// Rows on their way, turned or not; where they go is left open.
Rows rows_to_place(const Heads& x, const Maybe& cos, const Maybe& sin) {
  Rows r{};
  r.x = x.data, r.x_batch = x.by_batch, r.x_token = x.by_token, r.x_head = x.by_head;
  r.batch = x.batch, r.tokens = x.tokens, r.heads = x.heads, r.size = x.size;
  if (cos) {
    r.cos = cos->const_data_ptr<float>(), r.sin = sin->const_data_ptr<float>();
    r.turn_batch = cos->size(0) == 1 ? 0 : cos->stride(0), r.turn_token = cos->stride(1);
  }
  return r;
}

// Put rows into a cache [batch, heads, length, size] from token `first` on.
void keep(Rows r, const Tensor& cache, int64_t first, const Maybe& scale, int64_t first_scale) {
  r.y = (char*)cache.mutable_data_ptr() + first * cache.stride(2) * cache.element_size();
  r.y_batch = cache.stride(0), r.y_head = cache.stride(1), r.y_token = cache.stride(2);
  if (scale) {
    r.scale = scale->mutable_data_ptr<float>() + first_scale * scale->stride(2);
    r.scale_batch = scale->stride(0), r.scale_head = scale->stride(1), r.scale_token = scale->stride(2);
  }
  kernels.place(&r, at::get_num_threads());
}

void mark_edited(const Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// Operands of cached_attention, and the places of the first token.
struct CachedCall {
  const Heads &query, &key, &value;
  const Maybe &cos, &sin;
  const Tensor &keys, &values;
  const Maybe &mask, &key_scale, &value_scale;
  int64_t first = -1, first_scale = -1;

  CachedCall(const Heads& query, const Heads& key, const Heads& value, const Maybe& cos, const Maybe& sin,
             const Tensor& keys, const Tensor& values, const Tensor& start, const Maybe& mask, const Maybe& key_scale,
             const Maybe& value_scale, const Maybe& scale_start)
      : query(query), key(key), value(value), cos(cos), sin(sin), keys(keys), values(values), mask(mask),
        key_scale(key_scale), value_scale(value_scale) {
    if (!query.data || keys.dim() != 4) return;
    first = first_place(start, query.tokens, keys.size(2));
    first_scale = scale_start ? first_place(*scale_start, query.tokens, keys.size(2)) : 0;
  }

  bool fits() const {
    if (first < 0 || first_scale < 0) return false;
    const auto type = keys.scalar_type();
    const bool same = cos.has_value() == sin.has_value() &&
                      (!cos || (cos->sizes() == sin->sizes() && cos->strides() == sin->strides()));
    return (type == at::kFloat || type == at::kChar) && key.is_like(query, keys.size(1)) &&
           value.is_like(query, keys.size(1)) && same && are_turns(cos, query) && are_turns(sin, query) &&
           attends(query, keys, values, mask, false, key_scale, value_scale);
  }

  // The result [batch, tokens, heads * size].
  Tensor run(double scale) const {
    static thread_local std::vector<float> room;
    Heads turned = query;
    if (cos && query.tokens == 1) {  // of several tokens, attention turns queries as it reads them
      room.resize(query.batch * query.tokens * query.heads * query.size);
      Rows r = rows_to_place(query, cos, sin);
      r.y = room.data(), r.y_head = query.size, r.y_token = query.heads * query.size;
      r.y_batch = query.tokens * r.y_token;
      kernels.place(&r, at::get_num_threads());
      turned.data = room.data(), turned.by_head = r.y_head, turned.by_token = r.y_token, turned.by_batch = r.y_batch;
    }
    keep(rows_to_place(key, cos, sin), keys, first, key_scale, first_scale);
    keep(rows_to_place(value, NOTHING, NOTHING), values, first, value_scale, first_scale);
    for (const Tensor& t : {keys, values}) mark_edited(t);
    for (const Maybe& t : {key_scale, value_scale})
      if (t) mark_edited(*t);
    Tensor y = new_floats({query.batch, query.tokens, query.heads * query.size});
    attend_to(turned, keys, values, mask, scale, false, key_scale, value_scale, y.mutable_data_ptr<float>(),
              cos, sin);
    return y;
  }
};

Tensor cached_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Maybe& cos, const Maybe& sin,
                        const Tensor& keys, const Tensor& values, const Tensor& start, const Maybe& mask, double scale,
                        const Maybe& key_scale, const Maybe& value_scale, const Maybe& scale_start) {
  const Heads q(query, 1, 2), k(key, 1, 2), v(value, 1, 2);
  const CachedCall call(q, k, v, cos, sin, keys, values, start, mask, key_scale, value_scale, scale_start);
  if (!call.fits())
    return CachedAttentionRoute::portable(query, key, value, cos, sin, keys, values, start, mask, scale, key_scale,
                                          value_scale, scale_start);
  return call.run(scale);
}
"""
