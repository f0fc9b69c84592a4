"""C++ text of routines: calls of one compiled graph with their weights bound, so that a step passes activations alone.

See runtime/routines.py for what a routine is, and runtime/programs.py for who binds it.
"""

from bwla_compiler.spec import ROUTINE_RESULTS

_NAMES = "\n".join(
    f'template <> struct RoutineName<{n}> {{ static constexpr const char* name = "bwla::routine{n}"; }};'
    for n in ROUTINE_RESULTS
)
REGISTERED = tuple(f'registered.back()->impl("routine{n}", TORCH_FN(RoutineOf<{n}>::run));' for n in ROUTINE_RESULTS)
"""Statements that register the routines on the CPU."""

ROUTINES = (
    r"""
std::atomic<long> forgotten{0};  // grows whenever something derived may be wrong though no tensor shows it

// Numbers of a routine, read in turn.
struct Words {
  const int64_t *at, *end;
  int64_t next() {
    TORCH_CHECK(at < end, "bwla: a routine ends too early");
    return *at++;
  }
};

// A norm or activation function, a transform, and linears, or one of the first two alone; with places of what they
// read.
struct Step {
  Before before;
  Linears linears;
  int64_t columns = 0, heads = 1, x = 0, gate = -1, gain = -1, shift = -1;  // gain and shift where they are values
  int64_t first = -1, gate_first = -1;  // channels of x and gate that it reads; -1 for all
  c10::SmallVector<int64_t, 4> residuals;
  bool fit = false;

  Step(Words& words, double eps, const std::vector<Tensor>& weights) {
    auto weight = [&] {
      const int64_t place = words.next();
      return place < 0 ? Maybe() : Maybe(weights.at(place));
    };
    const std::string_view kind = KINDS.at(words.next());
    const int64_t bits = words.next();
    columns = words.next(), heads = words.next(), first = words.next(), gate_first = words.next();
    std::vector<std::array<Maybe, 8>> parts(words.next());  // signs, scale, pair (3), bias, exponents (2)
    x = words.next(), gate = words.next(), gain = words.next(), shift = words.next();
    std::array<Maybe, 10> one;  // gain, shift, transform (6), column scale, its exponent
    for (Maybe& operand : one) operand = weight();
    for (auto& part : parts) {
      for (Maybe& operand : part) operand = weight();
      residuals.push_back(words.next());
    }
    const Factors f(columns, one[2], one[3], one[4], one[5], one[6], one[7]);
    fit = f.fit && takes_prologue(columns, kind, gate >= 0, one[0], one[1]) &&
          (kind.ends_with("_norm") || (gain < 0 && shift < 0)) && are_columns(one[8], one[9], columns);
    std::vector<Linear> all;
    for (const auto& p : parts) {
      fit = fit && p[0] && p[1];
      if (!fit) return;
      all.push_back(Linear{*p[0], *p[1], p[2], p[3], p[4], p[5], p[6], p[7]});
      fit = all.back().fits(columns);
    }
    if (!fit) return;
    before = Before(kind, eps, one[0], one[1], f);
    linears = Linears(all, one[8], one[9], columns, bits);
  }

  // The channels of a value that it reads, all of them where `from` is negative; none where there are not so many.
  Maybe channels_of(const Tensor& x, int64_t from) const {
    const int64_t n = columns * heads;
    if (!is_input(x) || (from < 0 ? x.size(-1) != n : from + n > x.size(-1))) return {};
    return from < 0 ? x : x.narrow(-1, from, n);
  }

  // Add this step's results to the values; false where they do not fit it.
  bool run(std::vector<Tensor>& values) const {
    const Maybe channels = channels_of(values[this->x], first);
    const Maybe gates = gate < 0 ? Maybe() : channels_of(values[gate], gate_first);
    if (!channels || gates.has_value() != (gate >= 0) || !is_gate(gates, *channels)) return false;
    const Tensor& x = *channels;
    Prologue prologue = before.prologue;
    c10::SmallVector<Tensor, 3> kept;  // the addresses below are valid while these live
    auto take = [&](const Maybe& value, const void*& address_of) {
      if (!value) return;
      kept.push_back(plain(*value));
      address_of = address(kept.back());
    };
    auto at = [&](int64_t place) { return place < 0 ? Maybe() : Maybe(values[place]); };
    for (int64_t place : {gain, shift})
      if (place >= 0 && !is_channels(values[place], columns)) return false;
    take(gates, prologue.gate), take(at(gain), prologue.gain), take(at(shift), prologue.shift);
    if (linears.members.empty()) {
      const Prologue& p = prologue;
      values.push_back(p.kind ? run_prologue(x, p, heads, columns)
                              : run_transform(x, p.scale, p.left, p.right, p.n1, p.n2));
      return true;
    }
    c10::SmallVector<Maybe, 4> added(residuals.size());
    for (size_t i = 0; i < residuals.size(); i++) {
      if (residuals[i] < 0) continue;
      added[i] = values[residuals[i]];
      if (!is_result(added[i], x, linears.members[i].out)) return false;
    }
    for (Tensor& y : linears.run(x, &prologue, added)) values.push_back(std::move(y));
    return true;
  }
};

// RoPE, writing to a cache, and attention to it; with places of what it reads.
struct AttentionStep {
  struct RowsAt {
    int64_t place, first, heads, size;
  };
  double scale;
  std::array<RowsAt, 3> rows;      // query, key, value
  std::array<int64_t, 9> operands;  // the others, in the operator's order

  AttentionStep(Words& words, double scale) : scale(scale) {
    for (RowsAt& r : rows) r = {words.next(), words.next(), words.next(), words.next()};
    for (int64_t& place : operands) place = words.next();
  }

  // Add the result to the values; false where they do not fit.
  bool run(std::vector<Tensor>& values) const {
    auto heads = [&](const RowsAt& r) { return Heads(values[r.place], r.first, r.heads, r.size); };
    const Heads query = heads(rows[0]), key = heads(rows[1]), value = heads(rows[2]);
    std::array<Maybe, 9> o;
    for (size_t i = 0; i < o.size(); i++)
      if (operands[i] >= 0) o[i] = values[operands[i]];
    if (!o[2] || !o[3] || !o[4]) return false;
    const CachedCall call(query, key, value, o[0], o[1], *o[2], *o[3], *o[4], o[5], o[6], o[7], o[8]);
    if (!call.fits()) return false;
    values.push_back(call.run(scale));
    return true;
  }
};

struct Routine {
  int64_t n_inputs;
  std::vector<int64_t> outputs;
  std::vector<std::variant<Step, AttentionStep>> steps;
  std::vector<std::vector<int64_t>> last_reads;  // values that nothing reads after each step
  std::vector<Seen> weights;
  long epoch = forgotten;
  bool fit = true;

  Routine(Words words, const double* numbers, const std::vector<Tensor>& read) {
    for (const Tensor& t : read) weights.emplace_back(t);  // first: an edit while values are derived is one to be seen
    n_inputs = words.next(), outputs.resize(words.next());
    for (int64_t& place : outputs) place = words.next();
    for (int64_t left = words.next(); left > 0 && fit; left--) {
      last_reads.emplace_back(words.next());
      for (int64_t& place : last_reads.back()) place = words.next();
      const bool attends = words.at < words.end && *words.at == -1;
      if (attends) {
        words.next();
        steps.emplace_back(AttentionStep(words, *numbers++));
      } else {
        Step step(words, *numbers++, read);
        fit = step.fit;
        steps.emplace_back(std::move(step));
      }
    }
  }

  bool is_fresh() const {
    constexpr size_t SOON = 8;
    for (size_t i = 0; i < weights.size(); i++) {
      if (i + SOON < weights.size()) weights[i + SOON].fetch();
      if (!weights[i].holds()) return false;
    }
    return epoch == forgotten;
  }

  // The results, none where the inputs do not fit.
  std::vector<Tensor> run(at::TensorList inputs, at::TensorList caches) const {
    std::vector<Tensor> values(inputs.begin(), inputs.end()), results;
    values.insert(values.end(), caches.begin(), caches.end());
    for (size_t i = 0; i < steps.size(); i++) {
      if (!std::visit([&](const auto& step) { return step.run(values); }, steps[i])) return {};
      for (int64_t place : last_reads[i]) values[place].reset();
    }
    for (int64_t place : outputs) results.push_back(values[place]);
    return results;
  }
};

// The routines of one compiled graph that are bound to one set of weights; what Python's `Bound` holds.
struct Bound {
  std::mutex mutex;
  std::unordered_map<std::string, std::shared_ptr<const Routine>> routines;

  std::shared_ptr<const Routine> find(const std::string& text) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = routines.find(text);
    return found == routines.end() ? nullptr : found->second;
  }
};
thread_local Bound* running = nullptr;

template <size_t N>
struct RoutineName;
"""
    + _NAMES
    + r"""

template <size_t... I>
std::tuple<decltype((void)I, Tensor())...> as_tuple(std::vector<Tensor>&& ys, std::index_sequence<I...>) {
  return {std::move(ys[I])...};
}

// A routine of N results: one alone, or a tuple. Where it is not bound, or asks for a gradient, Python's serves.
template <size_t N>
struct RoutineOf {
  using Result = std::conditional_t<N == 1, Tensor,
                                    decltype(as_tuple(std::vector<Tensor>(), std::make_index_sequence<N>()))>;
  using Portable = Route<RoutineName<N>, Result(at::TensorList, at::TensorList, std::string_view)>;

  static Result run(at::TensorList inputs, at::TensorList caches, std::string_view text) {
    const auto routine = running ? running->find(std::string(text)) : nullptr;
    const bool tracked = at::GradMode::is_enabled() &&
                         std::any_of(inputs.begin(), inputs.end(), [](const Tensor& t) { return t.requires_grad(); });
    if (!routine || tracked || !routine->is_fresh() || routine->outputs.size() != N ||
        (int64_t)(inputs.size() + caches.size()) != routine->n_inputs)
      return Portable::portable(inputs, caches, text);
    at::AutoDispatchBelowADInplaceOrView guard;  // views of its own results need no record
    std::vector<Tensor> ys = routine->run(inputs, caches);
    if (ys.size() != N) return Portable::portable(inputs, caches, text);
    if constexpr (N == 1)
      return std::move(ys[0]);
    else
      return as_tuple(std::move(ys), std::make_index_sequence<N>());
  }
};
"""
)

