"""C++ text of the float32 kernels beside the linears: Kronecker transforms and rows of an int8 table."""

TRANSFORM = r"""
#if defined(__AVX512F__)
typedef float Vec __attribute__((vector_size(64)));
constexpr int TALL = 8;  // rows whose sums the registers hold
static inline Vec multiply_add(Vec a, float b, Vec c) { return _mm512_fmadd_ps(a, _mm512_set1_ps(b), c); }
#elif defined(__AVX2__) && defined(__FMA__)
typedef float Vec __attribute__((vector_size(32)));
constexpr int TALL = 4;
static inline Vec multiply_add(Vec a, float b, Vec c) { return _mm256_fmadd_ps(a, _mm256_set1_ps(b), c); }
#else
typedef float Vec __attribute__((vector_size(16)));
constexpr int TALL = 4;
static inline Vec multiply_add(Vec a, float b, Vec c) { return a * b + c; }
#endif
constexpr long WIDTH = sizeof(Vec) / sizeof(float);

static inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

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

// Y [rows, n] = A B, A [rows, depth] with the strides `row` and `step`.
static void product(const float* a, long row, long step, const float* b, float* y, long rows, long depth, long n) {
  long r = 0;
  for (; r + TALL <= rows; r += TALL) product_rows<TALL>(a + r * row, row, step, b, y + r * n, depth, n);
  for (; r + 2 <= rows; r += 2) product_rows<2>(a + r * row, row, step, b, y + r * n, depth, n);
  for (; r < rows; r++) product_rows<1>(a + r * row, row, step, b, y + r * n, depth, n);
}

// y = left^T (x * scale) right for each token [n1, n2]; scale [n1 * n2], left [n1, n1], right [n2, n2]; null for none.
EXPORT void bwla_transform(const float* x, const float* scale, const float* left, const float* right, float* y,
                           long tokens, long n1, long n2, long threads) {
  const long n = n1 * n2, work = n * ((left ? n1 : 0) + (right ? n2 : 0));
  parallel(tokens, work * tokens < (1 << 20) ? 1 : threads, [&](long m) {
    static thread_local Buffer<float> buffer;
    float *scaled = buffer.get(2 * n), *half = scaled + n, *to = y + m * n;
    const float* from = x + m * n;
    if (scale) {
      float* product = left || right ? scaled : to;
      for (long i = 0; i < n; i++) product[i] = from[i] * scale[i];
      from = product;
    }
    if (right) {
      product(from, n2, 1, right, left ? half : to, n1, n2, n2);
      from = left ? half : to;
    }
    if (left) product(left, 1, n1, from, to, n1, n1, n2);
    if (from != to && !left) std::memcpy(to, from, n * sizeof(float));
  });
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
