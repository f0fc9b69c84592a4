"""C++ text of float32 vectors of any width, matrix products, and Kronecker transforms of tokens."""

VECTORS = r"""
#if defined(__AVX512F__)
typedef float Vec __attribute__((vector_size(64)));
constexpr int TALL = 8;  // rows whose sums the registers hold
static inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline float sum_of(Vec v) { return _mm512_reduce_add_ps(v); }
static inline Vec load_codes(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
}
#elif defined(__AVX2__) && defined(__FMA__)
typedef float Vec __attribute__((vector_size(32)));
constexpr int TALL = 4;
static inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline float sum_of(Vec v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
static inline Vec load_codes(const int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}
#elif defined(USES_NEON)
typedef float Vec __attribute__((vector_size(16)));
constexpr int TALL = 8;
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
static inline float sum_of(Vec v) { return vaddvq_f32((float32x4_t)v); }
static inline Vec load_codes(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof four);
  const int16x4_t wide = vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))));
  return (Vec)vcvtq_f32_s32(vmovl_s16(wide));
}
#else
typedef float Vec __attribute__((vector_size(16)));
constexpr int TALL = 4;
static inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
static inline float sum_of(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }
static inline Vec load_codes(const int8_t* from) {
  return Vec{(float)from[0], (float)from[1], (float)from[2], (float)from[3]};
}
#endif
constexpr long WIDTH = sizeof(Vec) / sizeof(float);
static inline Vec multiply_add(Vec a, float b, Vec c) { return multiply_add(a, Vec{} + b, c); }
typedef int32_t Lanes __attribute__((vector_size(sizeof(Vec))));  // what a comparison of vectors gives

static inline Vec absolute(Vec v) { return (Vec)((Lanes)v & 0x7FFFFFFF); }

#if defined(__AVX512F__)
static inline bool any_beyond(float edge, Vec v) {
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(edge), _CMP_GT_OQ);
}
static inline void store_low_bytes(Lanes v, int8_t* to) {
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v));
}
#elif defined(__AVX2__) && defined(__FMA__)
static inline bool any_beyond(float edge, Vec v) { return _mm256_movemask_ps((__m256)(v > edge)); }
static inline void store_low_bytes(Lanes v, int8_t* to) {
  const __m256i bytes = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0C080400));
  const int32_t low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
  std::memcpy(to, &low, sizeof low);
  std::memcpy(to + 4, &high, sizeof high);
}
#else
static inline bool any_beyond(float edge, Vec v) {
  const Lanes found = v > edge;
  return found[0] | found[1] | found[2] | found[3];
}
static inline void store_low_bytes(Lanes v, int8_t* to) {
  for (int i = 0; i < 4; i++) to[i] = (int8_t)v[i];
}
#endif

static inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
"""

PRODUCT = r"""
// Y [R, V * WIDTH] = A B for R rows of A: element (r, k) is a[r * row + k * step]; B [depth, n], Y [., n].
template <int R, int V>
static inline void product_tile(const float* a, long row, long step, const float* b, float* y, long depth, long n) {
  Vec acc[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) acc[r][v] = Vec{};
  for (long k = 0; k < depth; k++) {
    Vec line[V];
    for (int v = 0; v < V; v++) line[v] = load(b + k * n + v * WIDTH);
    for (int r = 0; r < R; r++) {
      const float factor = a[r * row + k * step];
      for (int v = 0; v < V; v++) acc[r][v] = multiply_add(line[v], factor, acc[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) std::memcpy(y + r * n + v * WIDTH, &acc[r][v], sizeof(Vec));
}

template <int R>
static inline void product_rows(const float* a, long row, long step, const float* b, float* y, long depth, long n) {
  long j = 0;
  for (; j + 2 * WIDTH <= n; j += 2 * WIDTH) product_tile<R, 2>(a, row, step, b + j, y + j, depth, n);
  for (; j + WIDTH <= n; j += WIDTH) product_tile<R, 1>(a, row, step, b + j, y + j, depth, n);
  for (int r = 0; r < R && j < n; r++) {
    float sums[WIDTH] = {};
    for (long k = 0; k < depth; k++)
      for (long c = j; c < n; c++) sums[c - j] += a[r * row + k * step] * b[k * n + c];
    for (long c = j; c < n; c++) y[r * n + c] = sums[c - j];
  }
}

// Y [rows, n] = A B, A [rows, depth] with the strides `row` and `step`; rows shared out over threads.
static void product(const float* a, long row, long step, const float* b, float* y, long rows, long depth, long n,
                    long threads) {
  const long height = threads > 1 ? divide_up(divide_up(rows, threads), TALL) * TALL : rows;
  parallel(divide_up(rows, height), threads, [&](long job) {
    long r = job * height;
    const long last = std::min(r + height, rows);
    for (; r + TALL <= last; r += TALL) product_rows<TALL>(a + r * row, row, step, b, y + r * n, depth, n);
    for (; r + 2 <= last; r += 2) product_rows<2>(a + r * row, row, step, b, y + r * n, depth, n);
    for (; r < last; r++) product_rows<1>(a + r * row, row, step, b, y + r * n, depth, n);
  });
}
"""

TRANSFORM = r"""
// y = left^T (x * scale) right for tokens [n1, n2]; scale [n1 * n2], left [n1, n1], right [n2, n2]; null for none.
struct Transform {
  const float *scale, *left, *right;
  long n1, n2;
#ifdef TILED
  std::optional<SplitFactors> split;
#endif

  // Have what many tokens share made once, before any of them.
  void prepare_for(long tokens) {
#ifdef TILED
    if ((left || right) && SplitFactors::pays(tokens, n1, n2)) split.emplace(left, right, n1, n2);
#else
    (void)tokens;
#endif
  }

  // Multiplications for one token; under some tens of microseconds a second thread costs more than it saves.
  long work() const { return n1 * n2 * ((left ? n1 : 0) + (right ? n2 : 0)); }
  long useful(long threads, long tokens) const { return work() * tokens < (1 << 20) ? 1 : threads; }

  void token(const float* from, float* to, long threads) const {
    static thread_local Buffer<float> buffer;
    const long n = n1 * n2;
    float *scaled = buffer.get(2 * n), *half = scaled + n;
    if (scale) {
      float* product = left || right ? scaled : to;
      for (long i = 0; i < n; i++) product[i] = from[i] * scale[i];
      from = product;
    }
#ifdef TILED
    if (split) return split->token(from, to);
#endif
    if (right) {
      product(from, n2, 1, right, left ? half : to, n1, n2, n2, threads);
      from = left ? half : to;
    }
    if (left) product(left, 1, n1, from, to, n1, n1, n2, threads);
    if (from != to && !left) std::memcpy(to, from, n * sizeof(float));
  }
};

EXPORT void bwla_transform(const float* x, const float* scale, const float* left, const float* right, float* y,
                           long tokens, long n1, long n2, long threads) {
  Transform transform{scale, left, right, n1, n2};
  transform.prepare_for(tokens);
  const long n = n1 * n2, useful = transform.useful(threads, tokens), across = tokens < useful ? 1 : useful;
  parallel(tokens, across, [&](long m) { transform.token(x + m * n, y + m * n, across > 1 ? 1 : useful); });
}
"""