EXPORTS = r"""
// Nothing bound yet, for bwla_enter and bwla_bind; to be given back to bwla_free.
EXPORT void* bwla_bound() { return new Bound; }
EXPORT void bwla_free(void* bound) {
  if (running == bound) running = nullptr;
  delete (Bound*)bound;
}

// Have the calling thread run these routines, and return those that it ran before; null for none.
EXPORT void* bwla_enter(void* bound) { return std::exchange(running, (Bound*)bound); }

// Bind a routine to weights, given by their TensorImpls. Returns whether it can be: all fits, and edits can be seen.
EXPORT long bwla_bind(void* owner, const char* text, const int64_t* words, long n_words, const double* numbers,
                      void* const* weights, long n_weights) {
  at::AutoDispatchBelowAutograd guard;
  std::vector<Tensor> read;
  for (long i = 0; i < n_weights; i++) {
    read.emplace_back(c10::intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>::reclaim_copy(
        (at::TensorImpl*)weights[i]));
    if (!dense_cpu(read.back()) || read.back().is_inference()) return 0;
  }
  try {
    auto routine = std::make_shared<const Routine>(Words{words, words + n_words}, numbers, read);
    if (!routine->fit) return 0;
    auto* bound = (Bound*)owner;
    std::lock_guard<std::mutex> lock(bound->mutex);
    bound->routines[text] = std::move(routine);
    return 1;
  } catch (const std::exception&) {  // the portable implementation meets the same, and says what it is
    return 0;
  }
}
"""
