"""C++ text of attention of many tokens on processors with AMX: both products by tiles of digits, as exact as float32.

Values have a scale a key, by which chances are multiplied, and those of hidden keys are zero: so that here too results
do not depend on them (cpp_attention_prompt.py).
"""

TILED = r"""
class TiledAttention : HeadRows {
  static inline thread_local Buffer<int8_t> query_buffer, key_buffer, value_buffer, chance_buffer;
  static inline thread_local Buffer<float> float_buffer;

 public:
  static constexpr long HEIGHT = 512;  // keys are split once for all of these rows

 private:
  static constexpr long STRIPS = HEIGHT / STRIP;
  static constexpr long AHEAD_ROWS = 8;  // rows of other tokens lie far apart
  static constexpr float LOW = 1 << 16;  // of low sums: what is smaller is left out

  const long padded;  // floats of a row of sums
  const Digits<3> queries, keys, values, chances;
  float *peak, *total, *sums, *scores;  // sums of a strip: none before it has seen a key
  float query_scale[HEIGHT], key_scale[SPAN_KEYS], value_scale[SPAN_KEYS];

  void split_queries() {
    float* const scaled = scores;
    for (long row = 0; row < divide_up(rows, STRIP) * STRIP; row++) {
      const long n = row < rows ? a.size : 0;
      if (n) put_query(row, scaled);
      const float* soon = query_at(row + AHEAD_ROWS);
      for (long i = 0; row + AHEAD_ROWS < rows && i < n; i += SIDE) __builtin_prefetch(soon + i);
      query_scale[row] = queries.put_row(row, scaled, n);
    }
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
      float* const y = result_at(row);
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

 public:
  explicit TiledAttention(const HeadRows& part)
      : HeadRows(part), padded(divide_up(a.size, SIDE) * SIDE), queries(Digits<3>::of(query_buffer, rows, a.size)),
        keys(Digits<3>::of(key_buffer, SPAN_KEYS, a.size)), values(Digits<3>::of(value_buffer, a.size, SPAN_KEYS)),
        chances(Digits<3>::of(chance_buffer, STRIP, SPAN_KEYS)) {
    peak = float_buffer.get((2 + padded) * HEIGHT + std::max(STRIP * SPAN_KEYS, a.size));
    total = peak + HEIGHT, sums = total + HEIGHT, scores = sums + padded * HEIGHT;
    std::fill(peak, peak + HEIGHT, HIDDEN);
    std::fill(total, total + HEIGHT, 0.0f);
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
};
"""
