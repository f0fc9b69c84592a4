"""C++ text of factors of a transform that are Hadamard matrices, applied by additions.

Such a factor is diag(v) H with Sylvester's H[i][j] = (-1)^popcount(i & j), n a power of two. A product with it takes
log2(n) additions a number (Fino and Algazi, IEEE Trans. Computers 1976) where any other factor takes n multiplications:
8 in place of 256.
"""

HADAMARD = r"""
// x[i], x[i + apart] = their sum and difference, for blocks of 2 * apart of n numbers; `apart` vectors at least.
static inline void butterflies(float* x, long n, long apart) {
  for (long block = 0; block < n; block += 2 * apart)
    for (long i = block; i < block + apart; i += WIDTH) {
      const Vec a = load(x + i), b = load(x + i + apart), sum = a + b, difference = a - b;
      std::memcpy(x + i, &sum, sizeof sum);
      std::memcpy(x + i + apart, &difference, sizeof difference);
    }
}

// The same for all distances from `apart` to n / 2: two at once, which halves reading and writing.
static inline void all_butterflies(float* x, long n, long apart) {
  for (; 4 * apart <= n; apart *= 4)
    for (long block = 0; block < n; block += 4 * apart)
      for (long i = block; i < block + apart; i += WIDTH) {
        const Vec a = load(x + i), b = load(x + i + apart), c = load(x + i + 2 * apart), d = load(x + i + 3 * apart);
        const Vec ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
        const Vec y[4] = {ab + cd, a_b + c_d, ab - cd, a_b - c_d};
        for (int k = 0; k < 4; k++) std::memcpy(x + i + k * apart, &y[k], sizeof(Vec));
      }
  if (2 * apart <= n) butterflies(x, n, apart);
}

// y = x diag(v) H for x [n1, n2] and v [n2], n2 a power of two.
static void times_hadamard(const float* x, const float* v, Output y, long n1, long n2) {
  struct Small {  // of one vector
    alignas(64) float of[WIDTH * WIDTH];
    constexpr Small() : of() {
      for (long i = 0; i < WIDTH; i++)
        for (long j = 0; j < WIDTH; j++) {
          bool is_odd = false;
          for (long both = i & j; both; both >>= 1) is_odd ^= both & 1;
          of[i * WIDTH + j] = is_odd ? -1.0f : 1.0f;
        }
    }
  };
  static constexpr Small small{};
  static thread_local Buffer<float> buffer;
  float* row = buffer.get(n2);
  for (long r = 0; r < n1; r++, x += n2, y.at += y.row) {
    for (long i = 0; i < n2; i++) row[i] = x[i] * v[i];
    const long first = std::min(WIDTH, n2);  // a product does the distances within a vector
    if (n2 < WIDTH)
      product_narrow({row, n2}, {small.of, WIDTH}, {y.at, n2}, 1, n2, n2);
    else
      product_columns<1>({row, WIDTH}, {small.of, WIDTH}, {y.at, WIDTH}, n2 / WIDTH, WIDTH);
    all_butterflies(y.at, n2, first);
  }
}
"""
