// support/kept.hpp — what a row needs, made once. Google Benchmark calls a row's function again and again, with more
// iterations each time, until it has run for long enough; to fill a large cache anew takes longer than what is measured.
#pragma once

#include <memory>
#include <string>
#include <utility>

namespace support {

struct Kept {
  std::string row;
  std::shared_ptr<void> thing;
};
inline Kept& the_kept_one() {
  static Kept kept;
  return kept;
}

/// The T that was made for `row`; of the row before, nothing is kept.
template <class T, class... Args>
T& kept(const std::string& row, Args&&... args) {
  Kept& one = the_kept_one();
  if (one.row != row || !one.thing) {
    one = {};
    one = {row, std::make_shared<T>(std::forward<Args>(args)...)};
  }
  return *static_cast<T*>(one.thing.get());
}

}  // namespace support
