"""C++ text of the operators bwla::*: the glue between torch's dispatcher and the kernels, which know no torch.

The one translation unit with torch's headers. Its kernels are registered and taken back by `bwla_register` and
`bwla_unregister`, so that the Python implementations behind them serve again. What it does not take (odd dtypes,
shapes that do not fit) it hands to the portable implementation, whose words explain what is wrong.
"""

from bwla_compiler.codegen.cpp_ops_attention import ATTENTION
from bwla_compiler.codegen.cpp_ops_cache import CACHE
from bwla_compiler.codegen.cpp_ops_derived import DERIVED
from bwla_compiler.codegen.cpp_ops_ends import ENDS
from bwla_compiler.codegen.cpp_ops_fused import FUSED
from bwla_compiler.codegen.cpp_ops_linear import LINEAR
from bwla_compiler.codegen.cpp_ops_routes import ROUTES
from bwla_compiler.codegen.cpp_ops_routines import EXPORTS, REGISTERED, ROUTINES

HEADER = r"""
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/sin.h>
#include <c10/util/Half.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

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
  const void* residual;
};

// What precedes the linears; mirrors `struct Prologue` of the kernels.
struct Prologue {
  long kind;
  float eps;
  const void *gate, *gain, *shift, *scale, *left, *right;
  long n1, n2;
};

// Keys or values, and attention to them; mirror the structs of the kernels.
struct Cached {
  const void* data;
  long batch, head, token;
  const float* scale;
  long scale_batch, scale_head, scale_token;
};
struct Attention {
  const float* queries;
  const void* mask;
  float* y;
  Cached keys, values;
  long query_batch, query_head, query_token, mask_batch, mask_head, mask_token, mask_bytes;
  long batch, heads, group, tokens, length, size, bytes;
  float scale;
  bool causal;
  const float *cos, *sin;
  long turn_batch, turn_token;
};

// Rows on their way to attention; mirrors `struct Rows` of the kernels.
struct Rows {
  const float *x, *cos, *sin;
  void* y;
  float* scale;
  long x_batch, x_token, x_head, y_batch, y_head, y_token, scale_batch, scale_head, scale_token;
  long turn_batch, turn_token, batch, tokens, heads, size;
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
  void (*use_team)(void (*)(long, void (*)(void*), void*));
  void (*fused_group)(const void*, const Prologue*, const void*, long, long, int, const Member*, long, long);
  void (*prologue)(const void*, const Prologue*, void*, long, long, long);
  void (*int4_linear)(const void*, const void*, const void*, const void*, void*, long, long, long, long, long, long);
  void (*int4_embedding)(const void*, const void*, const void*, void*, long, long, long, long);
  long (*packed_pair)(long, long);
  void (*pack_pair)(const void*, void*, long, long);
  long (*packed_factor)(long, long);
  void (*pack_factor)(const void*, void*, long, long);
  void (*attend)(const Attention*, long);
  void (*place)(const Rows*, long);
};
Kernels kernels;
"""

REGISTRATION = r"""
std::vector<std::unique_ptr<torch::Library>> registered;

// The kernels compute on torch's own threads; inside a parallel region of torch, on the caller's alone.
void run_team(long threads, void (*body)(void*), void* context) {
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(context); });
}

struct Silent : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

}  // namespace

// Put the kernels before the Python implementations. entries: a struct Kernels.
EXPORT void bwla_register(const void* entries, long most_int8, long most_int4) {
  std::memcpy(&kernels, entries, sizeof kernels);
  int8_tokens = most_int8, int4_tokens = most_int4;
  kernels.use_team(run_team);
  static Silent silent;  // torch warns of a second kernel for one key, which is what is meant here
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  registered.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "bwla", c10::DispatchKey::CPU, __FILE__,
                                                        __LINE__));
  registered.back()->impl("linear", TORCH_FN(linear));
  registered.back()->impl("linear_group", TORCH_FN(linear_group));
  registered.back()->impl("fused_group", TORCH_FN(fused_group));
  ROUTINES
  registered.back()->impl("int8_linear", TORCH_FN(int8_linear));
  registered.back()->impl("int8_embedding", TORCH_FN(int8_embedding));
  registered.back()->impl("int4_linear", TORCH_FN(int4_linear));
  registered.back()->impl("int4_embedding", TORCH_FN(int4_embedding));
  registered.back()->impl("transform", TORCH_FN(transform));
  registered.back()->impl("prologue", TORCH_FN(prologue));
  registered.back()->impl("attend", TORCH_FN(attend));
  registered.back()->impl("cached_attention", TORCH_FN(cached_attention));
  registered.back()->impl("sin", [](const Tensor& x) { return at::sin(x); });
  registered.back()->impl("cos", [](const Tensor& x) { return at::cos(x); });
  registered.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, "bwla", c10::DispatchKey::Autograd,
                                                        __FILE__, __LINE__));
  registered.back()->impl("linear", TORCH_FN(LinearRoute::differentiable<linear>));
  registered.back()->impl("linear_group", TORCH_FN(GroupRoute::differentiable<linear_group>));
  registered.back()->impl("fused_group", TORCH_FN(FusedRoute::differentiable<fused_group>));
  registered.back()->impl("int8_linear", TORCH_FN(Int8Route::differentiable<int8_linear>));
  registered.back()->impl("transform", TORCH_FN(TransformRoute::differentiable<transform>));
  registered.back()->impl("prologue", TORCH_FN(PrologueRoute::differentiable<prologue>));
  registered.back()->impl("int8_embedding", torch::CppFunction::makeFallthrough());
  registered.back()->impl("int4_linear", TORCH_FN(Int4Route::differentiable<int4_linear>));
  registered.back()->impl("int4_embedding", torch::CppFunction::makeFallthrough());
  registered.back()->impl("attend", TORCH_FN(AttendRoute::differentiable<attend>));
  registered.back()->impl("cached_attention", TORCH_FN(CachedAttentionRoute::differentiable<cached_attention>));
}

// Take them back, and drop what was derived from tensors.
EXPORT void bwla_unregister() {
  if (!registered.empty()) kernels.use_team(nullptr);
  registered.clear();
  forgotten++;
  for (Derived* cache : caches().all()) cache->clear();
}

// Drop what was derived from the tensor with this address of its TensorImpl.
EXPORT void bwla_forget(void* tensor) {
  forgotten++;
  for (Derived* cache : caches().all())
    cache->forget((at::TensorImpl*)tensor);
}

// On how many threads the kernels compute where so many are wanted.
EXPORT long bwla_team(long wanted) {
  std::atomic<long> found{0};
  run_team(wanted, [](void* count) { ++*(std::atomic<long>*)count; }, &found);
  return found;
}

// How many values were derived since the library was loaded.
EXPORT long bwla_derived() {
  long made = 0;
  for (Derived* cache : caches().all()) made += cache->made;
  return made;
}
"""


def emit_operators() -> str:
    """Return the C++20 source of the operators; compiled against torch's headers, free of any instruction set."""
    registration = REGISTRATION.replace("ROUTINES", "\n  ".join(REGISTERED))
    parts = (
        "// bwla operators; generated",
        HEADER,
        ROUTES,
        DERIVED,
        LINEAR,
        ENDS,
        ATTENTION,
        CACHE,
        FUSED,
        ROUTINES,
        registration,
        EXPORTS,
    )
    return "\n".join(part.strip("\n") for part in parts) + "\n"
