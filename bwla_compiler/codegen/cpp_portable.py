"""C++ text that any compiler takes: sign sums of four activations looked up by nibble, and plain dot products."""

LAYOUT = r"""
using Word = uint8_t;
constexpr long ROWS = 8, COLUMNS = 8, CHUNK = 128, TILE = 1;
constexpr long AHEAD = 2048;  // bytes of weights fetched ahead of use
constexpr long HELD = 128;  // tables that the first cache holds

static inline void add(int32_t* to, int32_t v) { *to += v; }
static inline void add_scaled(float* to, int32_t v, const float* scale) { *to += (float)v * *scale; }
"""

NIBBLES = r"""
static inline void add(float* to, float v) { *to += v; }
static inline void add_scaled(float* to, float v, const float* scale) { *to += v * *scale; }

template <class CodeType, class EntryType, class SumType>
struct NibbleKernel {
  using Code = CodeType;
  using Entry = EntryType;
  using Sum = SumType;
  static constexpr long TABLE = 32;

  // Two levels of addition bound the rounding error of floats; 32-bit sums of codes do not overflow.
  static long span(int) { return 32; }

  static void build(const Code* q, Entry* table) {
    for (int half = 0; half < 2; half++, q += 4, table += 16) {
      table[0] = (Entry)(-q[0] - q[1] - q[2] - q[3]);
      for (int i = 0; i < 4; i++)
        for (int e = 0; e < 1 << i; e++) table[e + (1 << i)] = (Entry)(table[e] + 2 * q[i]);
    }
  }

  template <int T, class Sink>
  static void block(const Word* w, const Entry* table, long words, long span, const Sink& sink) {
    for (long first = 0; first < words; first += span) {
      const long last = first + span < words ? first + span : words;
      for (long row = 0; row < ROWS; row += 8) {
        for (int t = 0; t < T; t++) {
          Sum acc[8] = {};
          for (long k = first; k < last; k++) {
            const Entry* entry = table + (k * T + t) * TABLE;
            const Word* at = w + k * ROWS + row;
            for (int r = 0; r < 8; r++) acc[r] += (Sum)entry[at[r] & 15] + (Sum)entry[16 + (at[r] >> 4)];
          }
          for (int r = 0; r < 8; r++) sink(first / span, t, row + r, acc[r]);
        }
      }
    }
  }
};
using FloatKernel = NibbleKernel<float, float, float>;
"""

DOT = r"""
static inline int32_t dot(const int8_t* a, const int8_t* b, long n) {
  int32_t sum = 0;
  for (long i = 0; i < n; i++) sum += (int32_t)a[i] * b[i];
  return sum;
}
"""

KERNELS = LAYOUT + NIBBLES + "using IntKernel = NibbleKernel<int8_t, int16_t, int32_t>;\n" + DOT
