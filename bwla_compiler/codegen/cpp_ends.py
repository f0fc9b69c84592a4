"""C++ text of the float32 kernels at both ends of a model: products with an int8 table, and its rows."""

DOTS = r"""
constexpr long LANES = 16;  // floats of one token that lie together where several are read
static_assert(LANES % WIDTH == 0, "a vector is of one token");

// Dot products of one row of codes with T tokens x [n / LANES, T, LANES]; one token lies as it is.
template <int T>
static inline void dots(const int8_t* codes, const float* x, long n, float* out) {
  constexpr long SUMS = T == 1 ? 32 / WIDTH : 2;  // so many a token hide the latency of one
  Vec acc[T][SUMS] = {};
  long i = 0;
  for (; i + SUMS * WIDTH <= n; i += SUMS * WIDTH) {
    __builtin_prefetch(codes + i + AHEAD);
    for (long s = 0; s < SUMS; s++) {
      const unsigned long at = i + s * WIDTH;
      const Vec code = load_codes(codes + at);
      const float* lanes = x + at / LANES * LANES * T + at % LANES;
      for (int t = 0; t < T; t++) acc[t][s] = multiply_add(code, load(lanes + t * LANES), acc[t][s]);
    }
  }
  for (int t = 0; t < T; t++) {
    for (long s = 1; s < SUMS; s++) acc[t][0] += acc[t][s];
    float sum = sum_of(acc[t][0]);
    for (long j = i; j < n; j++) sum += codes[j] * x[(j / LANES * T + t) * LANES + j % LANES];
    out[t] = sum;
  }
}
"""

INT8 = r"""
// Rows of `bytes` each that one thread takes at a time: memory gives most where it is read in large pieces; of what
// several tokens read in turn, a piece is to stay in the caches.
static inline long piece_of(long rows, long bytes, long tokens, long threads) {
  return std::clamp(rows / (threads * 8), 1L, tokens > 4 ? 64L : std::max(64L, (1L << 20) / std::max(bytes, 1L)));
}

// Tokens for products with rows of codes: tiles of four, each [padded / LANES, 4, LANES]. As they are, rows of x are
// often some pages apart, and loads of several wait for each other in the first cache.
class FloatRows {
  static inline thread_local Buffer<float> buffer;
  const float* const x;
  const long in, padded;
  float* const tiles;

 public:
  FloatRows(const float* x, long tokens, long in)
      : x(x), in(in), padded(divide_up(in, LANES) * LANES), tiles(buffer.get(tokens * padded)) {
    for (long m = 0; m + 4 <= tokens; m += 4)
      for (long k = 0; k < in; k += LANES)
        for (long t = 0; t < 4; t++)
          std::copy_n(x + (m + t) * in + k, std::min(LANES, in - k), tiles + m * padded + 4 * k + t * LANES);
  }

  template <int T>
  static constexpr int HEIGHT = 1;

  // Products out [T] of one row of codes with T tokens from m on.
  template <int T>
  void dots(const int8_t* codes, long, long m, float* out) const {
    ::dots<T>(codes, T == 1 ? x + m * in : tiles + m * padded, in, out);
  }
};

constexpr long HEAD_TOKENS = 128;  // that are made ready at a time: the second cache holds them, beside a job's rows

template <class Rows>
static void int8_rows(const float* x, const int8_t* codes, const float* scale, const float* bias, float* y, long tokens,
                      long out, long in, long threads) {
  const long height = piece_of(out, in, tokens, threads);
  for (long first = 0; first < tokens; first += HEAD_TOKENS, x += HEAD_TOKENS * in, y += HEAD_TOKENS * out) {
    const long n = std::min(HEAD_TOKENS, tokens - first);
    const Rows rows(x, n, in);
    parallel(divide_up(out, height), out * in * n < (1 << 20) ? 1 : threads, [&](long job) {
      const long last = std::min((job + 1) * height, out);
      by_four(n, [&](auto some, long m) {
        constexpr int T = decltype(some)::value, HEIGHT = Rows::template HEIGHT<T>;
        for (long row = job * height; row < last; row += HEIGHT) {
          const long count = std::min<long>(HEIGHT, last - row);
          float sums[T * HEIGHT];
          rows.template dots<T>(codes + row * in, count, m, sums);
          for (int t = 0; t < T; t++)
            for (long r = row; r < row + count; r++)
              y[(m + t) * out + r] = sums[t * HEIGHT + r - row] * scale[r] + (bias ? bias[r] : 0);
        }
      });
    });
  }
}

// y [tokens, out] = (x [tokens, in] codes^T) * scale [out] + bias [out], codes int8 [out, in]; as exact as float32, or,
// by products of bytes, of x rounded to 16 bits a token.
EXPORT void bwla_int8_linear(const float* x, const int8_t* codes, const float* scale, const float* bias, float* y,
                             long tokens, long out, long in, long threads) {
#ifdef INTEGER_ROWS
  if (IntegerRows::take(in)) {
#ifdef TILED
    if (TILED(tokens)) return int8_tiles(x, codes, scale, bias, y, tokens, out, in, threads);
#endif
    return int8_rows<IntegerRows>(x, codes, scale, bias, y, tokens, out, in, threads);
  }
#endif
  int8_rows<FloatRows>(x, codes, scale, bias, y, tokens, out, in, threads);
}
"""

EMBEDDING = r"""
// y [tokens, width] = codes[ids] * scale[ids]; every id is a row of codes int8 [., width].
EXPORT void bwla_int8_embedding(const int64_t* ids, const int8_t* codes, const float* scale, float* y, long tokens,
                                long width) {
  for (long m = 0; m < tokens; m++) {
    const int8_t* row = codes + ids[m] * width;
    for (long i = 0; i < width; i++) y[m * width + i] = (float)row[i] * scale[ids[m]];
  }
}
"""
