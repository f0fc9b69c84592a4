"""C++ text of the operators bwla::*: the glue between torch's dispatcher and the kernels, which know no torch.

The one translation unit with torch's headers. Its kernels are registered and taken back by `bwla_register` and
`bwla_unregister`, so that the Python implementations behind them serve again. What it does not take (odd dtypes,
shapes that do not fit) it hands to the portable implementation, whose words explain what is wrong.
"""

HEADER = r"""
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/util/Half.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <functional>
#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
using at::Tensor;
using Maybe = std::optional<Tensor>;
using MaybeList = c10::List<Maybe>;

namespace {

// One linear of those that share an input; mirrors `struct Member` of the kernels.
struct Member {
  const void *signs, *scale, *rank_in, *rank_out, *rank_scale, *bias;
  float* y;
  long out, planes, groups, rank;
};

// The kernels' entries, in the order of OPS_ENTRIES in library.py.
struct Kernels {
  long (*packed_bytes)(long, long, long);
  long (*packed_scales)(long, long, long);
  void (*pack)(const void*, void*, long, long, long, long);
  void (*pack_scale)(const void*, void*, long, long, long);
  void (*linear)(const void*, const void*, long, long, int, const Member*, long, long);
  void (*int8_linear)(const void*, const void*, const void*, const void*, void*, long, long, long, long);
  void (*transform)(const void*, const void*, const void*, const void*, void*, long, long, long, long);
  void (*int8_embedding)(const void*, const void*, const void*, void*, long, long);
};
Kernels kernels;
"""

ROUTES = r"""
// No backend has this key, so it leads to the implementation in plain torch (CompositeExplicitAutograd).
constexpr c10::DispatchKeySet PORTABLE(c10::DispatchKey::PrivateUse3);

// Runs an operator; its backward asks for a gradient that raises when it is computed, and not before.
struct Refusal : torch::autograd::Function<Refusal> {
  using Run = std::function<torch::autograd::variable_list()>;
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const Tensor& x,
                                                const Run& run) {
    context->saved_data["shape"] = x.sym_sizes().vec();
    return run();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    static auto refuse = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("bwla::refuse_gradient", "")
                             .typed<Tensor(const Tensor&, c10::SymIntArrayRef)>();
    const auto shape = context->saved_data["shape"].toSymIntVector();
    for (auto& gradient : gradients)
      if (gradient.defined()) return {refuse.call(gradient, shape), Tensor()};
    return {Tensor(), Tensor()};
  }
};

torch::autograd::variable_list listed(Tensor y) { return {std::move(y)}; }
torch::autograd::variable_list listed(std::vector<Tensor> ys) { return ys; }

// The implementations of operator Name::name; `direct` is the one for the CPU.
template <class Name, class F>
struct Route;

template <class Name, class R, class... A>
struct Route<Name, R(A...)> {
  template <R (*direct)(A...)>
  static R differentiable(c10::DispatchKeySet keys, A... a) {
    const Tensor& x = std::get<0>(std::tie(a...));
    const bool tracked = x.requires_grad() && at::GradMode::is_enabled();
    const bool plain = (keys & c10::after_ADInplaceOrView_keyset).highestPriorityTypeId() == c10::DispatchKey::CPU;
    auto run = [&]() -> R {
      at::AutoDispatchBelowAutograd guard;
      return plain ? direct(a...) : handle().redispatch(keys & c10::after_autograd_keyset, a...);
    };
    if (!tracked) return run();
    auto results = Refusal::apply(x, Refusal::Run([&] { return listed(run()); }));
    if constexpr (std::is_same_v<R, Tensor>)
      return results[0];
    else
      return results;
  }

  static const c10::TypedOperatorHandle<R(A...)>& handle() {
    static auto found = c10::Dispatcher::singleton().findSchemaOrThrow(Name::name, "").template typed<R(A...)>();
    return found;
  }

  static R portable(A... a) { return handle().redispatch(PORTABLE, a...); }
};
"""

