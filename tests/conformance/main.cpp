// main.cpp — qkv_conformance DIR...: runs every case below the folders and compares with what third-party code computed.
//
// One line per case, `ok` or `FAIL`, with the worst error as a fraction of what is tolerated: in float against the
// expected outputs and, where there are exact ones, in double against those. Exit status 1 if a case fails, 2 if there
// is nothing to run.
#include <cstdio>
#include <set>

#include "compare.hpp"
#include "operators.hpp"

using namespace conformance;
namespace fs = std::filesystem;

namespace {

struct Operator {
  const char* name;
  Results (*in_float)(const Case&);
  Results (*in_double)(const Case&);
};

constexpr Operator operators[] = {
    {"Attention", onnx_attention<float>, onnx_attention<double>},
    {"FlexAttention", flex_attention<float>, flex_attention<double>},
    {"RotaryEmbedding", rotary_embedding<float>, rotary_embedding<double>},
    {"TensorScatter", tensor_scatter<float>, tensor_scatter<double>},
    {"DeepSeekMLA", deepseek_mla<float>, deepseek_mla<double>},
    {"TorchMHA", torch_mha<float>, torch_mha<double>},
    {"GPT2Attention", gpt2_attention<float>, gpt2_attention<double>},
    {"LlamaAttention", llama_attention<float>, llama_attention<double>},
    {"Llama2cModel", llama2c_model<float>, llama2c_model<double>},
};

// Against exact outputs, computed by others in double.
constexpr double exact_rtol = 1e-9, exact_atol = 1e-10;

enum class Outcome { passed, failed, skipped };

void print(const char* outcome, const std::string& name, const std::string& rest) {
  std::printf("%-4s  %-64s  %s\n", outcome, name.c_str(), rest.c_str());
  std::fflush(stdout);
}

std::string fraction(const char* scalar, double worst) {
  char text[64];
  std::snprintf(text, sizeof text, "%s %.3g", scalar, worst);
  return text;
}

Outcome run(const fs::path& folder, const std::string& name, qkv::Kernel kernel) try {
  Case c(folder);
  c.kernel = kernel;
  const Operator* op = nullptr;
  for (const Operator& candidate : operators)
    if (candidate.name == c.key("op")) op = &candidate;
  if (!op) {
    print("skip", name, "unknown operator " + c.key("op"));
    return Outcome::skipped;
  }
  expect(!c.out.empty(), "the case expects no output");

  const bool is_double =
      std::any_of(c.inputs().begin(), c.inputs().end(), [](const auto& input) { return input.second.dtype == "<f8"; });
  Verdict verdict = compare("out.", is_double ? op->in_double(c) : op->in_float(c), c.out, c.rtol, c.atol);
  std::string errors = fraction(is_double ? "f64" : "f32", verdict.worst);
  if (!c.exact.empty()) {
    const Verdict exact = compare("exact.", op->in_double(c), c.exact, exact_rtol, exact_atol);
    errors += "  " + fraction("exact", exact.worst);
    verdict.include(exact);
  }
  if (!verdict.failure.empty()) {
    print("FAIL", name, errors + "  " + verdict.failure);
    return Outcome::failed;
  }
  print("ok", name, errors);
  return Outcome::passed;
} catch (const std::exception& error) {
  print("FAIL", name, error.what());
  return Outcome::failed;
}

int usage() {
  std::fprintf(stderr,
               "usage: qkv_conformance [--kernel automatic|reference|tiled|decode] DIR...\n"
               "Runs every conformance case (a folder with a case.txt) below the folders.\n");
  return 2;
}

}  // namespace

int main(int argc, char** argv) try {
  std::vector<fs::path> roots;
  qkv::Kernel kernel = qkv::Kernel::automatic;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--kernel" && i + 1 < argc) {
      const std::string wanted = argv[++i];
      bool known = false;
      for (const auto k : {qkv::Kernel::automatic, qkv::Kernel::reference, qkv::Kernel::tiled, qkv::Kernel::decode})
        if (wanted == qkv::name(k)) kernel = k, known = true;
      if (!known) return usage();
    } else if (argument.starts_with('-')) {
      return usage();
    } else if (!fs::is_directory(argument)) {
      std::fprintf(stderr, "qkv_conformance: %s is not a folder\n", argument.c_str());
      return 2;
    } else {
      roots.emplace_back(argument);
    }
  }
  if (roots.empty()) return usage();

  std::set<fs::path> seen;  // a case that two roots share runs once
  int counts[3] = {};
  for (const fs::path& root : roots) {
    std::set<fs::path> folders;
    if (fs::exists(root / "case.txt")) folders.insert(root);
    for (const auto& entry : fs::recursive_directory_iterator(root))
      if (entry.path().filename() == "case.txt") folders.insert(entry.path().parent_path());
    for (const fs::path& folder : folders) {
      if (!seen.insert(fs::weakly_canonical(folder)).second) continue;
      const fs::path name = folder.lexically_relative(root);
      ++counts[static_cast<int>(run(folder, name == "." ? fs::canonical(folder).filename() : name, kernel))];
    }
  }
  if (seen.empty()) {
    std::fprintf(stderr, "qkv_conformance: no case.txt below the given folders\n");
    return 2;
  }
  std::printf("%d passed, %d failed, %d skipped\n", counts[0], counts[1], counts[2]);
  return counts[1] > 0 ? 1 : 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "qkv_conformance: %s\n", error.what());
  return 2;
}
