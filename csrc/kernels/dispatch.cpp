// Which ISA runs: detected once, overridden by CHARRNN_FAST_ISA or select_isa().
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "rnn.h"

namespace charrnn_fast {

#if defined(__x86_64__)
extern const Isa kAvx512BFloat16, kAvx512, kAvx2;
#elif defined(__aarch64__)
extern const Isa kNeon;
#endif
extern const Isa kBaseline;

namespace {

// Best first.
// clang-format off
const Isa* const kIsas[] = {
#if defined(__x86_64__)
    &kAvx512BFloat16,
    &kAvx512,
    &kAvx2,
#elif defined(__aarch64__)
    &kNeon,
#endif
    &kBaseline,
    nullptr,
};
// clang-format on

const Isa* find(const char* name) {
  for (const Isa* const* entry = kIsas; *entry != nullptr; ++entry) {
    if (std::strcmp((*entry)->name, name) == 0) return *entry;
  }
  return nullptr;
}

std::string supported_names() {
  std::string names;
  for (const Isa* const* entry = kIsas; *entry != nullptr; ++entry) {
    if ((*entry)->supported()) names += std::string(names.empty() ? "" : ", ") + (*entry)->name;
  }
  return names;
}

const Isa* initial() {
  if (const char* name = std::getenv("CHARRNN_FAST_ISA"); name != nullptr && *name != '\0') {
    const Isa* wanted = find(name);
    if (wanted == nullptr || !wanted->supported()) {
      throw std::runtime_error(
          std::string("CHARRNN_FAST_ISA=") + name + " is " +
          (wanted == nullptr ? "not a known ISA" : "not supported by this CPU") +
          "; choose one of: " + supported_names());
    }
    return wanted;
  }
  const Isa* const* entry = kIsas;
  const auto is_best = [](const Isa& isa) {
    return isa.supported() && (isa.pays == nullptr || isa.pays());
  };
  while (!is_best(**entry)) ++entry;  // the baseline always is
  return *entry;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{initial()};
  return isa;
}

}  // namespace

const Isa& isa() { return *current().load(std::memory_order_relaxed); }

const Isa* const* isas() { return kIsas; }

bool select_isa(const char* name) {
  const Isa* wanted = find(name);
  if (wanted == nullptr || !wanted->supported()) return false;
  current().store(wanted, std::memory_order_relaxed);
  return true;
}

}  // namespace charrnn_fast
