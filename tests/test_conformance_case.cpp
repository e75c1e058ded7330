#include <fstream>
#include <random>

#include "conformance/compare.hpp"
#include "support/catch.hpp"

using namespace conformance;
namespace fs = std::filesystem;

namespace {

/// A folder of its own that disappears with it.
struct Folder {
  fs::path path = fs::temp_directory_path() / ("qkv_case_" + std::to_string(std::random_device()()));

  Folder() { fs::create_directories(path); }
  ~Folder() { fs::remove_all(path); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  void write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path / name, std::ios::binary) << bytes;
  }
};

std::string npy_file(const std::string& dtype, const std::string& shape, const std::string& data) {
  const std::string header = "{'descr': '" + dtype + "', 'fortran_order': False, 'shape': (" + shape + "), }\n";
  std::string file("\x93NUMPY\x01\x00", 8);
  file += static_cast<char>(header.size());
  return file + '\0' + header + data;
}

template <class T>
std::string bytes(std::initializer_list<T> values) {
  return {reinterpret_cast<const char*>(values.begin()), values.size() * sizeof(T)};
}

const std::string head = "format=1\nop=Attention\nrtol=1e-3\natol=0.5\n";

std::string reason_of(const Folder& folder) {
  try {
    Case c(folder.path);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

Tensor vector_of(std::vector<double> values) { return {{static_cast<Index>(values.size())}, std::move(values)}; }

}  // namespace

TEST_CASE("a case gives its attributes and its tensors of every dtype") {
  const Folder folder;
  folder.write("h.npy", npy_file("<f2", "3,", bytes<std::uint16_t>({0x3C00, 0x8001, 0xFC00})));
  folder.write("f.npy", npy_file("<f4", "2, 1", bytes<float>({1.5F, -2.0F})));
  folder.write("d.npy", npy_file("<f8", "1,", bytes<double>({0.1})));
  folder.write("i.npy", npy_file("<i4", "1,", bytes<std::int32_t>({-7})));
  folder.write("l.npy", npy_file("<i8", "1,", bytes<std::int64_t>({std::int64_t{1} << 40})));
  folder.write("b.npy", npy_file("|b1", "2,", bytes<unsigned char>({1, 0})));
  folder.write("case.txt", head +
                               "attr.n=-3\nattr.x=2.5\nin.step0.x=<f2 3 h.npy\nin.f=<f4 2x1 f.npy\nin.d=<f8 1 d.npy\n" +
                               "in.i=<i4 1 i.npy\nin.l=<i8 1 l.npy\nout.b=|b1 2 b.npy\nprompt=a=b\n");
  const Case c(folder.path);
  CHECK(c.rtol == 1e-3);
  CHECK(c.atol == 0.5);
  CHECK(c.key("prompt") == "a=b");
  CHECK(c.integer("n") == -3);
  CHECK(c.integer("absent", 4) == 4);
  CHECK(c.number("x") == 2.5);
  CHECK_THROWS(c.integer("x"));
  CHECK_THROWS(c.integer("absent"));
  CHECK(c.in("step0.x").values == std::vector<double>{1, -std::ldexp(1.0, -24), -INFINITY});
  CHECK(c.in("f").shape == std::vector<Index>{2, 1});
  CHECK(c.in("f").values == std::vector<double>{1.5, -2});
  CHECK(c.in("d")[0] == 0.1);
  CHECK(c.in("i").integer(0) == -7);
  CHECK(c.in("l").integer(0) == Index{1} << 40);
  CHECK(c.out.at("b").is_bool());
  CHECK(c.out.at("b").values == std::vector<double>{1, 0});
  CHECK(c.asks("b"));
  CHECK_FALSE(c.asks("f"));
  CHECK_THROWS(c.in("b"));
  CHECK_THROWS(c.in("f").dim(2));
}

TEST_CASE("a malformed case is refused with its reason") {
  const Folder folder;
  const std::string good = npy_file("<f4", "2, 1", bytes<float>({1, 2}));
  const auto reason = [&](const std::string& lines) {
    folder.write("case.txt", head + lines);
    return reason_of(folder);
  };
  const auto reason_of_file = [&](const std::string& bytes) {
    folder.write("f.npy", bytes);
    return reason("in.f=<f4 2x1 f.npy\n");
  };
  const auto has = [](const std::string& text, const std::string& part) { return text.find(part) != text.npos; };

  CHECK(reason_of_file(good).empty());
  CHECK(has(reason("junk\n"), "no `=` in the line `junk`"));
  CHECK(has(reason("attr.n=1\nattr.n=2\n"), "attr.n twice"));
  CHECK(has(reason("in.g=<f4 2x1 g.npy\n"), "in.g: no file"));
  CHECK(has(reason("in.f=<f4 2x1\n"), "is not `dtype shape file`"));
  CHECK(has(reason("in.f=<f4 1x2 f.npy\n"), "the file holds <f4 2x1, case.txt says <f4 1x2"));
  CHECK(has(reason("in.f=<f8 2x1 f.npy\n"), "case.txt says <f8"));
  for (std::size_t size = 0; size < good.size(); ++size) CHECK(!reason_of_file(good.substr(0, size)).empty());
  CHECK(has(reason_of_file(good + "x"), "9 bytes of data"));
  CHECK(has(reason_of_file(npy_file(">f4", "2, 1", bytes<float>({1, 2}))), "dtype >f4"));
  CHECK(has(reason_of_file(npy_file("<f4", "2, -1", "")), "cannot be read"));
  CHECK(has(reason_of_file(npy_file("<f4", "4611686018427387904, 4", "")), "does not fit"));
  CHECK(has(reason_of_file(npy_file("<f4", "99999999999999999999", "")), "cannot be read"));

  folder.write("case.txt", "format=2\n");
  CHECK(has(reason_of(folder), "format=2 is not 1"));
  folder.write("case.txt", "format=1\nrtol=tight\natol=0\n");
  CHECK(has(reason_of(folder), "rtol=tight is not a finite number"));
  fs::remove(folder.path / "case.txt");
  CHECK(has(reason_of(folder), "no file"));
}

TEST_CASE("NaN, a wrong infinity and a wrong shape fail, whatever the tolerance") {
  const double nan = NAN, inf = INFINITY;
  const auto fails = [](std::vector<double> got, std::vector<double> expected) {
    return !compare("y", vector_of(std::move(got)), vector_of(std::move(expected)), 1e30, 1e30).failure.empty();
  };
  CHECK_FALSE(fails({1, -inf}, {2, -inf}));
  CHECK(fails({nan}, {1}));
  CHECK(fails({1}, {nan}));
  CHECK(fails({nan}, {nan}));
  CHECK(fails({inf}, {-inf}));
  CHECK(fails({inf}, {1}));
  CHECK(fails({1}, {inf}));
  CHECK(fails({1}, {1, 1}));
}

TEST_CASE("an error is a fraction of atol + rtol·|expected|") {
  const Verdict near = compare("y", vector_of({1, 10.25}), vector_of({1, 10}), 0.1, 0.25);
  CHECK(near.failure.empty());
  CHECK(near.worst == 0.2);
  const Verdict far = compare("y", vector_of({0, 10}), vector_of({1, 10}), 0.125, 0.125);
  CHECK(far.worst == 4);
  CHECK(far.failure == "y element 0 is 0, expected 1");
  CHECK(compare("y", vector_of({3}), vector_of({3}), 0, 0).failure.empty());
}

TEST_CASE("every expected output must be there, and every result of its name must be right") {
  const Tensors expected{{"y", vector_of({1})}};
  const auto failure = [&](const Results& results) { return compare("out.", results, expected, 0, 1e-6).failure; };
  CHECK(failure({{"y", vector_of({1})}, {"z", vector_of({5})}}).empty());
  CHECK(failure({{"z", vector_of({1})}}) == "out.y is not an output of this operator");
  CHECK(failure({{"y", vector_of({1})}, {"y", vector_of({2})}}) == "out.y element 0 is 2, expected 1");
}
