// qkv-memory — what does a cache cost: bytes per token, per sequence and per batch, of a model and of its relatives?
//
//     qkv-memory --model deepseek-v3 --context 128k
//     qkv-memory --model llama-3-8b --context 8k --batch 16 --dtype int8 --json
//     qkv-memory --model deepseek-v3 --context 32k --fits 16GB
//     qkv-memory --heads 32 --kv-heads 4 --head-dim 128 --layers 40
//     qkv-memory --list
//
// The figures are those of qkv/memory.hpp, which the caches' bytes() are exactly. GB are 10⁹ bytes. Exit code 2: what was
// asked makes no sense, and the message says which rule it breaks.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <nlohmann/json.hpp>
#include <string>

#include "support/cache_costs.hpp"

namespace {

using cache_costs::Form;
using cache_costs::human;
using cache_costs::Index;
using cache_costs::Model;
using qkv::detail::checked_product;

struct Settings {
  std::string model, context = "8k", dtype = "bf16", fits;
  Index batch = 1, layers = 0, heads = 0, kv_heads = 0, head_dim = 0, v_head_dim = 0;
  Index latent_dim = 0, rope_dim = 64, nope_dim = 128;
  bool list = false, json = false, csv = false;
};

/// A question that makes no sense.
struct Refused : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct Row {
  Form form;
  std::string storage;
  Index per_token, per_sequence, total;  // bytes of all layers
  Index tokens_that_fit = 0, sequences_that_fit = 0;
};

Model model_of(const Settings& s) {
  if (!s.model.empty()) {
    if (s.heads > 0 || s.latent_dim > 0)
      throw Refused("give a model or sizes of your own (--heads, --latent-dim), not both");
    if (const Model* model = cache_costs::find_model(s.model)) {
      Model chosen = *model;
      if (s.layers > 0) chosen.layers = s.layers;
      return chosen;
    }
    std::string text = "unknown model " + s.model;
    const auto near = cache_costs::near_names(s.model);
    for (std::size_t i = 0; i < near.size(); ++i)
      text += (i == 0 ? "; did you mean " : i + 1 == near.size() ? " or " : ", ") + std::string(near[i]);
    throw Refused(text + "? --list names all" + (near.empty() ? " that are known" : ""));
  }
  if (s.heads <= 0) throw Refused("give --model NAME (--list names them) or sizes: --heads, --kv-heads, --head-dim");
  const Index layers = s.layers > 0 ? s.layers : 1, head_dim = s.head_dim > 0 ? s.head_dim : 128;
  const Index v_head_dim = s.v_head_dim > 0 ? s.v_head_dim : head_dim;
  if (s.latent_dim > 0) {
    qkv::LatentAttentionConfig config = qkv::deepseek_v3;  // for what the cache does not depend on
    config.heads = s.heads, config.latent_dim = s.latent_dim, config.rope_dim = s.rope_dim,
    config.nope_dim = s.nope_dim;
    config.v_head_dim = s.v_head_dim > 0 ? s.v_head_dim : s.nope_dim;
    return {"own sizes", layers, config};
  }
  const Index kv_heads = s.kv_heads > 0 ? s.kv_heads : s.heads;
  if (s.heads % kv_heads != 0)
    throw Refused("heads must be a multiple of kv_heads; given " + std::to_string(s.heads) + " and " +
                  std::to_string(kv_heads));
  return {"own sizes", layers,
          qkv::MultiHeadAttentionConfig{
              .model_dim = 1, .heads = s.heads, .kv_heads = kv_heads, .head_dim = head_dim, .v_head_dim = v_head_dim}};
}

Index size_of(const std::string& text, bool bytes, const char* option) {
  const auto size = cache_costs::parse_size(text, bytes);
  if (!size)
    throw Refused(
        std::string(option) +
        (bytes ? " needs a size such as 16GB, 512MB or 80GiB" : " needs a number of tokens such as 8192 or 128k") +
        ", at least 1 and less than 2^63; given " + text);
  return *size;
}

nlohmann::json to_json(const Row& row, bool fits) {
  nlohmann::json out{{"form", row.form.name},
                     {"own", row.form.own},
                     {"storage", row.storage},
                     {"numbers_per_token_and_layer", row.form.numbers},
                     {"bytes_per_token_and_layer", row.form.bytes},
                     {"bytes_per_token", row.per_token},
                     {"bytes_per_sequence", row.per_sequence},
                     {"bytes", row.total},
                     {"saved_against_mha", row.form.against_mha},
                     {"saved_against_gqa", row.form.against_gqa}};
  if (fits) out["tokens_that_fit"] = row.tokens_that_fit, out["sequences_that_fit"] = row.sequences_that_fit;
  return out;
}

void print_csv(const std::vector<Row>& rows, bool fits) {
  std::printf(
      "form,own,storage,numbers_per_token_and_layer,bytes_per_token,bytes_per_sequence,bytes,saved_against_mha,"
      "saved_against_gqa%s\n",
      fits ? ",tokens_that_fit,sequences_that_fit" : "");
  for (const Row& row : rows) {
    std::printf("%s,%d,%s,%lld,%lld,%lld,%lld,%.6g,%.6g", row.form.name.c_str(), row.form.own ? 1 : 0,
                row.storage.c_str(), static_cast<long long>(row.form.numbers), static_cast<long long>(row.per_token),
                static_cast<long long>(row.per_sequence), static_cast<long long>(row.total), row.form.against_mha,
                row.form.against_gqa);
    if (fits)
      std::printf(",%lld,%lld", static_cast<long long>(row.tokens_that_fit),
                  static_cast<long long>(row.sequences_that_fit));
    std::printf("\n");
  }
}

void print_table(const Model& model, const std::vector<Row>& rows, Index context, const Settings& s, Index memory) {
  std::printf("%s: %lld layers, context %lld, batch %lld", std::string(model.name).c_str(),
              static_cast<long long>(model.layers), static_cast<long long>(context), static_cast<long long>(s.batch));
  if (!model.note.empty()) std::printf(" (%s)", std::string(model.note).c_str());
  std::printf("\n\n%-11s %-5s %8s %11s %12s %11s %9s %9s", "form", "dtype", "numbers", "a token", "a sequence",
              "the batch", "MHA/this", "GQA/this");
  if (memory > 0) std::printf(" %14s %14s", "fit: tokens", "sequences");
  std::printf("\n");
  for (const Row& row : rows) {
    std::printf("%-11s %-5s %8lld %11s %12s %11s %8.2fx", (row.form.name + (row.form.own ? " <" : "")).c_str(),
                row.storage.c_str(), static_cast<long long>(row.form.numbers), human(row.per_token).c_str(),
                human(row.per_sequence).c_str(), human(row.total).c_str(), row.form.against_mha);
    if (row.form.against_gqa > 0)
      std::printf(" %8.2fx", row.form.against_gqa);
    else
      std::printf(" %9s", "-");
    if (memory > 0)
      std::printf(" %14lld %14lld", static_cast<long long>(row.tokens_that_fit),
                  static_cast<long long>(row.sequences_that_fit));
    std::printf("\n");
  }
  std::printf("\n< what the model does. numbers: one token, one layer; the rest: all layers. GB are 10^9 bytes.\n");
  if (memory > 0) std::printf("fit: in %s, the cache alone.\n", human(memory).c_str());
}

void answer(const Settings& s) {
  if (s.list) {
    for (const Model& model : cache_costs::models)
      std::printf("%-18s %3lld layers  %s\n", std::string(model.name).c_str(), static_cast<long long>(model.layers),
                  std::string(model.note).c_str());
    return;
  }
  const Model model = model_of(s);
  const Index context = size_of(s.context, false, "--context"),
              memory = s.fits.empty() ? 0 : size_of(s.fits, true, "--fits");
  std::vector<Row> rows;
  for (const std::string& storage : cache_costs::storages) {
    if (s.dtype != "all" && s.dtype != storage) continue;
    for (const Form& form : cache_costs::forms(model, storage)) {
      Row row{form, storage, checked_product(form.bytes, model.layers), 0, 0};
      row.per_sequence = checked_product(row.per_token, context);
      row.total = checked_product(row.per_sequence, s.batch);
      row.tokens_that_fit = memory / row.per_token, row.sequences_that_fit = memory / row.per_sequence;
      rows.push_back(row);
    }
  }
  if (s.json) {
    nlohmann::json out{{"model", model.name}, {"layers", model.layers}, {"context", context}, {"batch", s.batch}};
    if (memory > 0) out["memory"] = memory;
    for (const Row& row : rows) out["forms"].push_back(to_json(row, memory > 0));
    std::printf("%s\n", out.dump(2).c_str());
  } else if (s.csv) {
    print_csv(rows, memory > 0);
  } else {
    print_table(model, rows, context, s, memory);
  }
}

}  // namespace

