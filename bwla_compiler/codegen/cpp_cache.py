"""C++ text of rows for attention: queries turned by RoPE, keys and values put where a cache keeps them.

RoPE (Su et al., 2021) in the arrangement of transformers: channel i is turned with channel i + size / 2. Products are
not contracted, so that the bits are torch's. Where a cache holds int8, each head of a token is rounded as
runtime/kv_cache.py does.
"""

TURN = r"""
// Queries or keys of one head of one token, turned.
static inline void turn(const float* __restrict x, const float* __restrict cos, const float* __restrict sin, long size,
                        float* __restrict y) {
  const long half = size / 2;
  for (long i = 0; i < half; i++) y[i] = x[i] * cos[i] + -x[half + i] * sin[i];
  for (long i = half; i < size; i++) y[i] = x[i] * cos[i] + x[i - half] * sin[i];
}
"""

ROWS = r"""
// Rows on their way to attention; strides in elements. Mirrored by the operators.
struct Rows {
  const float *x, *cos, *sin;  // x [batch, tokens, heads, size]; cos, sin [batch, tokens, size], or null: not turned
  void* y;                     // [batch, heads, tokens, size]: floats, or int8 where there is a scale
  float* scale;                // [batch, heads, tokens], or null
  long x_batch, x_token, x_head, y_batch, y_head, y_token, scale_batch, scale_head, scale_token;
  long turn_batch, turn_token, batch, tokens, heads, size;
};

// Round one head of one token to codes, and return its scale, which is 0 for zeros.
static float round_head(const float* x, long size, int8_t* codes) {
  constexpr int LIMIT = 127;
  constexpr float LEAST = std::numeric_limits<float>::min();
  float top = 0;
  for (long i = 0; i < size; i++) top = std::max(top, std::abs(x[i]));
  const float rounded = round_to(x, size, LIMIT, codes), scale = top / (float)LIMIT;
  if (std::isnan(rounded) || scale >= LEAST) return rounded;
  for (long i = 0; i < size; i++) codes[i] = nearest_code<int8_t>(x[i] / LEAST, LIMIT);
  return scale;
}

EXPORT void bwla_place(const Rows* rows, long threads) {
  const Rows& r = *rows;
  parallel(r.batch * r.tokens, r.batch * r.tokens * r.heads * r.size < (1 << 15) ? 1 : threads, [&](long job) {
    static thread_local Buffer<float> turned;
    const long b = job / r.tokens, t = job % r.tokens, at = b * r.turn_batch + t * r.turn_token;
    for (long head = 0; head < r.heads; head++) {
      const float* x = r.x + b * r.x_batch + t * r.x_token + head * r.x_head;
      const long to = b * r.y_batch + head * r.y_head + t * r.y_token;
      float* floats = r.scale ? turned.get(r.size) : (float*)r.y + to;
      if (r.cos) turn(x, r.cos + at, r.sin + at, r.size, floats);
      if (r.scale)
        r.scale[b * r.scale_batch + head * r.scale_head + t * r.scale_token] =
            round_head(r.cos ? floats : x, r.size, (int8_t*)r.y + to);
      else if (!r.cos)
        std::memcpy(floats, x, r.size * sizeof(float));
    }
  });
}
"""