DERIVED = r"""
constexpr int NO_EXPONENT = 1 << 10;

// Values derived from tensors, each kept while its tensor lives and is not edited. The weak reference keeps the
// TensorImpl's address from being taken by another tensor; entries of dead tensors leave when a new one comes.
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
    if (found != entries.end() && found->second.describes(tensor, extra)) return found->second.value;
    for (auto it = entries.begin(); it != entries.end();) it = it->second.owner.expired() ? entries.erase(it) : ++it;
    entries.erase(key);
    made++;
    Tensor value = make();
    entries.emplace(key, Entry{decltype(Entry::owner)(tensor.getIntrusivePtr()), tensor.data_ptr(), tensor._version(), extra,
                               tensor.scalar_type(), tensor.sizes().vec(), tensor.strides().vec(), value});
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
    c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl> owner;
    const void* data;
    int64_t version;
    int extra;
    at::ScalarType type;
    std::vector<int64_t> sizes, strides;
    Tensor value;

    bool describes(const Tensor& t, int extra) const {
      return data == t.data_ptr() && version == t._version() && this->extra == extra && type == t.scalar_type() &&
             t.sizes() == sizes && t.strides() == strides;
    }
  };
  std::mutex mutex;
  std::unordered_map<at::TensorImpl*, Entry> entries;
};

// Never destroyed: tensors may die after static destructors ran.
struct Caches {
  Derived signs, values, groups;
};
Caches& caches() {
  static auto* all = new Caches;
  return *all;
}

bool dense_cpu(const Tensor& t) { return t.device().is_cpu() && t.layout() == at::kStrided; }
bool is_float(const Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf;
}
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
Tensor new_floats(at::IntArrayRef sizes) { return at::empty(sizes, at::TensorOptions().dtype(at::kFloat)); }

int power_of(const Maybe& exponent) { return exponent ? *exponent->const_data_ptr<int8_t>() : NO_EXPONENT; }

// float16(bits) * 2^power, as `halves.decode` has it: the power is put together from its bits.
Tensor decode(const Tensor& bits, int power) {
  const Tensor source = bits.contiguous();
  Tensor values = new_floats(source.sizes());
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
  return caches().values.get(t, power, [&] { return decode(t, power); });
}
Tensor values_of(const Maybe& t, const Maybe& exponent) { return t ? values_of(*t, exponent) : Tensor(); }

Tensor packed_signs(const Tensor& signs, long columns) {
  return caches().signs.get(signs, 0, [&] {
    const Tensor source = signs.contiguous();
    const long planes = source.size(0), out = source.size(1);
    Tensor packed = at::empty({kernels.packed_bytes(planes, out, columns)}, at::TensorOptions().dtype(at::kByte));
    kernels.pack(source.const_data_ptr(), packed.mutable_data_ptr(), planes, out, columns, at::get_num_threads());
    return packed;
  });
}

// Scales as the kernel takes them: by row as they are, by group in the kernel's order.
Tensor packed_scale(const Tensor& scale, const Maybe& exponent) {
  if (scale.size(2) == 1) return values_of(scale, exponent);
  const int power = power_of(exponent);
  return caches().groups.get(scale, power, [&] {
    const Tensor source = exponent ? decode(scale, power) : plain(scale);
    const long planes = source.size(0), out = source.size(1), groups = source.size(2);
    Tensor packed = new_floats({kernels.packed_scales(planes, out, groups)});
    kernels.pack_scale(source.const_data_ptr(), packed.mutable_data_ptr(), planes, out, groups);
    return packed;
  });
}

const void* address(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
"""

