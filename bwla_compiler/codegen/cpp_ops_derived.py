"""C++ text of what is derived from tensors and kept: kernel layouts, decoded scales."""

from bwla_compiler.codegen.cpp_transform import SIDES

DERIVED = (
    SIDES
    + r"""
constexpr int NO_EXPONENT = 1 << 10;

// A tensor as it was when something was derived from it. The weak references keep the addresses of its TensorImpl and
// its storage from being taken by others; they do not keep its values.
struct Seen {
  c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl> owner;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  const at::TensorImpl* impl;
  const void* data;
  int64_t version;
  caffe2::TypeMeta type;
  c10::SmallVector<int64_t, 3> sizes, strides;

  explicit Seen(const Tensor& t)
      : owner(t.getIntrusivePtr()), storage(t.storage().getWeakStorageImpl()), impl(t.unsafeGetTensorImpl()),
        data(t.const_data_ptr()), version(t._version()), type(t.dtype()),
        sizes(t.sizes().begin(), t.sizes().end()), strides(t.strides().begin(), t.strides().end()) {}

  // Have what `holds` looks at fetched: it lies all over memory, and a step's weights have driven it out of the caches.
  void fetch() const {
    auto lines = [](const void* at, size_t n) {
      for (size_t line = 0; line < n; line += 64) __builtin_prefetch((const char*)at + line);
    };
    lines(impl, sizeof *impl), lines(storage._unsafe_get_target(), sizeof(c10::StorageImpl));
  }

  // Whether the tensor lives, and nobody has edited it.
  bool holds() const {
    return !owner.expired() && impl->version_counter().current_version() == version && impl->data() == data &&
           storage._unsafe_get_target() == impl->unsafe_storage().unsafeGetStorageImpl() && impl->dtype() == type &&
           impl->sizes() == at::IntArrayRef(sizes) && impl->strides() == at::IntArrayRef(strides);
  }
};

// Values derived from tensors, each kept while its tensor lives and is not edited; entries of dead tensors leave when a
// new one comes.
class Derived {
 public:
  // make(), called once a state of `tensor` and `extra`. An inference tensor has no version: nothing is kept for it.
  template <class F>
  Tensor get(const Tensor& tensor, int extra, const F& make) {
    if (tensor.is_inference()) {
      TORCH_WARN_ONCE("weights made under torch.inference_mode() have no version, so their kernel layout is derived ",
                      "anew at every call; make or load the model outside inference mode");
      return make();
    }
    at::TensorImpl* key = tensor.unsafeGetTensorImpl();
    std::lock_guard<std::mutex> lock(mutex);
    auto found = entries.find(key);
    if (found != entries.end() && found->second.extra == extra && found->second.seen.holds())
      return found->second.value;
    for (auto it = entries.begin(); it != entries.end();)
      it = it->second.seen.owner.expired() ? entries.erase(it) : ++it;
    entries.erase(key);
    made++;
    Seen seen(tensor);  // before: an edit while the value is made is one to be seen
    Tensor value = make();
    entries.emplace(key, Entry{std::move(seen), extra, value});
    return value;
  }

  void forget(at::TensorImpl* key) {
    std::lock_guard<std::mutex> lock(mutex);
    entries.erase(key);
  }

  void clear() {
    std::lock_guard<std::mutex> lock(mutex);
    entries.clear();
  }

  long made = 0;

 private:
  struct Entry {
    Seen seen;
    int extra;
    Tensor value;
  };
  std::mutex mutex;
  std::unordered_map<at::TensorImpl*, Entry> entries;
};

// Never destroyed: tensors may die after static destructors ran.
struct Caches {
  Derived signs, values, groups, pairs, factors;
  std::array<Derived*, 5> all() { return {&signs, &values, &groups, &pairs, &factors}; }
};
Caches& caches() {
  static auto* all = new Caches;
  return *all;
}

bool dense_cpu(const Tensor& t) { return t.device().is_cpu() && t.layout() == at::kStrided; }
bool is_float(const Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf;
}
// Whether x can be a kernel's input: floats [..., n] on the CPU.
bool is_input(const Tensor& x) { return x.dim() >= 1 && dense_cpu(x) && is_float(x); }
bool is_float(const Maybe& t) { return !t || (is_float(*t) && dense_cpu(*t)); }

// Whether these are values: floats, or int16 bits of float16 with an int8 power of two beside them.
bool are_values(const Tensor& t, const Maybe& exponent) {
  if (!dense_cpu(t)) return false;
  if (!exponent) return is_float(t);
  return t.scalar_type() == at::kShort && exponent->scalar_type() == at::kChar && exponent->numel() == 1 &&
         dense_cpu(*exponent);
}
bool are_values(const Maybe& t, const Maybe& exponent) { return t ? are_values(*t, exponent) : !exponent; }

Tensor plain(const Tensor& t) {  // float32 and contiguous; t itself where it is so
  return t.scalar_type() == at::kFloat && t.is_contiguous() ? t : t.to(at::kFloat).contiguous();
}

constexpr size_t PAGE = 2 << 20;  // a huge one

// A hint that n bytes be huge pages where the system has them; small pages serve as well.
void advise_huge([[maybe_unused]] void* from, [[maybe_unused]] size_t n) {
#ifdef __linux__
  const uintptr_t first = ((uintptr_t)from + PAGE - 1) / PAGE * PAGE, last = ((uintptr_t)from + n) / PAGE * PAGE;
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// Memory of large results that were freed, for later ones of the same size. Malloc gives much of such memory back to
// the system at once, and to have its pages cleared again takes as long as to fill them. Of the largest, one is kept,
// whose pages the system may have whenever it wants them.
class Spares {
  struct Block {
    void* at = nullptr;
    size_t size = 0;
  };
  static constexpr size_t LARGE = 32 << 20, MOST = 64 << 20;  // bytes; MOST: of all that are not the largest

  std::mutex mutex;
  std::vector<Block> blocks;  // those that were freed first, first
  Block largest;
  size_t total = 0;

 public:
  static Spares& its() {
    static Spares* const only = new Spares;  // never destroyed: results may outlive static destructors
    return *only;
  }

  // A block of n bytes, whole pages.
  void* take(size_t n) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (largest.size == n) return std::exchange(largest, {}).at;
      const auto found = std::find_if(blocks.rbegin(), blocks.rend(), [n](const Block& b) { return b.size == n; });
      if (found != blocks.rend()) {
        void* const at = found->at;
        blocks.erase(std::next(found).base());
        total -= n;
        return at;
      }
    }
    void* fresh = allocate(n);
    if (!fresh) forget(), fresh = allocate(n);
    TORCH_CHECK(fresh, "bwla: no memory for a result of ", n >> 20,
                " MiB; a shorter prompt or a smaller batch needs less");
    advise_huge(fresh, n);
    return fresh;
  }

  void give(void* at, size_t n) {
    if (n >= LARGE && !leave_to_system(at, n)) return drop(at);
    const std::lock_guard<std::mutex> lock(mutex);
    if (n >= LARGE) return drop(std::exchange(largest, {at, n}).at);
    blocks.push_back({at, n});
    for (total += n; total > MOST; blocks.erase(blocks.begin())) total -= blocks[0].size, drop(blocks[0].at);
  }

 private:
  static void* allocate(size_t n) { return ::operator new(n, std::align_val_t(PAGE), std::nothrow); }
  static void drop(void* at) { ::operator delete(at, std::align_val_t(PAGE)); }

  void forget() {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const Block& block : blocks) drop(block.at);
    drop(std::exchange(largest, {}).at);
    blocks.clear();
    total = 0;
  }

  // Let the system have the pages of what was freed whenever it wants them; whether that can be.
  static bool leave_to_system([[maybe_unused]] void* at, [[maybe_unused]] size_t n) {
#if defined(__linux__) && defined(MADV_FREE)
    return madvise(at, n, MADV_FREE) == 0;
#else
    return false;
#endif
  }
};

Tensor new_floats(at::IntArrayRef sizes) {
  const size_t wanted = c10::multiply_integers(sizes) * sizeof(float), n = (wanted + PAGE - 1) / PAGE * PAGE;
  if (wanted < PAGE) return at::detail::empty_cpu(sizes, at::kFloat);  // as at::empty, without the dispatcher
  return at::from_blob(Spares::its().take(n), sizes, [n](void* p) { Spares::its().give(p, n); }, at::kFloat);
}

// Bytes of what is derived, some tensors to a block of huge pages where the system has them: a linear reads all of its
// signs at every call, and finding small pages takes a tenth of its time. A block lives as long as what lies in it.
Tensor new_bytes(size_t n) {
  constexpr size_t LINE = 64, BLOCK = 16 << 20;
  static std::mutex mutex;
  static std::shared_ptr<uint8_t> block;
  static size_t used = 0, size = 0;
  const size_t wanted = (n + LINE - 1) / LINE * LINE;
  std::lock_guard<std::mutex> lock(mutex);
  if (!block || wanted > size - used) {
    used = 0, size = std::max(BLOCK, (wanted + PAGE - 1) / PAGE * PAGE);
    block.reset((uint8_t*)::operator new(size, std::align_val_t(PAGE)),
                [](uint8_t* p) { ::operator delete(p, std::align_val_t(PAGE)); });
    advise_huge(block.get(), size);
  }
  uint8_t* at = block.get() + used;
  used += wanted;
  return at::from_blob(at, {(int64_t)n}, [held = block](void*) {}, at::TensorOptions().dtype(at::kByte));
}
Tensor new_kept_floats(at::IntArrayRef sizes) {
  return new_bytes(c10::multiply_integers(sizes) * sizeof(float)).view(at::kFloat).view(sizes);
}

int power_of(const Maybe& exponent) { return exponent ? *exponent->const_data_ptr<int8_t>() : NO_EXPONENT; }

// values = float16(bits) * 2^power, as `halves.decode` has it: the power is put together from its bits.
Tensor decode(const Tensor& bits, int power, Tensor values) {
  const Tensor source = bits.contiguous();
  const int32_t word = (power + 127) << 23;
  float factor;
  std::memcpy(&factor, &word, sizeof factor);
  const auto* from = (const uint16_t*)source.const_data_ptr();
  float* to = values.mutable_data_ptr<float>();
  for (int64_t i = 0; i < source.numel(); i++)
    to[i] = (float)c10::Half(from[i], c10::Half::from_bits()) * factor;
  return values;
}

Tensor values_of(const Tensor& t, const Maybe& exponent) {
  if (!exponent) return plain(t);
  const int power = power_of(exponent);
  return caches().values.get(t, power, [&] { return decode(t, power, new_kept_floats(t.sizes())); });
}
Tensor values_of(const Maybe& t, const Maybe& exponent) { return t ? values_of(*t, exponent) : Tensor(); }

Tensor packed_signs(const Tensor& signs, long columns) {
  return caches().signs.get(signs, 0, [&] {
    const Tensor source = signs.contiguous();
    const long planes = source.size(0), out = source.size(1);
    Tensor packed = new_bytes(kernels.packed_bytes(planes, out, columns));
    kernels.pack(source.const_data_ptr(), packed.mutable_data_ptr(), planes, out, columns, at::get_num_threads());
    return packed;
  });
}

// Scales as the kernel takes them: by row as they are, by group in the kernel's order.
Tensor packed_scale(const Tensor& scale, const Maybe& exponent) {
  if (scale.size(2) == 1) return values_of(scale, exponent);
  const int power = power_of(exponent);
  return caches().groups.get(scale, power, [&] {
    const Tensor source = exponent ? decode(scale, power, new_floats(scale.sizes())) : plain(scale);
    const long planes = source.size(0), out = source.size(1), groups = source.size(2);
    Tensor packed = new_floats({kernels.packed_scales(planes, out, groups)});
    kernels.pack_scale(source.const_data_ptr(), packed.mutable_data_ptr(), planes, out, groups);
    return packed;
  });
}

Tensor packed_pair(const Tensor& codes) {
  return caches().pairs.get(codes, 0, [&] {
    const Tensor source = codes.contiguous();
    const long out = source.size(0), rank = source.size(1);
    Tensor packed = at::empty({kernels.packed_pair(out, rank)}, at::TensorOptions().dtype(at::kChar));
    kernels.pack_pair(source.const_data_ptr(), packed.mutable_data_ptr(), out, rank);
    return packed;
  });
}

// A factor [n, n], the signs [n] of the right one, or the scale [n] before them, as the kernel takes it.
Tensor packed_factor(const Maybe& factor, const Maybe& exponent, Side side) {
  if (!factor) return Tensor();
  const int power = power_of(exponent);
  return caches().factors.get(*factor, 4 * power + side, [&] {
    const Tensor source = exponent ? decode(*factor, power, new_floats(factor->sizes())) : plain(*factor);
    const long n = source.size(0);
    Tensor packed = new_kept_floats({kernels.packed_factor(n, side)});
    kernels.pack_factor(source.const_data_ptr(), packed.mutable_data_ptr(), n, side);
    return packed;
  });
}

const void* address(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
"""
)
