// base/require.hpp — require(condition, parts of a message …): errors state the rule and the numbers given, before the first write.
//
// Before: simd/isa/neon.hpp   Next: base/overlap.hpp
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "../version.hpp"

namespace qkv { inline namespace QKV_ABI {

/// Called instead of a throw when the program is compiled without exceptions, and for an error in a destructor, where none
/// can be thrown. It must not return.
using ErrorHandler = void (*)(const char* message);

namespace detail {

[[noreturn]] inline void print_and_abort(const char* message) {
  std::fprintf(stderr, "qkv: %s\n", message);
  std::abort();
}

inline std::atomic<ErrorHandler>& error_handler() {
  static std::atomic<ErrorHandler> handler{print_and_abort};
  return handler;
}

/// For an error where nothing can be thrown.
[[noreturn]] inline void give_up(const std::string& message) {
  error_handler().load()(message.c_str());
  print_and_abort("the error handler returned");
}

template <class Error>
[[noreturn]] void raise(const std::string& message) {
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
  throw Error(message);
#else
  give_up(message);
#endif
}

/// Prints as "[rows, cols]" in error messages; costs nothing where there is no error.
struct Shape {
  std::ptrdiff_t rows, cols;
};

/// A part of a message: text, a number or a shape. One type for all, so that a check is compiled without what prints it.
class MessagePart {
 public:
  MessagePart(std::string_view text) : kind_(Kind::text), text_(text) {}
  MessagePart(const char* text) : MessagePart(std::string_view(text)) {}
  MessagePart(const std::string& text) : MessagePart(std::string_view(text)) {}
  MessagePart(Shape shape) : kind_(Kind::shape), shape_(shape) {}
  template <class Number>
  requires std::is_arithmetic_v<Number> MessagePart(Number number) {
    if constexpr (std::is_floating_point_v<Number>)
      kind_ = Kind::real, real_ = static_cast<double>(number);
    else if constexpr (std::is_signed_v<Number>)
      kind_ = Kind::integer, integer_ = number;
    else
      kind_ = Kind::natural, natural_ = number;
  }
  void append_to(std::string& message) const {
    if (kind_ == Kind::text) {
      message += text_;
      return;
    }
    char digits[64] = "";
    if (kind_ == Kind::integer) std::snprintf(digits, sizeof digits, "%lld", integer_);
    if (kind_ == Kind::natural) std::snprintf(digits, sizeof digits, "%llu", natural_);
    if (kind_ == Kind::real)
      std::snprintf(digits, sizeof digits, "%.9g", real_);  // "-1e-09", where to_string says -0.000000
    if (kind_ == Kind::shape) std::snprintf(digits, sizeof digits, "[%td, %td]", shape_.rows, shape_.cols);
    message += digits;
  }

 private:
  enum class Kind { text, integer, natural, real, shape } kind_;
  union {
    std::string_view text_;
    long long integer_;
    unsigned long long natural_;
    double real_;
    Shape shape_;
  };
};

inline std::string message_of(std::initializer_list<MessagePart> parts) {
  std::string message;
  for (const MessagePart& part : parts) part.append_to(message);
  return message;
}

template <class Error>
[[noreturn, gnu::cold, gnu::noinline]] void raise_parts(std::initializer_list<MessagePart> parts) {
  raise<Error>(message_of(parts));
}

/// Raises Error with the concatenated parts unless `ok`.
template <class Error = std::invalid_argument, class... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]]
    raise_parts<Error>({MessagePart(parts)...});
}

[[noreturn]] inline std::ptrdiff_t refuse_size(std::ptrdiff_t a, const char* sign, std::ptrdiff_t b) {
  require(a >= 0 && b >= 0, "a size must be >= 0; given ", a, " and ", b);
  raise_parts<std::length_error>({"the size ", a, sign, b, " does not fit an Index"});
}

/// a*b and a+b for sizes, in constant expressions too; raise where an operand is negative or the result does not fit.
constexpr std::ptrdiff_t checked_product(std::ptrdiff_t a, std::ptrdiff_t b) {
  const bool fits = a >= 0 && b >= 0 && (b == 0 || a <= std::numeric_limits<std::ptrdiff_t>::max() / b);
  return fits ? a * b : refuse_size(a, " * ", b);
}
constexpr std::ptrdiff_t checked_sum(std::ptrdiff_t a, std::ptrdiff_t b) {
  const bool fits = a >= 0 && b >= 0 && a <= std::numeric_limits<std::ptrdiff_t>::max() - b;
  return fits ? a + b : refuse_size(a, " + ", b);
}

}  // namespace detail

/// Installs the handler used under -fno-exceptions and in destructors, on any thread, and returns the previous one. The
/// default, which null stands for, prints and aborts.
inline ErrorHandler set_error_handler(ErrorHandler handler) {
  return detail::error_handler().exchange(handler ? handler : detail::print_and_abort);
}

}}  // namespace qkv::QKV_ABI