LINEAR = r"""
struct Linear {
  const Tensor &signs, &scale;
  const Maybe &rank_in, &rank_out, &rank_scale, &bias, &scale_exponent, &rank_scale_exponent;

  // Whether the tensors fit each other and x; the portable implementation says what does not.
  bool fits(int64_t columns) const {
    if (!dense_cpu(signs) || signs.scalar_type() != at::kByte || signs.dim() != 3) return false;
    if (signs.size(2) != (columns + 7) / 8 || scale.dim() != 3 || !are_values(scale, scale_exponent)) return false;
    const int64_t out = signs.size(1), groups = scale.size(2);
    if (scale.size(0) != signs.size(0) || scale.size(1) != out || (groups != 1 && groups != (columns + 127) / 128))
      return false;
    if (!is_float(bias) || (bias && (bias->dim() != 1 || bias->size(0) != out))) return false;
    if (!rank_in && !rank_out && !rank_scale) return !rank_scale_exponent;
    if (!rank_in || !rank_out || !rank_scale || !dense_cpu(*rank_in) || !dense_cpu(*rank_out)) return false;
    if (rank_in->scalar_type() != at::kChar || rank_out->scalar_type() != at::kChar || rank_in->dim() != 2) return false;
    const int64_t rank = rank_in->size(0);
    return rank_in->size(1) == columns && rank_out->dim() == 2 && rank_out->size(0) == out &&
           rank_out->size(1) == rank && rank_scale->dim() == 1 && rank_scale->size(0) == rank &&
           are_values(*rank_scale, rank_scale_exponent);
  }
};

bool takes(const Tensor& x, const Maybe& column_scale, const Maybe& column_exponent, int64_t bits) {
  if (x.dim() < 1 || !dense_cpu(x) || !is_float(x) || !((2 <= bits && bits <= 8) || bits >= 16)) return false;
  if (!are_values(column_scale, column_exponent)) return false;
  return !column_scale || (column_scale->dim() == 1 && column_scale->size(0) == x.size(-1));
}

// An empty float32 result with the leading dimensions of x.
Tensor result_of(const Tensor& x, int64_t features) {
  c10::SmallVector<int64_t, 5> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = features;
  return new_floats(sizes);
}

int64_t tokens_of(const Tensor& x) { return c10::multiply_integers(x.sizes().begin(), x.sizes().end() - 1); }

Tensor typed_like(Tensor y, const Tensor& x) { return y.scalar_type() == x.scalar_type() ? y : y.to(x.scalar_type()); }

// One result per linear, for x that they share; all fit.
std::vector<Tensor> run_linears(const Tensor& x, const std::vector<Linear>& linears, const Tensor& column_scale,
                                int64_t bits) {
  const Tensor rows = plain(x);
  c10::SmallVector<Member, 4> members;
  c10::SmallVector<Tensor, 16> kept;  // the addresses below are valid while these live
  auto keep = [&](const Tensor& t) {
    kept.push_back(t);
    return address(t);
  };
  std::vector<Tensor> results;
  for (const Linear& linear : linears) {
    Tensor y = result_of(x, linear.signs.size(1));
    Member member{};
    member.signs = keep(packed_signs(linear.signs, x.size(-1)));
    member.scale = keep(packed_scale(linear.scale, linear.scale_exponent));
    member.bias = linear.bias ? keep(plain(*linear.bias)) : nullptr;
    member.y = y.mutable_data_ptr<float>();
    member.planes = linear.signs.size(0), member.out = linear.signs.size(1), member.groups = linear.scale.size(2);
    if (linear.rank_in) {
      member.rank_in = keep(linear.rank_in->contiguous()), member.rank_out = keep(linear.rank_out->contiguous());
      member.rank_scale = keep(values_of(*linear.rank_scale, linear.rank_scale_exponent));
      member.rank = linear.rank_in->size(0);
    }
    members.push_back(member);
    results.push_back(std::move(y));
  }
  const int limit = bits >= 16 ? 0 : (1 << (bits - 1)) - 1;
  kernels.linear(rows.const_data_ptr(), address(column_scale), tokens_of(x), x.size(-1), limit, members.data(),
                 (long)members.size(), at::get_num_threads());
  for (Tensor& y : results) y = typed_like(std::move(y), x);
  return results;
}

struct LinearName { static constexpr const char* name = "bwla::linear"; };
using LinearRoute =
    Route<LinearName, Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Maybe&,
                             const Maybe&, const Maybe&, int64_t, const Maybe&, const Maybe&, const Maybe&)>;

Tensor linear(const Tensor& x, const Tensor& signs, const Tensor& scale, const Maybe& column_scale,
              const Maybe& rank_in, const Maybe& rank_out, const Maybe& rank_scale, const Maybe& bias, int64_t bits,
              const Maybe& scale_exponent, const Maybe& column_exponent, const Maybe& rank_exponent) {
  const Linear member{signs, scale, rank_in, rank_out, rank_scale, bias, scale_exponent, rank_exponent};
  if (!takes(x, column_scale, column_exponent, bits) || !member.fits(x.size(-1)))
    return LinearRoute::portable(x, signs, scale, column_scale, rank_in, rank_out, rank_scale, bias, bits,
                                 scale_exponent, column_exponent, rank_exponent);
  return run_linears(x, {member}, values_of(column_scale, column_exponent), bits)[0];
}

struct GroupName { static constexpr const char* name = "bwla::linear_group"; };
using GroupRoute =
    Route<GroupName, std::vector<Tensor>(const Tensor&, at::TensorList, at::TensorList, const Maybe&, const MaybeList&,
                                         const MaybeList&, const MaybeList&, const MaybeList&, int64_t,
                                         const MaybeList&, const Maybe&, const MaybeList&)>;

std::vector<Tensor> linear_group(const Tensor& x, at::TensorList signs, at::TensorList scale,
                                 const Maybe& column_scale, const MaybeList& rank_in, const MaybeList& rank_out,
                                 const MaybeList& rank_scale, const MaybeList& bias, int64_t bits,
                                 const MaybeList& scale_exponent, const Maybe& column_exponent,
                                 const MaybeList& rank_exponent) {
  bool good = takes(x, column_scale, column_exponent, bits) && scale.size() == signs.size();
  for (const MaybeList* list : {&rank_in, &rank_out, &rank_scale, &bias, &scale_exponent, &rank_exponent})
    good = good && list->size() == signs.size();
  std::vector<std::vector<Maybe>> parts;  // of each member, alive while the linears refer to them
  for (size_t i = 0; good && i < signs.size(); i++)
    parts.push_back({rank_in.get(i), rank_out.get(i), rank_scale.get(i), bias.get(i), scale_exponent.get(i),
                     rank_exponent.get(i)});
  std::vector<Linear> members;
  for (size_t i = 0; i < parts.size(); i++) {
    const auto& p = parts[i];
    members.push_back(Linear{signs[i], scale[i], p[0], p[1], p[2], p[3], p[4], p[5]});
    good = good && members.back().fits(x.size(-1));
  }
  if (!good)
    return GroupRoute::portable(x, signs, scale, column_scale, rank_in, rank_out, rank_scale, bias, bits,
                                scale_exponent, column_exponent, rank_exponent);
  return run_linears(x, members, values_of(column_scale, column_exponent), bits);
}
"""

