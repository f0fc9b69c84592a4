"""C++ text of attention of one token a sequence to a cache: what a decode step spends its time on beside weights.

softmax(q K^T * scale + mask) V by head, in float32, over keys that lie as float32, bfloat16, or int8 codes with a scale
a token. Queries of one group read each key once. Spans of keys are summed apart and put together by their largest
scores (online softmax: Milakov and Gimelshein, 2018), so that few heads fill many threads, and results do not depend on
how many there are. Keys that the mask hides from a whole group are not read: an empty place in a cache costs nothing.
"""

STEP = r"""
// Keys or values [batch, heads, length, size]: floats, upper halves of floats, or int8; strides in elements. scale
// [batch, heads, length] of codes, else null.
struct Cached {
  const void* data;
  long batch, head, token;
  const float* scale;
  long scale_batch, scale_head, scale_token;
};

// Attention. Mirrored by the operators. y [batch, tokens, heads * group, size].
struct Attention {
  const float* queries;  // [batch, heads * group, tokens, size]
  const void* mask;      // [batch, heads * group, tokens, length]: floats to be added, or bytes, 1 for shown; or null
  float* y;
  Cached keys, values;
  long query_batch, query_head, query_token, mask_batch, mask_head, mask_token, mask_bytes;
  long batch, heads, group, tokens, length, size, bytes;  // bytes: of an element of the cache
  float scale;
  bool causal;  // token m sees keys up to m alone
  const float *cos, *sin;  // [batch, tokens, size]: several tokens' queries are turned on the way; or null
  long turn_batch, turn_token;
};

typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
static inline Vec restored(const float* from, float) { return load(from); }
static inline Vec restored(const int8_t* from, float scale) { return load_codes(from) * scale; }
static inline Vec restored(const uint16_t* from, float) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Vec)(__builtin_convertvector(halves, Lanes) << 16);
}
static inline float restored(float v, float) { return v; }
static inline float restored(int8_t v, float scale) { return (float)v * scale; }
static inline float restored(uint16_t v, float) {
  const uint32_t bits = (uint32_t)v << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

constexpr long SPAN_KEYS = 256;  // whose scores, keys and values stay in the second cache
constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

// Keys or values of one head of one sequence, from some token on.
template <class Code>
struct Lines {
  const Code* data;
  long stride;
  const float* scale;  // null for floats
  long scale_stride;

  Lines(const Cached& c, long b, long head, long first)
      : data((const Code*)c.data + b * c.batch + head * c.head + first * c.token), stride(c.token),
        scale(c.scale ? c.scale + b * c.scale_batch + head * c.scale_head + first * c.scale_token : nullptr),
        scale_stride(c.scale_token) {}
  const Code* line(long l) const { return data + l * stride; }
  float factor(long l) const { return scale ? scale[l * scale_stride] : 1.0f; }
};

// scores [G, SPAN_KEYS] of K keys from key l on, for G queries.
template <int G, int K, class Code>
static inline void score(const float* const* queries, const Lines<Code>& keys, long l, long size, float* scores) {
  Vec acc[K][G] = {};
  const Code* line[K];
  float factor[K];
  UNROLL for (int k = 0; k < K; k++) line[k] = keys.line(l + k), factor[k] = keys.factor(l + k);
  long i = 0;
  for (; i + WIDTH <= size; i += WIDTH)
    UNROLL for (int k = 0; k < K; k++) {
      __builtin_prefetch((const char*)(line[k] + i) + AHEAD);
      const Vec key = restored(line[k] + i, factor[k]);
      UNROLL for (int g = 0; g < G; g++) acc[k][g] = multiply_add(key, load(queries[g] + i), acc[k][g]);
    }
  UNROLL for (int k = 0; k < K; k++)
    UNROLL for (int g = 0; g < G; g++) {
      float sum = sum_of(acc[k][g]);
      for (long j = i; j < size; j++) sum += queries[g][j] * restored(line[k][j], factor[k]);
      scores[g * SPAN_KEYS + l + k] = sum;
    }
}

// sums [G, size] (+)= chances [G, SPAN_KEYS] of K keys from key l on, times their values.
template <int G, int K, class Code>
static inline void blend(const float* chances, const Lines<Code>& values, long l, long size, float* sums) {
  const Code* line[K];
  float factor[K];
  UNROLL for (int k = 0; k < K; k++) line[k] = values.line(l + k), factor[k] = values.factor(l + k);
  Vec chance[G][K];
  UNROLL for (int g = 0; g < G; g++)
    UNROLL for (int k = 0; k < K; k++) chance[g][k] = spread(chances[g * SPAN_KEYS + l + k]);
  long i = 0;
  for (; i + WIDTH <= size; i += WIDTH) {
    Vec value[K];
    UNROLL for (int k = 0; k < K; k++) {
      __builtin_prefetch((const char*)(line[k] + i) + AHEAD);
      value[k] = restored(line[k] + i, factor[k]);
    }
    UNROLL for (int g = 0; g < G; g++) {
      Vec acc = l ? load(sums + g * size + i) : Vec{};
      UNROLL for (int k = 0; k < K; k++) acc = multiply_add(value[k], chance[g][k], acc);
      std::memcpy(sums + g * size + i, &acc, sizeof acc);
    }
  }
  for (; i < size; i++)
    UNROLL for (int g = 0; g < G; g++) {
      float acc = l ? sums[g * size + i] : 0.0f;
      UNROLL for (int k = 0; k < K; k++) acc += chances[g * SPAN_KEYS + l + k] * restored(line[k][i], factor[k]);
      sums[g * size + i] = acc;
    }
}

// What queries see of a span: the largest score of each, the sum of e^(score - largest), and their values so weighted.
struct Seen {
  float *peak, *total, *sums;  // [group], [group], [group, size]
};

// The largest lane, of lanes that are numbers.
template <int D = 1>
static inline float largest_lane(Vec v) {
  const Vec other = changed<D>(v, std::make_index_sequence<WIDTH>{});
  v = larger(v, other);
  if constexpr (2 * D < WIDTH)
    return largest_lane<2 * D>(v);
  else
    return v[0];
}

// The largest of n scores, whole vectors of them; HIDDEN where all are hidden, or no numbers.
static inline float largest(const float* scores, long n) {
  Vec top = spread(HIDDEN);
  for (long l = 0; l < n; l += WIDTH) top = larger(load(scores + l), top);
  return largest_lane(top);
}

// Scores become e^(score - peak), whose sum is returned.
static inline float weigh(float* scores, long n, float peak) {
  const float from = peak == HIDDEN ? 0.0f : peak;
  Vec sum{};
  for (long l = 0; l < n; l += WIDTH) {
    const Vec v = load(scores + l) - from, e = v < -87.0f ? Vec{} : exponential(v);
    std::memcpy(scores + l, &e, sizeof e);
    sum += e;
  }
  return sum_of(sum);
}

// Scores [SPAN_KEYS] of n keys to chances, not yet divided by their sum, which is returned with the largest score.
static inline std::pair<float, float> soften(float* scores, const float* mask, float scale, long n) {
  const long padded = divide_up(n, WIDTH) * WIDTH;
  for (long l = 0; l < n; l++) scores[l] = scores[l] * scale + (mask ? mask[l] : 0.0f);
  std::fill(scores + n, scores + padded, HIDDEN);
  const float peak = largest(scores, padded);
  return {peak, weigh(scores, padded, peak)};
}

// What is added to the scores of the keys [first, end): rows of a group `apart` floats from each other, or one for all.
struct Mask {
  const float* rows = nullptr;
  long apart = 0;

  Mask(const Attention& a, long b, long head, long first, long end) {
    if (!a.mask) return;
    static thread_local Buffer<float> buffer;
    const long n = a.mask_head ? a.group : 1;
    float* room = buffer.get(n * SPAN_KEYS);
    for (long g = 0; g < n; g++, room += SPAN_KEYS) {
      const long at = b * a.mask_batch + (head * a.group + g) * a.mask_head + first;
      if (a.mask_bytes == 1)
        for (long l = 0; l < end - first; l++) room[l] = ((const uint8_t*)a.mask)[at + l] ? 0.0f : HIDDEN;
      else
        std::memcpy(room, (const float*)a.mask + at, (end - first) * sizeof(float));
    }
    rows = room - n * SPAN_KEYS, apart = n > 1 ? SPAN_KEYS : 0;
  }

  // The first of n keys that any query is shown and the one after the last; n and 0 where none is.
  std::pair<long, long> shown(long group, long n) const {
    if (!rows) return {0, n};
    long low = n, high = 0;
    for (long g = 0; g < (apart ? group : 1); g++) {
      const float* row = rows + g * apart;
      long last = n;
      low = std::find_if(row, row + low, [](float v) { return v != HIDDEN; }) - row;
      while (last > high && row[last - 1] == HIDDEN) last--;
      high = std::max(high, last);
    }
    return {low, high};
  }
};

// Queries g to g + G of one head of keys, on n keys of one sequence from `first` on.
template <int G, class Code>
static void see(const Attention& a, long b, long head, long g, long first, long n, const float* mask, long apart,
                const Seen& seen) {
  const Lines<Code> keys(a.keys, b, head, first), values(a.values, b, head, first);
  alignas(64) float scores[G * SPAN_KEYS];
  const float* queries[G];
  for (int q = 0; q < G; q++) queries[q] = a.queries + b * a.query_batch + (head * a.group + g + q) * a.query_head;
  by_four(n, [&](auto some, long l) { score<G, decltype(some)::value>(queries, keys, l, a.size, scores); });
  for (int q = 0; q < G; q++)
    std::tie(seen.peak[g + q], seen.total[g + q]) =
        soften(scores + q * SPAN_KEYS, mask ? mask + (g + q) * apart : nullptr, a.scale, n);
  by_four(n, [&](auto some, long l) {
    blend<G, decltype(some)::value>(scores, values, l, a.size, seen.sums + g * a.size);
  });
}

// All queries of one head of keys, on one span of keys.
template <class Code>
static void see_span(const Attention& a, long b, long head, long span, const Seen& seen) {
  const long begin = span * SPAN_KEYS, end = std::min(a.length, begin + SPAN_KEYS);
  const Mask mask(a, b, head, begin, end);
  const auto [low, high] = mask.shown(a.group, end - begin);
  if (low >= high) {
    std::fill(seen.peak, seen.peak + a.group, HIDDEN);
    std::fill(seen.total, seen.total + a.group, 0.0f);
    return;
  }
  const float* rows = mask.rows ? mask.rows + low : nullptr;
  const long first = begin + low, n = high - low;
  long g = 0;
  for (; g + 4 <= a.group; g += 4) see<4, Code>(a, b, head, g, first, n, rows, mask.apart, seen);
  for (; g + 2 <= a.group; g += 2) see<2, Code>(a, b, head, g, first, n, rows, mask.apart, seen);
  for (; g < a.group; g++) see<1, Code>(a, b, head, g, first, n, rows, mask.apart, seen);
}

// Results of query g of a head from what it saw of all spans, `apart` floats from each other.
static void put_together(const Attention& a, const Seen& seen, long spans, long apart, long g, float* y) {
  float top = HIDDEN, total = 0;
  for (long s = 0; s < spans; s++) top = std::max(top, seen.peak[s * apart + g]);
  std::fill(y, y + a.size, 0.0f);
  for (long s = 0; s < spans; s++) {
    const float peak = seen.peak[s * apart + g], sum = seen.total[s * apart + g];
    if (sum == 0) continue;  // it saw nothing, and wrote no sums
    const float weight = peak == top ? 1.0f : std::exp(peak - top);
    const float* sums = seen.sums + s * apart + g * a.size;
    total += sum * weight;
    for (long i = 0; i < a.size; i++) y[i] += sums[i] * weight;
  }
  const float factor = total == 0 ? 0.0f : 1.0f / total;
  for (long i = 0; i < a.size; i++) y[i] *= factor;
}

template <class Code>
static void attend(const Attention& a, long threads) {
  static thread_local Buffer<float> buffer;
  const long spans = divide_up(a.length, SPAN_KEYS), apart = a.group * (a.size + 2);
  float* room = buffer.get(a.batch * a.heads * spans * apart);
  const auto seen = [&](long job) {
    float* at = room + job * apart;
    return Seen{at, at + a.group, at + 2 * a.group};
  };
  const long work = a.batch * a.heads * a.group * a.length * a.size;
  parallel(a.batch * a.heads * spans, work < (1 << 16) ? 1 : threads, [&](long job) {
    see_span<Code>(a, job / spans / a.heads, job / spans % a.heads, job % spans, seen(job));
  });
  for (long row = 0; row < a.batch * a.heads; row++)
    for (long g = 0; g < a.group; g++)
      put_together(a, seen(row * spans), spans, apart, g, a.y + (row * a.group + g) * a.size);
}
"""

ENTRY = r"""
// Attention; of several tokens to floats alone; a thread or more.
EXPORT void bwla_attend(const Attention* a, long threads) {
#ifdef TILED
  if (TILED(a->tokens)) return attend_rows<TiledAttention>(*a, threads);
#endif
  if (a->tokens > 1) return attend_rows<VectorAttention>(*a, threads);
  if (a->bytes == 1) return attend<int8_t>(*a, threads);
  if (a->bytes == 2) return attend<uint16_t>(*a, threads);
  attend<float>(*a, threads);
}
"""
