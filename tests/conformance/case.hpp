// case.hpp — one conformance case: a folder with a case.txt of `key=value` lines and the tensors that it names.
//
//     op=Attention                          which function runs it (operators.hpp)
//     rtol=2e-05, atol=2e-06                |got - expected| <= atol + rtol·|expected|
//     attr.is_causal=1                      integers, numbers, words
//     in.Q=<f4 2x3x4x8 in.Q.npy             inputs and weights
//     out.Y=…                               what the third party's program computed, in its own precision
//     exact.Y=…                             the same in double, where there is such a run
#pragma once

#include <cmath>
#include <cstdlib>
#include <map>

#include <qkv/options.hpp>

#include "npy.hpp"

namespace conformance {

using Tensors = std::map<std::string, Tensor>;

/// What a run has computed, by the names of case.txt; a name may have several results, and all of them must be right.
using Results = std::multimap<std::string, Tensor>;

inline double parse_number(const std::string& key, const std::string& text) {
  char* end = nullptr;
  const double number = std::strtod(text.c_str(), &end);
  expect(!text.empty() && *end == '\0' && std::isfinite(number), key, "=", text, " is not a finite number");
  return number;
}

class Case {
 public:
  explicit Case(const std::filesystem::path& folder) : folder_(folder) {
    const std::string text = read_file(folder / "case.txt");
    for (std::string_view rest = text; !rest.empty();) {
      const std::string_view line = rest.substr(0, rest.find('\n'));
      rest.remove_prefix(std::min(line.size() + 1, rest.size()));
      if (!line.empty()) read_line(line);
    }
    expect(key("format") == "1", "format=", key("format"), " is not 1");
    rtol = parse_number("rtol", key("rtol"));
    atol = parse_number("atol", key("atol"));
    expect(rtol >= 0 && atol >= 0, "rtol and atol must be >= 0");
  }

  /// Any `key=value` that is neither an attribute nor a tensor.
  const std::string& key(const std::string& name) const { return find(keys_, name, name); }
  bool has_key(const std::string& name) const { return keys_.contains(name); }
  std::filesystem::path file(const std::string& name) const { return folder_ / key("file." + name); }

  bool has(const std::string& attribute) const { return attributes_.contains(attribute); }
  const std::string& word(const std::string& attribute) const {
    return find(attributes_, attribute, "attr." + attribute);
  }
  std::string word(const std::string& attribute, const std::string& absent) const {
    return has(attribute) ? word(attribute) : absent;
  }
  double number(const std::string& attribute) const { return parse_number("attr." + attribute, word(attribute)); }
  double number(const std::string& attribute, double absent) const {
    return has(attribute) ? number(attribute) : absent;
  }
  Index integer(const std::string& attribute) const {
    const std::string& text = word(attribute);
    Index n = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
    expect(error == std::errc{} && end == text.data() + text.size(), "attr.", attribute, "=", text,
           " is not an integer");
    return n;
  }
  Index integer(const std::string& attribute, Index absent) const {
    return has(attribute) ? integer(attribute) : absent;
  }

  const Tensor& in(const std::string& name) const { return find(inputs_, name, "in." + name); }
  const Tensor* find_in(const std::string& name) const {
    const auto it = inputs_.find(name);
    return it == inputs_.end() ? nullptr : &it->second;
  }
  const Tensors& inputs() const { return inputs_; }
  bool asks(const std::string& name) const { return out.contains(name) || exact.contains(name); }

  double rtol = 0, atol = 0;
  Tensors out, exact;
  qkv::Kernel kernel = qkv::Kernel::automatic;  // of attention(); not part of the file

 private:
  template <class Value>
  static const Value& find(const std::map<std::string, Value>& map, const std::string& name, const std::string& what) {
    const auto it = map.find(name);
    expect(it != map.end(), "no ", what, " in case.txt");
    return it->second;
  }

  void read_line(std::string_view line) {
    const auto equals = line.find('=');
    expect(equals != line.npos, "case.txt: no `=` in the line `", line, "`");
    const std::string key(line.substr(0, equals)), value(line.substr(equals + 1));
    const auto dot = key.find('.');
    const std::string group = key.substr(0, dot), name = dot == key.npos ? "" : key.substr(dot + 1);
    bool is_new = false;
    if (group == "attr")
      is_new = attributes_.emplace(name, value).second;
    else if (Tensors* tensors = group == "in" ? &inputs_ : group == "out" ? &out : group == "exact" ? &exact : nullptr)
      is_new = tensors->emplace(name, read_tensor(key, value)).second;
    else
      is_new = keys_.emplace(key, value).second;
    expect(is_new, "case.txt names ", key, " twice");
  }

  /// value: dtype, shape, file.
  Tensor read_tensor(const std::string& key, const std::string& value) const {
    const auto first = value.find(' '), second = value.find(' ', first + 1);
    expect(first != value.npos && second != value.npos, key, "=", value, " is not `dtype shape file`");
    const std::string dtype = value.substr(0, first), shape = value.substr(first + 1, second - first - 1);
    try {
      Tensor tensor = read_npy(folder_ / value.substr(second + 1));
      expect(tensor.dtype == dtype && shape_text(tensor.shape) == shape, "the file holds ", tensor.dtype, " ",
             shape_text(tensor.shape), ", case.txt says ", dtype, " ", shape);
      return tensor;
    } catch (const std::exception& error) {
      throw std::runtime_error(key + ": " + error.what());
    }
  }

  std::filesystem::path folder_;
  std::map<std::string, std::string> keys_, attributes_;
  Tensors inputs_;
};

}  // namespace conformance
