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
constexpr long WIDTH = sizeof(Vec) / sizeof(float), FLOATS_OF_LINE = 64 / sizeof(float);
// b - 0 is b, whatever b: no instruction but the broadcast is left, which may read memory.
static inline Vec spread(float b) { return b - Vec{}; }
static inline Vec multiply_add(Vec a, float b, Vec c) { return multiply_add(a, spread(b), c); }
typedef int32_t Lanes __attribute__((vector_size(sizeof(Vec))));  // what a comparison of vectors gives

static inline Vec absolute(Vec v) { return (Vec)((Lanes)v & 0x7FFFFFFF); }

// The larger or smaller of each two, b where one is NaN; the low bytes of 4 * WIDTH integers.
#if defined(__AVX512F__)
static inline bool any_beyond(float edge, Vec v) {
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(edge), _CMP_GT_OQ);
}
static inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
static inline void store_low_bytes(const Lanes (&v)[4], int8_t* to) {
  UNROLL for (int j = 0; j < 4; j++) _mm_storeu_si128((__m128i*)to + j, _mm512_cvtepi32_epi8((__m512i)v[j]));
}
#elif defined(__AVX2__) && defined(__FMA__)
static inline bool any_beyond(float edge, Vec v) { return _mm256_movemask_ps((__m256)(v > edge)); }
static inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
static inline void store_low_bytes(const Lanes (&v)[4], int8_t* to) {
  __m256i fours = _mm256_setzero_si256();  // of each half, those of one vector behind those of another
  UNROLL for (int j = 0; j < 4; j++) {
    Lanes from = Lanes{} - 1;  // nothing, but into the word of this vector
    from[j] = from[4 + j] = 0x0C080400;
    fours = _mm256_or_si256(fours, _mm256_shuffle_epi8((__m256i)v[j], (__m256i)from));
  }
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(fours, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
#else
static inline bool any_beyond(float edge, Vec v) {
  const Lanes found = v > edge;
  return found[0] | found[1] | found[2] | found[3];
}
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
static inline void store_low_bytes(const Lanes (&v)[4], int8_t* to) {
  for (int j = 0; j < 4; j++)
    for (int i = 0; i < 4; i++) *to++ = (int8_t)v[j][i];
}
#endif

template <class V>
static inline V fetch(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
static inline Vec load(const float* from) { return fetch<Vec>(from); }

// Float16 values; infinities, of which scales have none, may become large.
typedef uint32_t Words __attribute__((vector_size(sizeof(Vec))));
typedef uint16_t Halves __attribute__((vector_size(sizeof(Vec) / 2)));
constexpr float HALF_FACTOR = 0x1p112f;  // what the bits of a half, moved into a float, lack
static inline Vec halves(const uint16_t* from) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(fetch<__m256i>(from));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(fetch<__m128i>(from));
#elif defined(USES_NEON)
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
  const Words bits = __builtin_convertvector(fetch<Halves>(from), Words);
  return (Vec)(((bits & 0x7FFF) << 13) | ((bits & 0x8000) << 16)) * HALF_FACTOR;
#endif
}
"""

PRODUCT = r"""
// A matrix as a product reads or writes it: element (r, k) is at[r * row + k * step], step 1 but for a left side.
template <class T>
struct Matrix {
  T* at;
  long row, step = 1;
  Matrix from(long r, long k) const { return {at + r * row + k * step, row, step}; }
};
using Input = Matrix<const float>;
using Output = Matrix<float>;

// Y [R, V * WIDTH] = A B for R rows of A and V vectors of B [depth, .]; or that is added to Y.
template <int R, int V, bool ADDS>
static inline void product_tile(Input a, Input b, Output y, long depth) {
  Vec acc[R][V];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) acc[r][v] = ADDS ? load(y.at + r * y.row + v * WIDTH) : Vec{};
  for (long k = 0; k < depth; k++) {
    Vec line[V];
    UNROLL for (int v = 0; v < V; v++) line[v] = load(b.at + k * b.row + v * WIDTH);
    UNROLL for (int r = 0; r < R; r++) {
      const float factor = a.at[r * a.row + k * a.step];
      UNROLL for (int v = 0; v < V; v++) acc[r][v] = multiply_add(line[v], factor, acc[r][v]);
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int v = 0; v < V; v++) std::memcpy(y.at + r * y.row + v * WIDTH, &acc[r][v], sizeof(Vec));
}

// All rows of Y, R at a time, V * WIDTH columns of it: what is read of B stays in the first cache.
template <int V, bool ADDS = false, int R = TALL>
static inline void product_columns(Input a, Input b, Output y, long rows, long depth) {
  long r = 0;
  for (; r + R <= rows; r += R) product_tile<R, V, ADDS>(a.from(r, 0), b, y.from(r, 0), depth);
  for (; r + 2 <= rows; r += 2) product_tile<2, V, ADDS>(a.from(r, 0), b, y.from(r, 0), depth);
  for (; r < rows; r++) product_tile<1, V, ADDS>(a.from(r, 0), b, y.from(r, 0), depth);
}

// Fewer columns than fill a register.
static void product_narrow(Input a, Input b, Output y, long rows, long depth, long n) {
  for (long r = 0; r < rows; r++) {
    float sums[WIDTH] = {};
    for (long k = 0; k < depth; k++)
      for (long c = 0; c < n; c++) sums[c] += *a.from(r, k).at * *b.from(k, c).at;
    for (long c = 0; c < n; c++) *y.from(r, c).at = sums[c];
  }
}

static void product_part(Input a, Input b, Output y, long rows, long depth, long n) {
  if (n < WIDTH) return product_narrow(a, b, y, rows, depth, n);
  long j = 0;
  for (; j + 2 * WIDTH <= n; j += 2 * WIDTH) product_columns<2>(a, b.from(0, j), y.from(0, j), rows, depth);
  for (; j < n; j += WIDTH) {
    j = std::min(j, n - WIDTH);  // the last ones may be some of those before once more
    product_columns<1>(a, b.from(0, j), y.from(0, j), rows, depth);
  }
}

// Y [rows, n] += A [rows, depth] B, R rows at a time.
template <int R>
static void add_product(Input a, Input b, Output y, long rows, long depth, long n) {
  long j = 0;
  for (; j + 2 * WIDTH <= n; j += 2 * WIDTH) product_columns<2, true, R>(a, b.from(0, j), y.from(0, j), rows, depth);
  for (; j + WIDTH <= n; j += WIDTH) product_columns<1, true, R>(a, b.from(0, j), y.from(0, j), rows, depth);
  for (long r = 0; j < n && r < rows; r++)
    for (long k = 0; k < depth; k++)
      for (long c = j; c < n; c++) *y.from(r, c).at += *a.from(r, k).at * *b.from(k, c).at;
}

// Y = A^T Y for A [n1, n1] and Y [n1, n2], some columns at a time. They are copied first: rows one behind another use
// all of the first cache, where rows that are a power of two apart share few of its lines.
static void turn_columns(const float* a, float* y, long n1, long n2, long threads) {
  constexpr long WIDE = 2 * WIDTH;
  parallel(divide_up(n2, WIDE), threads, [&](long job) {
    static thread_local Buffer<float> buffer;
    const long first = job * WIDE, n = std::min(WIDE, n2 - first);
    float *own = buffer.get(2 * n1 * WIDE), *result = own + n1 * WIDE;
    next_reads().fetch(n1 * n1 * WIDE / 256);
    if (n == WIDE) {
      for (long r = 0; r < n1; r++) std::memcpy(own + r * WIDE, y + r * n2 + first, WIDE * sizeof(float));
      return product_columns<2>({a, 1, n1}, {own, WIDE}, {y + first, n2}, n1, n1);
    }
    std::fill(own, result, 0.0f);
    for (long r = 0; r < n1; r++) std::copy_n(y + r * n2 + first, n, own + r * WIDE);
    product_columns<2>({a, 1, n1}, {own, WIDE}, {result, WIDE}, n1, n1);
    for (long r = 0; r < n1; r++) std::copy_n(result + r * WIDE, n, y + r * n2 + first);
  });
}

// Y [rows, n] = A [rows, depth] B; rows shared out over threads.
static void product(Input a, Input b, Output y, long rows, long depth, long n, long threads) {
  const long height = threads > 1 ? divide_up(divide_up(rows, threads), TALL) * TALL : rows;
  parallel(divide_up(rows, height), threads, [&](long job) {
    const long r = job * height;
    product_part(a.from(r, 0), b, y.from(r, 0), std::min(height, rows - r), depth, n);
  });
}
"""

SIDES = """
// How a factor is packed: a matrix on the right or the left, v of diag(v) H on the right, or the scale before them.
enum Side : long { RIGHT, LEFT, SIGNS, SCALE };
"""

SCALE = r"""
// The scale of a transform, one number a channel, packed: a line whose first number is not 0 where what follows are
// halves times it, as checkpoints hold them; else floats follow. A token waits for them to come from memory.
class Scale {
  const float* packed;
  const float* values() const { return packed + FLOATS_OF_LINE; }

 public:
  Scale(const float* packed) : packed(packed) {}
  explicit operator bool() const { return packed; }

  // Vectors may be read beyond the end.
  static long room(long n) { return FLOATS_OF_LINE + divide_up(n, FLOATS_OF_LINE) * FLOATS_OF_LINE + FLOATS_OF_LINE; }
  static void pack(const float* scale, long n, float* packed) {
    std::fill(packed, packed + room(n), 0.0f);
    float top = 0;
    for (long i = 0; i < n; i++) top = std::max(top, std::abs(scale[i]));
    const int power = top > 0 && std::isfinite(top) ? std::ilogb(top) - 15 : 128;  // halves are below 2^16
    if (-100 < power && power < 16 && put_halves(scale, n, -power, (uint16_t*)(packed + FLOATS_OF_LINE)))
      packed[0] = std::ldexp(1.0f, power);
    else
      std::copy_n(scale, n, packed + FLOATS_OF_LINE);
  }

  // Have the first ones fetched; the rest is read next.
  void fetch(long n, Next& next) const {
    if (!packed) return;
    constexpr long BEGIN = 1024;
    fetch_ahead(packed, BEGIN);
    next.then((const char*)packed + BEGIN, 64 + n * (long)sizeof(uint16_t) - BEGIN);
  }

  // Call f(at), where at(i) are the numbers from channel i on.
  template <class F>
  void visit(const F& f) const {
    if (const float factor = packed[0])
      f([factor, bits = (const uint16_t*)values()](long i) { return halves(bits + i) * factor; });
    else
      f([floats = values()](long i) { return load(floats + i); });
  }

  // y = x * scale of n channels from the first one on, or x where there is none. y may be x.
  void multiply(const float* x, float* y, long n, long first = 0) const {
    if (!packed) return (void)std::memmove(y, x, n * sizeof(float));
    Next& next = next_reads();
    visit([&](auto at) {
      long i = 0;
      for (; i + WIDTH <= n; i += WIDTH) {
        if (i % FLOATS_OF_LINE == 0) next.fetch(1);
        const Vec v = load(x + i) * at(first + i);
        std::memcpy(y + i, &v, sizeof v);
      }
      for (; i < n; i++) y[i] = x[i] * at(first + i)[0];
    });
  }

 private:
  // Numbers times 2^power as halves; false where one is none.
  static bool put_halves(const float* scale, long n, int power, uint16_t* to) {
    for (long i = 0; i < n; i++) {
      const float v = std::ldexp(scale[i], power) / HALF_FACTOR;
      uint32_t bits;
      std::memcpy(&bits, &v, sizeof bits);
      to[i] = (uint16_t)((bits >> 13 & 0x7FFF) | (bits >> 16 & 0x8000));
      uint16_t all[WIDTH] = {to[i]};
      if (std::ldexp(halves(all)[0], -power) != scale[i]) return false;
    }
    return true;
  }
};
"""

TRANSFORM = r"""
#ifndef OWN_FACTORS
struct SplitFactor {
  static long room(long n) { return n * n; }
  static void pack(const float* factor, long n, bool, float* packed) {
    std::memcpy(packed, factor, n * n * sizeof(float));
  }
};
#endif

// How many floats a factor of n channels takes as the transform reads it: a line that tells SIGNS, and what follows.
EXPORT long bwla_packed_factor(long n, long side) {
  if (side == SCALE) return Scale::room(n);
  return FLOATS_OF_LINE + (side == SIGNS ? n : SplitFactor::room(n));
}

// A factor [n, n], or v or the scale [n], as the transform reads it; from a cache line on.
EXPORT void bwla_pack_factor(const float* factor, float* packed, long n, long side) {
  if (side == SCALE) return Scale::pack(factor, n, packed);
  std::fill(packed, packed + FLOATS_OF_LINE, (float)(side == SIGNS));
  if (side == SIGNS)
    std::memcpy(packed + FLOATS_OF_LINE, factor, n * sizeof(float));
  else
    SplitFactor::pack(factor, n, side == LEFT, packed + FLOATS_OF_LINE);
}

// y = left^T (x * scale) right for tokens [n1, n2]; scale, left and right packed, of n1 * n2, n1 and n2 channels; null
// for none.
struct Transform {
  Scale scale;
  const float *left, *right = nullptr, *signs = nullptr;
  long n1, n2;

  Transform(const float* scale, const float* left, const float* right, long n1, long n2)
      : scale(scale), left(left ? left + FLOATS_OF_LINE : nullptr), n1(n1), n2(n2) {
    if (right) (*right ? signs : this->right) = right + FLOATS_OF_LINE;
  }

  // Multiplications for one token; under some tens of microseconds a second thread costs more than it saves.
  long work() const { return n1 * n2 * ((left ? n1 : 0) + (right ? n2 : 0)); }
  bool is_tiled() const {
#ifdef OWN_FACTORS
    return TiledTransform::serves(n1, n2, work());
#else
    return false;
#endif
  }
  // Have what is read first fetched; the rest is read next.
  void fetch(Next& next) const {
    fetch_ahead(signs, n2 * (long)sizeof(float));
    scale.fetch(n1 * n2, next);
#ifdef OWN_FACTORS
    if (is_tiled()) return TiledTransform(left, right, n1, n2).fetch();
#endif
    fetch_ahead(right, n2 * n2 * (long)sizeof(float));
    if (left) next.then(left, n1 * n1 * (long)sizeof(float));
  }
  long useful(long threads, long tokens) const { return work() * tokens < (1 << 20) ? 1 : threads; }
  // Whether threads share the work of one token.
  bool is_shared(long threads) const { return !is_tiled() && useful(threads, 1) > 1; }

  // y may be x.
  void token(const float* x, float* y, long threads) const {
    static thread_local Buffer<float> buffer;
    float* first = right || is_tiled() ? buffer.get(n1 * n2) : y;  // those products write what they still read
    if (signs)
      times_hadamard(x, scale, signs, {first, n2}, n1, n2);
    else
      scale.multiply(x, first, n1 * n2);
#ifdef OWN_FACTORS
    if (is_tiled()) return TiledTransform(left, right, n1, n2).token(first, y);
#endif
    if (right) product({first, n2}, {right, n2}, {y, n2}, n1, n2, n2, threads);
    if (left) turn_columns(left, y, n1, n2, threads);
  }
};

// Tokens through a transform; y may be x.
EXPORT void bwla_transform(const float* x, const float* scale, const float* left, const float* right, float* y,
                           long tokens, long n1, long n2, long threads) {
  const Transform transform{scale, left, right, n1, n2};
  const long n = n1 * n2, useful = transform.useful(threads, tokens), across = tokens < useful ? 1 : useful;
  parallel(tokens, across, [&](long m) { transform.token(x + m * n, y + m * n, across > 1 ? 1 : useful); });
}
"""