ENDS = r"""
long int8_tokens = 0;  // beyond, torch's float matrix product serves

struct Int8Name { static constexpr const char* name = "bwla::int8_linear"; };
using Int8Route =
    Route<Int8Name, Tensor(const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&)>;

Tensor int8_linear(const Tensor& x, const Tensor& codes, const Tensor& scale, const Maybe& bias,
                   const Maybe& exponent) {
  const bool good = x.dim() >= 1 && dense_cpu(x) && is_float(x) && dense_cpu(codes) && codes.dim() == 2 &&
                    codes.scalar_type() == at::kChar && codes.size(1) == x.size(-1) && are_values(scale, exponent) &&
                    scale.dim() == 1 && scale.size(0) == codes.size(0) && is_float(bias) &&
                    (!bias || (bias->dim() == 1 && bias->size(0) == codes.size(0)));
  if (!good || tokens_of(x) > int8_tokens) return Int8Route::portable(x, codes, scale, bias, exponent);
  const Tensor rows = plain(x), table = codes.contiguous(), values = values_of(scale, exponent);
  const Tensor shift = bias ? plain(*bias) : Tensor();
  Tensor y = result_of(x, codes.size(0));
  kernels.int8_linear(rows.const_data_ptr(), table.const_data_ptr(), address(values), address(shift),
                      y.mutable_data_ptr(), tokens_of(x), codes.size(0), codes.size(1), at::get_num_threads());
  return typed_like(std::move(y), x);
}

struct EmbeddingName { static constexpr const char* name = "bwla::int8_embedding"; };
using EmbeddingRoute =
    Route<EmbeddingName, Tensor(const Tensor&, const Tensor&, const Tensor&, at::ScalarType, const Maybe&)>;

Tensor int8_embedding(const Tensor& ids, const Tensor& codes, const Tensor& scale, at::ScalarType dtype,
                      const Maybe& exponent) {
  bool good = dense_cpu(ids) && ids.scalar_type() == at::kLong && dense_cpu(codes) && codes.dim() == 2 &&
              codes.scalar_type() == at::kChar && are_values(scale, exponent) && scale.dim() == 1 &&
              scale.size(0) == codes.size(0);
  const Tensor rows = good ? ids.contiguous() : ids;
  const int64_t n = ids.numel();
  for (int64_t i = 0; good && i < n; i++) {
    const int64_t id = rows.const_data_ptr<int64_t>()[i];
    good = id >= 0 && id < codes.size(0);
  }
  if (!good) return EmbeddingRoute::portable(ids, codes, scale, dtype, exponent);
  const Tensor table = codes.contiguous(), values = values_of(scale, exponent);
  c10::SmallVector<int64_t, 5> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(codes.size(1));
  Tensor y = new_floats(sizes);
  kernels.int8_embedding(rows.const_data_ptr(), table.const_data_ptr(), address(values), y.mutable_data_ptr(), n,
                         codes.size(1));
  return dtype == at::kFloat ? y : y.to(dtype);
}

struct TransformName { static constexpr const char* name = "bwla::transform"; };
using TransformRoute = Route<TransformName, Tensor(const Tensor&, const Maybe&, const Maybe&, const Maybe&,
                                                   const Maybe&, const Maybe&, const Maybe&)>;

int64_t side(const Maybe& factor) { return factor ? factor->size(0) : 0; }
bool is_square(const Maybe& factor) {
  return !factor || (factor->dim() == 2 && factor->size(0) == factor->size(1) && factor->size(0) > 0);
}

Tensor transform(const Tensor& x, const Maybe& scale, const Maybe& left, const Maybe& right,
                 const Maybe& scale_exponent, const Maybe& left_exponent, const Maybe& right_exponent) {
  bool good = x.dim() >= 1 && dense_cpu(x) && is_float(x) && are_values(scale, scale_exponent) &&
              are_values(left, left_exponent) && are_values(right, right_exponent) && is_square(left) &&
              is_square(right) && (!scale || (scale->dim() == 1 && scale->size(0) == x.size(-1)));
  int64_t n1 = 1, n2 = 1;
  if (good) {
    n1 = left ? side(left) : right ? x.size(-1) / side(right) : 1;
    n2 = right ? side(right) : x.size(-1) / n1;
    good = n1 * n2 == x.size(-1);
  }
  if (!good)
    return TransformRoute::portable(x, scale, left, right, scale_exponent, left_exponent, right_exponent);
  const Tensor rows = plain(x), s = values_of(scale, scale_exponent);
  const Tensor l = values_of(left, left_exponent), r = values_of(right, right_exponent);
  Tensor y = result_of(x, x.size(-1));
  kernels.transform(rows.const_data_ptr(), address(s), address(l), address(r), y.mutable_data_ptr(), tokens_of(x), n1,
                    n2, at::get_num_threads());
  return typed_like(std::move(y), x);
}
"""

