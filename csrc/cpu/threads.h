// SPDX-License-Identifier: Apache-2.0
// Memory that threads keep between calls, and how small a piece of work may be.
#pragma once
#include <cstdint>
#include <vector>

namespace lifeops {

constexpr int64_t kGrainBytes = 32768;  // less work than this is not worth a second thread

// Cache-line aligned memory that a thread keeps between calls.
class Scratch {
 public:
  void* get(int64_t bytes) {
    if (bytes > int64_t(storage_.size()) - kAlign) storage_ = std::vector<char>(size_t(bytes + kAlign));
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    return reinterpret_cast<void*>((address + kAlign - 1) / kAlign * kAlign);
  }

 private:
  static constexpr int64_t kAlign = 64;
  std::vector<char> storage_;
};

}  // namespace lifeops
