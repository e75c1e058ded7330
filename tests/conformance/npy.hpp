// npy.hpp — a tensor of a conformance case, read from NumPy's format 1.0: C order, little-endian.
#pragma once

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <qkv/storage.hpp>

namespace conformance {

using qkv::Index;

/// Raises std::runtime_error with the concatenated parts unless `ok`.
template <class... Parts>
void expect(bool ok, const Parts&... parts) {
  if (!ok) qkv::detail::require<std::runtime_error>(false, parts...);
}

/// "2x3x4", as case.txt writes shapes; "scalar" without dimensions.
inline std::string shape_text(const std::vector<Index>& shape) {
  std::string text;
  for (const Index n : shape) text.append(text.empty() ? "" : "x").append(std::to_string(n));
  return text.empty() ? "scalar" : text;
}

/// Every dtype of the format fits a double exactly (<i8 up to 2^53).
struct Tensor {
  std::vector<Index> shape;
  std::vector<double> values = {};  // C order
  std::string dtype = {};

  Index rank() const { return static_cast<Index>(shape.size()); }
  /// Negative: from the end.
  Index dim(Index i) const {
    const Index axis = i < 0 ? i + rank() : i;
    expect(axis >= 0 && axis < rank(), "a tensor of shape ", shape_text(shape), " has no dimension ", i);
    return shape[static_cast<std::size_t>(axis)];
  }
  /// A position, a length, a token.
  Index integer(Index i) const {
    const double value = (*this)[i];
    expect(std::abs(value) <= 0x1p53 && std::floor(value) == value, value, " is not an integer");
    return static_cast<Index>(value);
  }
  Index size() const { return static_cast<Index>(values.size()); }
  bool is_bool() const { return dtype == "|b1"; }
  double operator[](Index i) const { return values[static_cast<std::size_t>(i)]; }
  double& operator[](Index i) { return values[static_cast<std::size_t>(i)]; }
};

/// All zero.
inline Tensor tensor_of(std::vector<Index> shape) {
  Index size = 1;
  for (const Index n : shape) size = qkv::detail::checked_product(size, n);
  return {std::move(shape), std::vector<double>(static_cast<std::size_t>(size))};
}

namespace npy {

static_assert(std::endian::native == std::endian::little, "the numbers in the files are little-endian");

template <class Stored, class Read>
void decode(std::string_view bytes, std::vector<double>& values, Read&& read) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    Stored stored;
    std::memcpy(&stored, bytes.data() + i * sizeof(Stored), sizeof(Stored));
    values[i] = static_cast<double>(read(stored));
  }
}

inline std::size_t item_size(std::string_view dtype) {
  if (dtype == "|b1") return 1;
  if (dtype == "<f2") return 2;
  if (dtype == "<f4" || dtype == "<i4") return 4;
  if (dtype == "<f8" || dtype == "<i8") return 8;
  expect(false, "dtype ", dtype, " is none of <f2 <f4 <f8 <i4 <i8 |b1");
  return 0;
}

/// What follows `key` in the header, a Python dictionary in one line.
inline std::string_view after(std::string_view header, std::string_view key) {
  const auto at = header.find(key);
  expect(at != header.npos, "the npy header has no ", key);
  header.remove_prefix(at + key.size());
  return header.substr(std::min(header.find_first_not_of(" :"), header.size()));
}

inline std::vector<Index> parse_shape(std::string_view text) {
  const auto end = text.find(')');
  expect(text.starts_with('(') && end != text.npos, "the npy header has no shape in parentheses");
  text = text.substr(1, end - 1);
  std::vector<Index> shape;
  while (!text.empty()) {
    Index n = -1;
    const auto number = std::from_chars(text.data(), text.data() + text.size(), n);
    expect(number.ec == std::errc{} && n >= 0, "the npy header's shape (", text, ") cannot be read");
    shape.push_back(n);
    text.remove_prefix(static_cast<std::size_t>(number.ptr - text.data()));
    const auto next = text.find_first_not_of(", ");
    expect(next != 0, "the npy header's shape (", text, ") cannot be read");
    text.remove_prefix(std::min(next, text.size()));
  }
  return shape;
}

}  // namespace npy

inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  expect(file.is_open() && std::filesystem::is_regular_file(path), "no file ", path.string());
  return {std::istreambuf_iterator<char>(file), {}};
}

inline Tensor read_npy(const std::filesystem::path& path) {
  const std::string file = read_file(path);
  std::string_view rest = file;
  expect(rest.starts_with(std::string_view("\x93NUMPY\x01\x00", 8)) && rest.size() >= 10, "not npy 1.0");
  const auto header_size = static_cast<std::size_t>(static_cast<unsigned char>(rest[8])) +
                           256 * static_cast<std::size_t>(static_cast<unsigned char>(rest[9]));
  rest.remove_prefix(10);
  expect(rest.size() >= header_size, "truncated in the npy header");
  const std::string_view header = rest.substr(0, header_size), bytes = rest.substr(header_size);

  std::string_view dtype = npy::after(header, "'descr'");
  expect(dtype.starts_with('\'') && dtype.find('\'', 1) != dtype.npos, "the npy header's descr cannot be read");
  dtype = dtype.substr(1, dtype.find('\'', 1) - 1);
  expect(npy::after(header, "'fortran_order'").starts_with("False"), "not in C order");
  const std::size_t item = npy::item_size(dtype);

  // The size is checked before memory is taken: a wrong header must not ask for terabytes.
  std::vector<Index> shape = npy::parse_shape(npy::after(header, "'shape'"));
  Index size = 1;
  for (const Index n : shape) size = qkv::detail::checked_product(size, n);
  expect(bytes.size() % item == 0 && bytes.size() / item == static_cast<std::size_t>(size), bytes.size(),
         " bytes of data, but shape ", shape_text(shape), " of ", dtype, " needs ", size, " items of ", item);
  Tensor tensor = tensor_of(std::move(shape));
  tensor.dtype = dtype;

  const auto itself = [](auto x) { return x; };
  if (dtype == "<f4") npy::decode<float>(bytes, tensor.values, itself);
  if (dtype == "<f8") npy::decode<double>(bytes, tensor.values, itself);
  if (dtype == "<i4") npy::decode<std::int32_t>(bytes, tensor.values, itself);
  if (dtype == "<i8") npy::decode<std::int64_t>(bytes, tensor.values, itself);
  if (dtype == "|b1") npy::decode<unsigned char>(bytes, tensor.values, [](unsigned char x) { return x != 0; });
  if (dtype == "<f2")
    npy::decode<std::uint16_t>(bytes, tensor.values, [](std::uint16_t x) {
      return static_cast<float>(Eigen::numext::bit_cast<qkv::half>(x));
    });
  return tensor;
}

}  // namespace conformance