int main(int argc, char** argv) {
  Settings s;
  CLI::App app{"What does a cache cost: bytes per token, per sequence and per batch, of a model and of its relatives"};
  const auto size = [&](const char* name, Index& value, Index least, const char* what) {
    return app.add_option(name, value, what)->check(CLI::Range(least, Index{1} << 40));
  };
  app.add_option("-m,--model", s.model, "A model by name; --list names all");
  app.add_option("-c,--context", s.context, "Tokens of a sequence: 8192, 128k")->capture_default_str();
  size("-b,--batch", s.batch, 1, "Sequences")->capture_default_str();
  std::vector<std::string> dtypes = cache_costs::storages;
  dtypes.emplace_back("all");
  app.add_option("-t,--dtype", s.dtype, "Numbers of the cache")->check(CLI::IsMember(dtypes))->capture_default_str();
  app.add_option("--fits", s.fits, "How many tokens and sequences this memory holds: 16GB, 80GiB");
  size("--layers", s.layers, 1, "Layers (own sizes: 1)");
  size("--heads", s.heads, 1, "Own sizes: query heads");
  size("--kv-heads", s.kv_heads, 1, "Own sizes: key and value heads (default: as many as heads)");
  size("--head-dim", s.head_dim, 1, "Own sizes: features of a head (default 128)");
  size("--v-head-dim", s.v_head_dim, 1, "Own sizes: features of a value head (default: as of a key)");
  size("--latent-dim", s.latent_dim, 1, "Own sizes of MLA: features of the latent");
  size("--rope-dim", s.rope_dim, 1, "Own sizes of MLA: features of the rope key")->capture_default_str();
  size("--nope-dim", s.nope_dim, 1, "Own sizes of MLA: features of a head without position")->capture_default_str();
  app.add_flag("--list", s.list, "Known models");
  auto* json = app.add_flag("--json", s.json, "JSON, exact bytes");
  app.add_flag("--csv", s.csv, "CSV, exact bytes")->excludes(json);
  try {
    app.parse(argc, argv);
    answer(s);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  } catch (const Refused& error) {
    std::fprintf(stderr, "qkv-memory: %s\n", error.what());
    return 2;
  } catch (const std::length_error& error) {
    std::fprintf(stderr, "qkv-memory: that is more bytes than a 64-bit number holds: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "qkv-memory: %s\n", error.what());
    return 2;
  }
}
