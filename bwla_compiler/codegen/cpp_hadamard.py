"""C++ text of factors of a transform that are Hadamard matrices, applied by additions.

Such a factor is diag(v) H with Sylvester's H[i][j] = (-1)^popcount(i & j), n a power of two. A product with it takes
log2(n) additions a number (Fino and Algazi, IEEE Trans. Computers 1976) where any other factor takes n multiplications:
8 in place of 256.
"""

HADAMARD = r"""
// The lanes of x, each changed for the one at a distance of D, a power of two.
template <int D, size_t... I>
static inline Vec changed(Vec x, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, (int)(I ^ D)...);
#else
  return __builtin_shuffle(x, Lanes{(int32_t)(I ^ D)...});
#endif
}

// Lanes at a distance of D become their sum and difference; then those at twice as much, up to the width of a vector.
template <int D = 1, size_t... I>
static inline Vec within(Vec x, std::index_sequence<I...> lanes) {
  const Vec sign{(I & D ? -1.0f : 1.0f)...};
  x = multiply_add(x, sign, changed<D>(x, lanes));
  if constexpr (2 * D < WIDTH) return within<2 * D>(x, lanes);
  return x;
}

// y = from(i) for all i < n, of which R at a time, `apart` from each other, become their sums and differences.
template <long R, class F>
static inline void butterflies(float* y, long n, long apart, const F& from) {
  for (long block = 0; block < n; block += R * apart)
    for (long i = block; i < block + apart; i += WIDTH) {
      Vec x[R];
      UNROLL for (long k = 0; k < R; k++) x[k] = from(i + k * apart);
      UNROLL for (long d = 1; d < R; d *= 2)
        UNROLL for (long k = 0; k < R; k++)
          if (!(k & d)) {
            const Vec sum = x[k] + x[k | d];
            x[k | d] = x[k] - x[k | d];
            x[k] = sum;
          }
      UNROLL for (long k = 0; k < R; k++) std::memcpy(y + i + k * apart, &x[k], sizeof(Vec));
    }
}

// The same for up to three distances from `apart` on, as many as there are below n; return the next one.
template <class F>
static inline long some_butterflies(float* y, long n, long apart, const F& from) {
  if (8 * apart <= n) return butterflies<8>(y, n, apart, from), 8 * apart;
  if (4 * apart <= n) return butterflies<4>(y, n, apart, from), 4 * apart;
  if (2 * apart <= n) return butterflies<2>(y, n, apart, from), 2 * apart;
  return butterflies<1>(y, n, apart, from), n;
}

// The same of one row that no vector fits into.
static void narrow_butterflies(float* y, long n) {
  for (long apart = 1; apart < n; apart *= 2)
    for (long i = 0; i < n; i++)
      if (!(i & apart)) {
        const float sum = y[i] + y[i + apart];
        y[i + apart] = y[i] - y[i + apart];
        y[i] = sum;
      }
}

// y = x diag(v) H for x(i), vectors from channel i of [n1, n2] on, and v [n2], n2 a power of two not below WIDTH.
template <class X>
static void signed_hadamard(const X& x, const float* v, Output y, long n1, long n2) {
  Next& next = next_reads();
  for (long r = 0; r < n1; r++, y.at += y.row) {
    const auto lanes = std::make_index_sequence<WIDTH>{};
    auto part = [&](long i) { return within(x(r * n2 + i) * load(v + i), lanes); };
    long apart = some_butterflies(y.at, n2, WIDTH, part);
    next.fetch(n2 / FLOATS_OF_LINE);
    while (apart < n2) apart = some_butterflies(y.at, n2, apart, [&](long i) { return load(y.at + i); });
  }
}

// y = (x * scale) diag(v) H for x [n1, n2], which may be y; scale null for none.
static void times_hadamard(const float* x, const Scale& scale, const float* v, Output y, long n1, long n2) {
  if (n2 >= WIDTH) {
    if (!scale) return signed_hadamard([&](long i) { return load(x + i); }, v, y, n1, n2);
    return scale.visit([&](auto at) { signed_hadamard([&](long i) { return load(x + i) * at(i); }, v, y, n1, n2); });
  }
  for (long r = 0; r < n1; r++, x += n2, y.at += y.row) {
    scale.multiply(x, y.at, n2, r * n2);
    for (long i = 0; i < n2; i++) y.at[i] *= v[i];
    narrow_butterflies(y.at, n2);
  }
}
"""
