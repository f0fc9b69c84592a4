
// Serves the entries above to a process of another architecture, over stdin and stdout, until stdin ends.
// All numbers are int64. A request: the entry's name (length, bytes); buffers (count; of each: size, whether it comes
// back, bytes); pointers inside buffers (count; of each: buffer, offset, buffer that it points to); arguments (count;
// of each: whether it is a buffer, its number or value). The answer: the entry's result, then the buffers that come back.
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

using Entry = std::function<long(const std::vector<long>&)>;

template <class R, class... A, std::size_t... I>
static Entry entry(R (*f)(A...), std::index_sequence<I...>) {
  return [f](const std::vector<long>& arguments) -> long {
    if constexpr (std::is_void_v<R>) {
      f((A)arguments.at(I)...);
      return 0;
    } else {
      return f((A)arguments.at(I)...);
    }
  };
}

template <class R, class... A>
static Entry entry(R (*f)(A...)) {
  return entry(f, std::index_sequence_for<A...>{});
}

static void receive(void* to, long size) {
  if (size && std::fread(to, 1, size, stdin) != (std::size_t)size) std::exit(0);
}

static long number() {
  long value;
  receive(&value, sizeof value);
  return value;
}

static void send(const void* from, long size) { std::fwrite(from, 1, size, stdout); }

struct Region {
  std::vector<uint8_t> bytes;
  bool returned;
};

int main() {
  const std::map<std::string, Entry> entries = {
      {"packed_bytes", entry(bwla_packed_bytes)},   {"packed_scales", entry(bwla_packed_scales)},
      {"pack", entry(bwla_pack)},                   {"pack_scale", entry(bwla_pack_scale)},
      {"linear", entry(bwla_linear)},               {"fused_group", entry(bwla_fused_group)},
      {"quantize", entry(bwla_quantize)},           {"accumulate", entry(bwla_accumulate)},
      {"int8_linear", entry(bwla_int8_linear)},     {"transform", entry(bwla_transform)},
      {"int8_embedding", entry(bwla_int8_embedding)}, {"prologue", entry(bwla_prologue)},
      {"packed_pair", entry(bwla_packed_pair)},     {"pack_pair", entry(bwla_pack_pair)},
      {"attend", entry(bwla_attend)},               {"place", entry(bwla_place)},
      {"packed_factor", entry(bwla_packed_factor)}, {"pack_factor", entry(bwla_pack_factor)},
      {"int4_linear", entry(bwla_int4_linear)},     {"int4_embedding", entry(bwla_int4_embedding)}};
  for (;;) {
    std::string name(number(), ' ');
    receive(name.data(), name.size());
    std::vector<Region> regions(number());
    for (Region& region : regions) {
      region.bytes.resize(number());
      region.returned = number();
      receive(region.bytes.data(), region.bytes.size());
    }
    for (long left = number(); left > 0; left--) {
      uint8_t* const from = regions.at(number()).bytes.data();
      const long offset = number();
      const void* const target = regions.at(number()).bytes.data();
      std::memcpy(from + offset, &target, sizeof target);
    }
    std::vector<long> arguments(number());
    for (long& argument : arguments) {
      const bool is_region = number();
      argument = number();
      if (is_region) argument = (long)regions.at(argument).bytes.data();
    }
    const long result = entries.at(name)(arguments);
    send(&result, sizeof result);
    for (const Region& region : regions)
      if (region.returned) send(region.bytes.data(), region.bytes.size());
    std::fflush(stdout);
  }
}
