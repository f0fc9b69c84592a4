"""C++ text of the kernels of processors with AMX: many tokens by products of int8 tiles, few by the tables of AVX-512.

A tile of codes, 16 tokens of 64, is multiplied by a tile of signs, 64 of 16 rows, that is made from packed bits as it
is needed: 1024 signs in some 24 cycles, used once for each 16 tokens, in 16 cycles each. All sums are exact integers.
Source of the instructions: Intel 64 and IA-32 Software Developer's Manual, volume 1, chapter 18 (AMX).
"""

TILES = r"""
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Whether the operating system gives this process tile registers: it is asked once.
static bool has_tiles() {
#if defined(__linux__)
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
#else
  return false;
#endif
}

constexpr long SIDE = 16;                // rows of a tile, and 32-bit lanes of a row
constexpr long STEP = 64;                // codes of a row of a tile
constexpr long TILE_BYTES = SIDE * STEP;
constexpr long STRIP = 2 * SIDE;         // rows of signs, and tokens, multiplied at once: four tiles of sums
constexpr long DEPTH = CHUNK * COLUMNS;  // columns whose signs are made at once
constexpr long STEP_WORDS = STEP / COLUMNS, TILE_SUMS = SIDE * SIDE;
constexpr long TILED_TOKENS = 5;         // from so many on tiles are faster than tables
#define TILED(tokens) (tokens >= TILED_TOKENS && has_tiles())

// Whether results [n, width] are written past the caches, in whole lines: of so many bytes the second cache keeps
// little until they are read, and what is written past it need not be fetched first. A fence must follow.
static inline bool is_far(const float* y, long n, long width) {
  constexpr long FAR = 1 << 20;
  return n * width * (long)sizeof(float) > FAR && width % SIDE == 0 && (uintptr_t)y % 64 == 0;
}

// All tiles are of 16 rows of 64 bytes while this lives; afterwards as the thread had them, since libraries that
// multiply on the same thread remember how they left them.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) Layout {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t width[16] = {STEP, STEP, STEP, STEP, STEP, STEP, STEP, STEP};
      uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
    };
    static const Layout layout;
    _tile_storeconfig(before);
    asm volatile("" : "+m"(before));  // not every compiler knows that it was written
    _tile_loadconfig(&layout);
  }
  ~TileScope() {
    if (before[0])
      _tile_loadconfig(before);
    else
      _tile_release();
  }

 private:
  alignas(64) uint8_t before[64];
};

struct TileKernel {
  using Code = int8_t;
  using Sum = int32_t;
};
template <>
constexpr bool is_tiled<TileKernel> = true;

// Codes as tiles [tokens / SIDE, steps, SIDE, STEP], zeros beyond.
template <>
struct Tables<TileKernel> {
  int8_t* tiles;
  long words;

  long steps() const { return divide_up(words * COLUMNS, STEP); }
  int8_t* at(long token, long step) const { return tiles + (token / SIDE * steps() + step) * TILE_BYTES; }

  static Tables room(long tokens, long words) {
    static thread_local Buffer<int8_t> buffer;
    const Tables its{nullptr, words};
    const long whole = divide_up(tokens, SIDE) * SIDE, strip = its.steps() * TILE_BYTES;
    int8_t* tiles = buffer.get(whole / SIDE * strip);
    if (whole > tokens) std::memset(tiles + (whole / SIDE - 1) * strip, 0, strip);
    return {tiles, words};
  }
  // The calling thread's own, whichever the token.
  int8_t* row(long) const {
    static thread_local Buffer<int8_t> buffer;
    return buffer.get(words * COLUMNS);
  }
  void put(long token) const {
    const int8_t* from = row(token);
    int8_t* to = at(token, 0) + token % SIDE * STEP;
    for (long left = words * COLUMNS; left > 0; left -= STEP, from += STEP, to += TILE_BYTES) {
      const __mmask64 inside = ~0ULL >> (STEP - std::min(STEP, left));
      _mm512_store_si512(to, _mm512_maskz_loadu_epi8(inside, from));
    }
  }
};

// Signs of 32 rows from `row` of a block on, of up to four words, as bytes +-1: two tiles [STEP / 4, SIDE, 4]; what is
// beyond is not touched.
static inline void spread(const Word* w, long row, long words, int8_t* to) {
  struct Places {
    alignas(64) uint8_t of[2][2][64];
    constexpr Places() : of() {
      for (int odd = 0; odd < 2; odd++)
        for (int tile = 0; tile < 2; tile++)
          for (int i = 0; i < 64; i++) of[odd][tile][i] = (uint8_t)(2 * (16 * tile + i / 4) + odd);
    }
  };
  static constexpr Places places;
  const __m512i low = _mm512_set1_epi32(0x08040201), high = _mm512_set1_epi32((int)0x80402010);
  const __m512i minus = _mm512_set1_epi8(-1), plus = _mm512_set1_epi8(1);
  for (long j = 0; j < words; j++) {
    const Word* line = w + j * ROWS + row / (2 * LINE) * 2 * LINE;
    _mm_prefetch((const char*)(w + j * ROWS + row) + AHEAD, _MM_HINT_T0);
    UNROLL for (int tile = 0; tile < 2; tile++) UNROLL for (int half = 0; half < 2; half++) {
      const __m512i eight = _mm512_loadu_si512(line + half * LINE);
      const __m512i byte = _mm512_permutexvar_epi8(_mm512_load_si512(places.of[row / LINE % 2][tile]), eight);
      int8_t* at = to + tile * TILE_BYTES + (2 * j + half) * 2 * STEP;
      _mm512_store_si512(at, _mm512_mask_blend_epi8(_mm512_test_epi8_mask(byte, low), minus, plus));
      _mm512_store_si512(at + STEP, _mm512_mask_blend_epi8(_mm512_test_epi8_mask(byte, high), minus, plus));
    }
  }
}

// Four tiles of sums, or two where R is 1, (+)= R strips of codes, `apart` bytes from each other, times two of signs.
template <int R>
static inline void multiply(const int8_t* codes, long apart, const int8_t* signs, long steps, bool fresh,
                            int32_t* sums) {
  // Not every compiler's tile instructions tell it that they read and write memory.
  asm volatile("" ::: "memory");
  if (fresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, STEP);
    _tile_loadd(1, sums + TILE_SUMS, STEP);
    if (R > 1) {
      _tile_loadd(2, sums + 2 * TILE_SUMS, STEP);
      _tile_loadd(3, sums + 3 * TILE_SUMS, STEP);
    }
  }
  for (long s = 0; s < steps; s++, codes += TILE_BYTES, signs += 2 * TILE_BYTES) {
    _tile_loadd(6, signs, STEP);
    _tile_loadd(4, codes, STEP);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, signs + TILE_BYTES, STEP);
    _tile_dpbssd(1, 4, 7);
    if (R > 1) {
      _tile_loadd(5, codes + apart, STEP);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, STEP);
  _tile_stored(1, sums + TILE_SUMS, STEP);
  if (R > 1) {
    _tile_stored(2, sums + 2 * TILE_SUMS, STEP);
    _tile_stored(3, sums + 3 * TILE_SUMS, STEP);
  }
  asm volatile("" ::: "memory");
}

// Signs of 32 rows from `row` of a block on, of a chunk of words, as tiles [steps, 2, STEP / 4, SIDE, 4].
static inline long spread_strip(const Plane& plane, long block, long row, long word, int8_t* signs) {
  const long words = std::min(CHUNK, plane.words - word);
  const Word* from = plane.at(block, word);
  for (long k = 0; k < words; k += STEP_WORDS)
    spread(from + k * ROWS, row, std::min(STEP_WORDS, words - k), signs + k / STEP_WORDS * 2 * TILE_BYTES);
  return divide_up(words, STEP_WORDS);
}

// Transpose 16 x 16 32-bit lanes.
static inline void transpose(__m512i (&v)[16]) {
  __m512i w[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int j = 0; j < 2; j++) {
    v[i + 2 * j] = _mm512_unpacklo_epi64(w[i + j], w[i + j + 2]);
    v[i + 2 * j + 1] = _mm512_unpackhi_epi64(w[i + j], w[i + j + 2]);
  }
  UNROLL for (int i = 0; i < 16; i += 8) UNROLL for (int j = 0; j < 4; j++) {
    w[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0x88);
    w[i + j + 4] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0xDD);
  }
  UNROLL for (int j = 0; j < 8; j++) {
    v[j] = _mm512_shuffle_i32x4(w[j], w[j + 8], 0x88);
    v[j + 8] = _mm512_shuffle_i32x4(w[j], w[j + 8], 0xDD);
  }
}
"""