REGISTRATION = r"""
std::vector<std::unique_ptr<torch::Library>> registered;

struct Silent : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

}  // namespace

// Put the kernels before the Python implementations. entries: a struct Kernels.
EXPORT void bwla_register(const void* entries, long tokens) {
  std::memcpy(&kernels, entries, sizeof kernels);
  int8_tokens = tokens;
  static Silent silent;  // torch warns of a second kernel for one key, which is what is meant here
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  registered.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "bwla", c10::DispatchKey::CPU, __FILE__,
                                                        __LINE__));
  registered.back()->impl("linear", TORCH_FN(linear));
  registered.back()->impl("linear_group", TORCH_FN(linear_group));
  registered.back()->impl("int8_linear", TORCH_FN(int8_linear));
  registered.back()->impl("int8_embedding", TORCH_FN(int8_embedding));
  registered.back()->impl("transform", TORCH_FN(transform));
  registered.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "bwla", c10::DispatchKey::Autograd,
                                                        __FILE__, __LINE__));
  registered.back()->impl("linear", TORCH_FN(LinearRoute::differentiable<linear>));
  registered.back()->impl("linear_group", TORCH_FN(GroupRoute::differentiable<linear_group>));
  registered.back()->impl("int8_linear", TORCH_FN(Int8Route::differentiable<int8_linear>));
  registered.back()->impl("transform", TORCH_FN(TransformRoute::differentiable<transform>));
  registered.back()->impl("int8_embedding", torch::CppFunction::makeFallthrough());
}

// Take them back, and drop what was derived from tensors.
EXPORT void bwla_unregister() {
  registered.clear();
  for (Derived* cache : {&caches().signs, &caches().values, &caches().groups}) cache->clear();
}

// Drop what was derived from the tensor with this address of its TensorImpl.
EXPORT void bwla_forget(void* tensor) {
  for (Derived* cache : {&caches().signs, &caches().values, &caches().groups})
    cache->forget((at::TensorImpl*)tensor);
}

// How many values were derived since the library was loaded.
EXPORT long bwla_derived() { return caches().signs.made + caches().values.made + caches().groups.made; }
"""


def emit_operators() -> str:
    """Return the C++20 source of the operators; compiled against torch's headers, free of any instruction set."""
    parts = ("// bwla operators; generated", HEADER, ROUTES, DERIVED, LINEAR, ENDS, REGISTRATION)
    return "\n".join(part.strip("\n") for part in parts) + "\n"
