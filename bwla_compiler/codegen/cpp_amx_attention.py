"""C++ text of attention of many tokens on processors with AMX: both products by tiles of digits, as exact as float32,
and of keys that no token of a strip sees, none (online softmax: Milakov and Gimelshein, 2018).

Results do not depend on how many hidden keys follow those that are seen, nor on whether a mask hides them or causality:
values have a scale a key, by which chances are multiplied, and those of hidden keys are zero.
"""

TILED = r"""
// Rows are the queries of one head of keys: token by token, of each its group.
class TiledAttention {
  static inline thread_local Buffer<int8_t> query_buffer, key_buffer, value_buffer, chance_buffer;
  static inline thread_local Buffer<float> float_buffer;
  static constexpr long HEIGHT = 512, STRIPS = HEIGHT / STRIP;  // rows of a job: keys are split once for all of them
  static constexpr long AHEAD_ROWS = 8;                         // rows of other tokens lie far apart
  static constexpr float LOW = 1 << 16;                         // of low sums: what is smaller is left out

  struct Range {  // of keys
    long first, end;
    bool empty() const { return first >= end; }
  };

  const Attention& a;
  const long b, head, top, rows, padded;  // padded: floats of a row of sums
  const Digits<3> queries, keys, values, chances;
  float *peak, *total, *sums, *scores;  // sums of a strip: none before it has seen a key
  float query_scale[HEIGHT], key_scale[SPAN_KEYS], value_scale[SPAN_KEYS];

  TiledAttention(const Attention& a, long b, long head, long top, long rows)
      : a(a), b(b), head(head), top(top), rows(rows), padded(divide_up(a.size, SIDE) * SIDE),
        queries(Digits<3>::of(query_buffer, rows, a.size)), keys(Digits<3>::of(key_buffer, SPAN_KEYS, a.size)),
        values(Digits<3>::of(value_buffer, a.size, SPAN_KEYS)),
        chances(Digits<3>::of(chance_buffer, STRIP, SPAN_KEYS)) {
    peak = float_buffer.get((2 + padded) * HEIGHT + std::max(STRIP * SPAN_KEYS, a.size));
    total = peak + HEIGHT, sums = total + HEIGHT, scores = sums + padded * HEIGHT;
    std::fill(peak, peak + HEIGHT, HIDDEN);
    std::fill(total, total + HEIGHT, 0.0f);
  }

  long token(long row) const { return (top + row) / a.group; }
  long query(long row) const { return head * a.group + (top + row) % a.group; }
  const float* query_at(long row) const {
    return a.queries + b * a.query_batch + query(row) * a.query_head + token(row) * a.query_token;
  }

  void split_queries() {
    float* const scaled = scores;
    const float scale = a.scale;
    for (long row = 0; row < divide_up(rows, STRIP) * STRIP; row++) {
      const long n = row < rows ? a.size : 0;
      const float *from = query_at(row), *soon = query_at(row + AHEAD_ROWS);
      if (a.cos && n) {
        const long at = b * a.turn_batch + token(row) * a.turn_token;
        turn(from, a.cos + at, a.sin + at, n, scaled);
        from = scaled;
      }
      for (long i = 0; i < n; i++) scaled[i] = from[i] * scale;
      for (long i = 0; row + AHEAD_ROWS < rows && i < n; i += SIDE) __builtin_prefetch(soon + i);
      query_scale[row] = queries.put_row(row, scaled, n);
    }
  }

  // What row `row` of the queries is shown by the mask, from key `first` on.
  const void* mask(long row, long first) const {
    const long at = b * a.mask_batch + query(row) * a.mask_head + token(row) * a.mask_token + first;
    return (const char*)a.mask + at * a.mask_bytes;
  }

  // The keys of [first, end) between which all lie that some of the rows [row, last) see.
  Range seen(long row, long last, long first, long end) const {
    if (a.causal) return {first, std::min(end, token(last - 1) + 1)};
    if (!a.mask) return {first, end};
    Range range{end, first};
    // The last rows see most as a rule, and only what others see beyond them is looked for.
    for (long r = last - 1; r >= row; r -= a.mask_head ? 1 : (top + r) % a.group + 1) {
      long low = first, high = end;
      if (a.mask_bytes == 1) {
        const auto* bytes = (const uint8_t*)mask(r, 0);
        const auto* one = (const uint8_t*)std::memchr(bytes + first, 1, end - first);
        if (!one) continue;
        low = one - bytes;
        while (high > range.end && !bytes[high - 1]) high--;
      } else {
        const auto* added = (const float*)mask(r, 0);
        while (low < end && added[low] == HIDDEN) low++;
        if (low == end) continue;
        while (high > range.end && added[high - 1] == HIDDEN) high--;
      }
      range = {std::min(range.first, low), high};
    }
    return range;
  }

  // Split the keys and values of a range of the span that begins at `begin`, by whole steps.
  void split_keys(long begin, Range range) {
    const Lines<float> key(a.keys, b, head, begin), value(a.values, b, head, begin);
    const long first = (range.first - begin) / STEP * STEP, end = range.end - begin;
    const long whole = divide_up(end, STEP) * STEP;  // zeros beyond the end: what lay there may be no number
    for (long l = first; l < whole; l += SIDE)
      keys.put_columns(l, key.line(std::min(l, end)), key.stride, end - l, a.size, key_scale + l);
    for (long l = first; l < whole; l += 4)
      values.put_lines(l, value.line(std::min(l, end)), value.stride, end - l, a.size, value_scale + l);
  }

  // Hide scores [n] of the keys from `first` on that a row does not see, those from `end` on among them.
  void hide(long row, long first, long end, float* score, long n) const {
    if (a.causal) end = std::min(end, token(row) + 1);
    const long inside = std::clamp(end - first, 0L, n);
    if (a.mask && a.mask_bytes == 1) {
      const auto* shown = (const uint8_t*)mask(row, first);
      for (long l = 0; l < inside; l++) score[l] = shown[l] ? score[l] : HIDDEN;
    } else if (a.mask) {
      const auto* added = (const float*)mask(row, first);
      for (long l = 0; l < inside; l++) score[l] += added[l];
    }
    std::fill(score + inside, score + n, HIDDEN);
  }

  // Scores [n] of a row become chances against the largest so far; what was summed up is measured by that too.
  void soften_row(long row, float* score, long n) {
    const float before = peak[row], now = std::max(before, largest(score, n)), sum = weigh(score, n, now);
    if (before != now && total[row] != 0) {
      const float factor = std::exp(before - now);
      total[row] *= factor;
      for (long i = 0; i < padded; i++) sums[row * padded + i] *= factor;
    }
    peak[row] = now;
    total[row] += sum;
  }

  // Chances [n] times the scales of values from `first` on; 0 for hidden keys, whose values may be no numbers.
  void weigh_values(float* chance, long first, long n) const {
    for (long l = 0; l < n; l += SIDE) {
      const __m512 v = _mm512_loadu_ps(chance + l), of = _mm512_loadu_ps(value_scale + first + l);
      const __mmask16 seen = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      _mm512_storeu_ps(chance + l, _mm512_maskz_mul_ps(seen, v, of));
    }
  }

  // A strip of rows from `row` on, and the keys that it sees of the span that begins at `begin`; is_first: it has seen
  // none before.
  void see_strip(long row, long begin, Range range, bool is_first) {
    const long first = (range.first - begin) / STEP * STEP, n = divide_up(range.end - begin - first, STEP) * STEP;
    DigitSums<3> products;
    float chance_scale[STRIP];
    for (long l = 0; l < n; l += SIDE) {
      multiply_digits(queries, row, keys, first + l, queries.steps, 0, products);
      const __m512 of = _mm512_loadu_ps(key_scale + first + l);
      for (long r = 0; r < STRIP; r++) {
        const __m512 scale = _mm512_mul_ps(of, _mm512_set1_ps(query_scale[row + r] * LOW));
        _mm512_storeu_ps(scores + r * SPAN_KEYS + l, _mm512_mul_ps(products.row(r), scale));
      }
    }
    for (long r = 0; r < STRIP; r++) {
      float* score = scores + r * SPAN_KEYS;
      if (row + r < rows) {
        hide(row + r, begin + first, range.end, score, n);
        soften_row(row + r, score, n);
        weigh_values(score, first, n);
      }
      chance_scale[r] = chances.put_row(r, score, row + r < rows ? n : 0);
    }
    for (long i = 0; i < padded; i += SIDE) {
      multiply_digits(chances, 0, values, i, n / STEP, first / STEP, products);
      for (long r = 0; r < STRIP; r++) {
        float* const to = sums + (row + r) * padded + i;
        const __m512 sum = _mm512_mul_ps(products.row(r), _mm512_set1_ps(chance_scale[r] * LOW));
        _mm512_storeu_ps(to, is_first ? sum : _mm512_add_ps(_mm512_loadu_ps(to), sum));
      }
    }
  }

  void write() const {
    const bool far = is_far(a.y, a.batch * a.tokens * a.heads * a.group, a.size);
    for (long row = 0; row < rows; row++) {
      float* const y = a.y + ((b * a.tokens + token(row)) * a.heads * a.group + query(row)) * a.size;
      const __m512 factor = _mm512_set1_ps(total[row] == 0 ? 0.0f : 1.0f / total[row]);
      for (long i = 0; i < a.size; i += SIDE) {
        const __m512 sum = _mm512_maskz_loadu_ps(total[row] == 0 ? 0 : 0xFFFF, sums + row * padded + i);
        const __m512 v = _mm512_mul_ps(sum, factor);
        if (far)
          _mm512_stream_ps(y + i, v);
        else
          _mm512_mask_storeu_ps(y + i, first_lanes(a.size - i), v);
      }
    }
    if (far) _mm_sfence();
  }

  void run() {
    const TileScope scope;
    split_queries();
    bool has_seen[STRIPS] = {};
    for (long begin = 0; begin < a.length; begin += SPAN_KEYS) {
      const long end = std::min(a.length, begin + SPAN_KEYS);
      Range strips[STRIPS], all{end, begin};
      for (long row = 0; row < rows; row += STRIP) {
        const Range range = strips[row / STRIP] = seen(row, std::min(row + STRIP, rows), begin, end);
        if (!range.empty()) all = {std::min(all.first, range.first), std::max(all.end, range.end)};
      }
      if (all.empty()) continue;
      split_keys(begin, all);
      for (long row = 0; row < rows; row += STRIP) {
        const Range range = strips[row / STRIP];
        if (!range.empty()) see_strip(row, begin, range, !std::exchange(has_seen[row / STRIP], true));
      }
    }
    write();
  }

 public:
  static void attend(const Attention& a, long threads) {
    const long rows = a.tokens * a.group, blocks = divide_up(rows, HEIGHT);
    parallel(a.batch * a.heads * blocks, threads, [&](long job) {
      const long top = (blocks - 1 - job % blocks) * HEIGHT;  // the last, which see most, first
      TiledAttention(a, job / blocks / a.heads, job / blocks % a.heads, top, std::min(HEIGHT, rows - top)).run();
    });
  }
};
"""
