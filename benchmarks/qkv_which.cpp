// qkv-which — which cache, of which storage and form, for these sizes, this memory and this machine? scripts/which runs it.
//
//     scripts/which --model llama-3-8b --context 32k --sequences 4 --memory 16GB
//     scripts/which --heads 32 --head-dim 128 --layers 32 --context 8k --memory 4GB       the variant is free
//
// With --model the variant is what the model was trained with; storage and form are to be chosen. Without, the variants
// are tried in the order of what they can express (MHA, MLA, GQA, MQA; DeepSeek-V2, arXiv:2405.04434, tables 8 and 9 for
// MLA's place). For every candidate that fits, one token is decoded on a full cache of one layer, each call after a read
// that empties the processor's caches; errors are against the same rows in f32. Chosen is the first variant that fits with
// some storage, and its fastest storage whose rms error is allowed; what is less than 5 % faster counts as equal, and of
// equals the more exact one is taken.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <qkv/qkv.hpp>
#include <string>

#include "support/cache_costs.hpp"
#include "support/machine.hpp"
#include "support/threads.hpp"

namespace {

using cache_costs::human;
using cache_costs::Index;
using qkv::Matrix;

struct Settings {
  std::string model, context, memory, snippet;
  Index sequences = 1, layers = 32, heads = 0, head_dim = 128, latent_dim = 512, rope_dim = 64, window = 0, threads = 1;
  double max_error = 0.03;  // on random rows int8 is off by 1 to 2e-2, bf16 by 2 to 4e-3, f16 by 3e-4
  bool json = false, paged = false;
};

struct Refused : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// One line of the table. `rows` are those of a sequence's cache: the context, or a window.
struct Candidate {
  std::string variant, storage, cache;
  Index heads, kv_heads, head_dim, v_head_dim, latent_dim, rope_dim;
  Index rows, layer_bytes, total;  // bytes of a token in one layer; of all layers and sequences
  bool fits = false;
  double milliseconds = 0, error = 0;  // of one token in one layer of one sequence
  bool measured = false;
};

/// Median of seven calls, each after a read of 64 MB.
double milliseconds_of(const std::function<void()>& call, Index threads) {
  call();
  std::vector<double> times;
  for (int i = 0; i < 7; ++i) {
    machine::read_bandwidth(Index{64} << 20, threads);
    const double start = machine::seconds();
    call();
    times.push_back(machine::seconds() - start);
  }
  return 1e3 * machine::median(times);
}

/// Random rows, over and over, until the cache is full.
template <class Cache>
void fill(Cache& cache, Index n, Index width, Index other_width) {
  const Matrix<float> first = machine::normal(std::min<Index>(n, 509), width, 1),
                      second = machine::normal(first.rows(), other_width, 2);
  while (cache.position() < n) {
    const Index rows = std::min({first.rows(), n - cache.position(), cache.max_append()});
    cache.append(first.topRows(rows), second.topRows(rows));
  }
}

/// Decodes one token on n rows and says how long it took; the output goes to `out`.
template <class S>
double decode(const Candidate& c, Index n, Index threads, Matrix<float>& out) {
  const support::SleepingThreads executor(threads);
  qkv::Workspace workspace;
  if (c.latent_dim > 0) {
    qkv::LatentCache<S> cache({.latent_dim = c.latent_dim, .rope_dim = c.rope_dim, .capacity = n});
    fill(cache, n, c.latent_dim, c.rope_dim);
    const Matrix<float> q = machine::normal(1, c.heads * (c.latent_dim + c.rope_dim), 3);
    out.resize(1, c.heads * c.latent_dim);
    const qkv::Options<float> options{.scale = 1 / std::sqrt(static_cast<double>(c.head_dim + c.rope_dim)),
                                      .workspace = &workspace};
    return milliseconds_of(
        [&] { qkv::absorbed_attention_into(out, q, cache, c.heads, qkv::causal, options, executor); }, threads);
  }
  const Matrix<float> q = machine::normal(1, c.heads * c.head_dim, 3);
  out.resize(1, c.heads * c.v_head_dim);
  qkv::Options<float> options;
  options.workspace = &workspace;
  const auto timed = [&](const auto& cache) {
    return milliseconds_of(
        [&] {
          qkv::attention_into(out, q, cache, {c.heads, c.kv_heads}, qkv::causal, qkv::plain, options, executor);
        },
        threads);
  };
  if (c.cache == "paged") {
    qkv::PagePool<S> pool({.kv_heads = c.kv_heads,
                           .head_dim = c.head_dim,
                           .v_head_dim = c.v_head_dim,
                           .page_tokens = 64,
                           .pages = (n + 63) / 64});
    qkv::PagedCache<S> cache(pool);
    fill(cache, n, c.kv_heads * c.head_dim, c.kv_heads * c.v_head_dim);
    return timed(cache);
  }
  qkv::KvCache<S> cache({.kv_heads = c.kv_heads, .head_dim = c.head_dim, .v_head_dim = c.v_head_dim, .capacity = n});
  fill(cache, n, c.kv_heads * c.head_dim, c.kv_heads * c.v_head_dim);
  return timed(cache);
}

/// MLA: one prompt of n tokens in each form, milliseconds of one layer (without the projections both have).
std::pair<double, double> prompt_forms(const Candidate& c, Index n, Index threads) {
  const support::SleepingThreads executor(threads);
  qkv::LatentAttentionConfig config = qkv::deepseek_v3;
  config.model_dim = 64, config.q_latent_dim = 0, config.heads = c.heads, config.latent_dim = c.latent_dim;
  config.rope_dim = c.rope_dim, config.nope_dim = c.head_dim, config.v_head_dim = c.v_head_dim;
  const qkv::LatentAttention<float> layer(config, qkv::LatentAttentionWeights<float>::random(config));
  auto cache = layer.make_cache(n);
  const Matrix<float> x = machine::normal(n, config.model_dim, 4);
  Matrix<float> out(n, config.model_dim);
  const auto time = [&](qkv::LatentForm form) {
    std::vector<double> times;
    for (int i = 0; i < 3; ++i) {
      cache.truncate(0);
      const double start = machine::seconds();
      layer.forward_into(out, x, cache, qkv::causal, qkv::plain, {.form = form}, executor);
      times.push_back(machine::seconds() - start);
    }
    return 1e3 * machine::median(times);
  };
  return {time(qkv::LatentForm::naive), time(qkv::LatentForm::absorbed)};
}

std::string cpp_storage(const std::string& storage) {
  return storage == "f32"    ? "float"
         : storage == "f16"  ? "half"
         : storage == "bf16" ? "bfloat16"
         : storage == "int8" ? "std::int8_t"
                             : storage;
}

/// A whole program that makes the layer and the cache and decodes a token.
std::string program(const Candidate& c, const Settings& s, Index context) {
  const auto n = [](Index value) { return std::to_string(value); };
  const std::string storage = cpp_storage(c.storage);
  std::string text = "#include <qkv/qkv.hpp>\n\nint main() {\n  using namespace qkv;\n";
  if (c.latent_dim > 0)
    text += "  const LatentAttentionConfig config{.model_dim = " + n(c.heads * c.head_dim) +
            ", .heads = " + n(c.heads) + ", .latent_dim = " + n(c.latent_dim) + ", .nope_dim = " + n(c.head_dim) +
            ", .rope_dim = " + n(c.rope_dim) +
            ",\n                                     .v_head_dim = " + n(c.v_head_dim) +
            ", .rope = {.pairing = Pairing::interleaved}};\n"
            "  const LatentAttention<float> layer(config, LatentAttentionWeights<float>::random(config));  // yours: "
            "checkpoint.hpp\n";
  else
    text += "  const MultiHeadAttentionConfig config{.model_dim = " + n(c.heads * c.head_dim) +
            ", .heads = " + n(c.heads) + ", .kv_heads = " + n(c.kv_heads) + ", .head_dim = " + n(c.head_dim) +
            ",\n                                        .rope = RopeConfig{.pairing = Pairing::half_split}};\n"
            "  const MultiHeadAttention<float> layer(config, MultiHeadAttentionWeights<float>::random(config));  // "
            "yours: checkpoint.hpp\n";
  if (c.cache == "ring")
    text += "  RingCache<" + storage + "> cache({.kv_heads = " + n(c.kv_heads) + ", .head_dim = " + n(c.head_dim) +
            ", .window = " + n(s.window) + ", .slack = 64});\n";
  else if (c.cache == "paged")
    text += "  PagePool<" + storage + "> pool({.kv_heads = " + n(c.kv_heads) + ", .head_dim = " + n(c.head_dim) +
            ", .page_tokens = 64, .pages = " + n((context + 63) / 64 * s.sequences) + "});  // for all sequences\n" +
            "  PagedCache<" + storage + "> cache(pool);  // one per sequence\n";
  else
    text += "  auto cache = layer.make_cache<" + storage + ">(" + n(c.rows) + ");  // one per sequence and layer\n";
  text +=
      "  Matrix<float> x = Matrix<float>::Random(5, config.model_dim);  // a prompt of five tokens\n"
      "  layer.forward(x, cache);\n"
      "  x = layer.forward(x.bottomRows(1), cache);  // one token more\n"
      "}\n";
  return text;
}

std::string asked(const char* question, const std::string& usual) {
  std::fprintf(stderr, "%s [%s]: ", question, usual.c_str());
  std::string line;
  std::getline(std::cin, line);
  return line.empty() ? usual : line;
}
Index asked_number(const char* question, Index usual) {
  const auto value = cache_costs::parse_size(asked(question, std::to_string(usual)), false);
  if (!value) throw Refused(std::string(question) + " needs a whole number of at least 1");
  return *value;
}

void dialogue(Settings& s) {
  s.model = asked("Model (qkv-memory --list names them; own: your own sizes)", "own");
  if (s.model == "own") {
    s.model.clear();
    s.heads = asked_number("Query heads", 32);
    s.head_dim = asked_number("Features of a head", 128);
    s.layers = asked_number("Layers", 32);
  }
  s.context = asked("Tokens of a sequence", "8k");
  s.sequences = asked_number("Sequences at once", 1);
  s.memory = asked("Memory for their caches", "4GB");
}

/// Variants with the cache bytes of all storages.
std::vector<Candidate> candidates(const Settings& s, Index context, Index memory, Index& layers) {
  struct Variant {
    std::string name;
    qkv::MultiHeadAttentionConfig heads;
    std::optional<qkv::LatentAttentionConfig> latent;
  };
  std::vector<Variant> variants;
  const auto name_of = [](Index heads, Index kv_heads) {
    return kv_heads == heads ? std::string("mha") : kv_heads == 1 ? "mqa" : "gqa-" + std::to_string(kv_heads);
  };
  if (!s.model.empty()) {
    const cache_costs::Model* model = cache_costs::find_model(s.model);
    if (!model) {
      std::string text = "unknown model " + s.model;
      for (const auto near : cache_costs::near_names(s.model)) text += "; did you mean " + std::string(near);
      throw Refused(text + "? qkv-memory --list names all");
    }
    layers = model->layers;
    if (const auto* c = std::get_if<qkv::MultiHeadAttentionConfig>(&model->attention))
      variants.push_back({name_of(c->heads, c->kv_heads), *c, std::nullopt});
    else
      variants.push_back({"mla", {}, std::get<qkv::LatentAttentionConfig>(model->attention)});
  } else {
    if (s.heads < 1) throw Refused("give --model NAME or --heads N (and --head-dim, --layers)");
    layers = s.layers;
    const auto add = [&](Index kv_heads) {
      variants.push_back(
          {name_of(s.heads, kv_heads), cache_costs::multi_head(s.heads, kv_heads, s.head_dim), std::nullopt});
    };
    add(s.heads);
    if (s.window == 0 && !s.paged) {
      qkv::LatentAttentionConfig latent = qkv::deepseek_v3;
      latent.heads = s.heads, latent.latent_dim = s.latent_dim, latent.rope_dim = s.rope_dim;
      latent.nope_dim = latent.v_head_dim = s.head_dim;
      variants.push_back({"mla", {}, latent});
    }
    for (Index kv_heads = s.heads / 2; kv_heads >= 1; kv_heads /= 2)
      if (s.heads % kv_heads == 0 && (kv_heads <= 8 || kv_heads == 1)) add(kv_heads);
  }
  std::vector<Candidate> list;
  for (const Variant& v : variants)
    for (const std::string& storage : cache_costs::storages) {
      Candidate c{v.name, storage, "contiguous", 0, 0, 0, 0, 0, 0, context, 0, 0};
      cache_costs::with_storage(storage, [&]<class S>(S) {
        if (v.latent) {
          c.heads = c.kv_heads = v.latent->heads, c.head_dim = v.latent->nope_dim, c.v_head_dim = v.latent->v_head_dim;
          c.latent_dim = v.latent->latent_dim, c.rope_dim = v.latent->rope_dim, c.cache = "latent";
          c.layer_bytes = qkv::bytes_per_token<S>(*v.latent);
        } else {
          c.heads = v.heads.heads, c.kv_heads = v.heads.kv_heads, c.head_dim = v.heads.head_dim;
          c.v_head_dim = v.heads.v_head_dim, c.layer_bytes = qkv::bytes_per_token<S>(v.heads);
        }
      });
      if (s.window > 0 && !v.latent) c.cache = "ring", c.rows = std::min(context, s.window + 64);
      if (s.paged && !v.latent) c.cache = "paged", c.rows = (context + 63) / 64 * 64;
      using qkv::detail::checked_product;
      c.total = checked_product(checked_product(c.layer_bytes, c.rows), checked_product(layers, s.sequences));
      c.fits = c.total <= memory;
      list.push_back(c);
    }
  return list;
}

int answer(Settings& s) {
  const auto size = [](const std::string& text, bool bytes, const char* option) {
    const auto value = cache_costs::parse_size(text, bytes);
    if (!value)
      throw Refused(std::string(option) + " needs " + (bytes ? "a size such as 16GB" : "a number such as 8192 or 32k") +
                    "; given " + text);
    return *value;
  };
  const Index context = size(s.context.empty() ? "8k" : s.context, false, "--context"),
              memory = size(s.memory.empty() ? "4GB" : s.memory, true, "--memory");
  if (s.window > 0 && s.paged) throw Refused("a window lives in a ring, not in pages: --window or --paged");
  Index layers = 0;
  auto list = candidates(s, context, memory, layers);

  // What is measured: at most 1 GB of one layer; longer ones grow in proportion.
  const Candidate* chosen = nullptr;
  for (auto& c : list) {
    if (!c.fits) continue;
    const Index most = std::max<Index>(64, (Index{1} << 30) / std::max<Index>(c.layer_bytes, 1)),
                n = std::min(c.rows, most);
    if (isatty(STDERR_FILENO) != 0)
      std::fprintf(stderr, "\r-- measuring %-7s %-5s", c.variant.c_str(), c.storage.c_str());
    Matrix<float> out, exact;
    c.milliseconds = cache_costs::with_storage(c.storage, [&]<class S>(S) { return decode<S>(c, n, s.threads, out); }) *
                     static_cast<double>(c.rows) / static_cast<double>(n);
    if (c.storage != "f32") {
      const Index some = std::min<Index>(n, 4096);
      cache_costs::with_storage(c.storage, [&]<class S>(S) { return decode<S>(c, some, 1, out); });
      decode<float>(c, some, 1, exact);
      c.error = static_cast<double>((out - exact).norm() / exact.norm());
    }
    c.measured = true;
  }
  if (isatty(STDERR_FILENO) != 0) std::fprintf(stderr, "\r%40s\r", "");
  std::string variant;
  for (const auto& c : list) {
    if (!c.measured || c.error > s.max_error || (!variant.empty() && c.variant != variant)) continue;
    variant = c.variant;
    if (!chosen || c.milliseconds < 0.95 * chosen->milliseconds) chosen = &c;
  }

  if (!s.json) {
    std::printf("%lld layers, %lld x %lld tokens, %s for caches, %lld thread%s\n\n", static_cast<long long>(layers),
                static_cast<long long>(s.sequences), static_cast<long long>(context), human(memory).c_str(),
                static_cast<long long>(s.threads), s.threads == 1 ? "" : "s");
    std::printf("  %-8s %-5s %-11s %12s %11s %13s %11s\n", "variant", "dtype", "cache", "B/token*", "all", "ms/token*",
                "rms error");
    for (const auto& c : list) {
      std::printf("%c %-8s %-5s %-11s %12lld %11s ", &c == chosen ? '>' : ' ', c.variant.c_str(), c.storage.c_str(),
                  c.cache.c_str(), static_cast<long long>(c.layer_bytes), human(c.total).c_str());
      if (c.measured)
        std::printf("%13.4f %11.1e%s\n", c.milliseconds, c.error, c.error > s.max_error ? "  too coarse" : "");
      else
        std::printf("  does not fit\n");
    }
    std::printf("\n* of one layer; time: attention of one token of one sequence on a full cache, on this machine\n\n");
  } else {
    nlohmann::json out{{"layers", layers}, {"context", context}, {"sequences", s.sequences}, {"memory", memory}};
    for (const auto& c : list) {
      nlohmann::json row{{"variant", c.variant},  {"storage", c.storage},
                         {"cache", c.cache},      {"bytes_per_token_and_layer", c.layer_bytes},
                         {"bytes", c.total},      {"fits", c.fits},
                         {"chosen", &c == chosen}};
      if (c.measured) row["milliseconds_per_token_and_layer"] = c.milliseconds, row["rms_error"] = c.error;
      out["candidates"].push_back(row);
    }
    if (chosen) out["program"] = program(*chosen, s, context);
    std::printf("%s\n", out.dump(2).c_str());
  }
  if (!chosen) {
    const auto least =
        std::min_element(list.begin(), list.end(), [](const auto& a, const auto& b) { return a.total < b.total; });
    std::fprintf(stderr,
                 "qkv-which: nothing fits with an rms error of at most %g; the smallest, %s in %s, needs %s. "
                 "Fewer sequences, a shorter context or --window would.\n",
                 s.max_error, least->variant.c_str(), least->storage.c_str(), human(least->total).c_str());
    return 1;
  }
  const std::string text = program(*chosen, s, context);
  if (!s.snippet.empty()) std::ofstream(s.snippet) << text;
  if (s.json) return 0;
  std::printf("Take %s in %s, %s cache: %s of %s, attention of one token %.3f ms in all %lld layers.\n",
              chosen->variant.c_str(), chosen->storage.c_str(), chosen->cache.c_str(), human(chosen->total).c_str(),
              human(memory).c_str(), chosen->milliseconds * static_cast<double>(layers),
              static_cast<long long>(layers));
  if (s.model.empty() && s.heads > 1)
    std::printf("It is the first of mha, mla, gqa, mqa that fits: what a variant can express falls in that order.\n");
  if (chosen->latent_dim > 0) {
    const Index n = std::min<Index>(context, 512);
    const auto [naive, absorbed] = prompt_forms(*chosen, n, s.threads);
    std::printf(
        "Form: one token absorbed; a prompt of %lld tokens takes %.1f ms naive and %.1f ms absorbed: %s. "
        "LatentForm::automatic chooses by size.\n",
        static_cast<long long>(n), naive, absorbed, naive < absorbed ? "naive" : "absorbed");
  }
  std::printf("\n%s", text.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Settings s;
  CLI::App app{"Which cache, of which storage and form, for these sizes, this memory and this machine?"};
  const auto size = [&](const char* name, Index& value, Index most, const char* what) {
    return app.add_option(name, value, what)->check(CLI::Range(Index{1}, most))->capture_default_str();
  };
  app.add_option("-m,--model", s.model, "A model that qkv-memory --list names; its variant is taken as it is");
  app.add_option("--heads", s.heads, "Own sizes: query heads; the variant is to be chosen")
      ->check(CLI::Range(Index{1}, Index{1024}));
  size("--head-dim", s.head_dim, 4096, "Own sizes: features of a head");
  size("--layers", s.layers, 10000, "Own sizes: layers");
  size("--latent-dim", s.latent_dim, 16384, "Own sizes: MLA's latent");
  size("--rope-dim", s.rope_dim, 4096, "Own sizes: MLA's rope key (even)");
  app.add_option("-c,--context", s.context, "Tokens of a sequence: 8192, 32k (default 8k)");
  size("-n,--sequences", s.sequences, Index{1} << 30, "Sequences at once");
  app.add_option("--memory", s.memory, "For all their caches: 16GB, 512MiB (default 4GB)");
  app.add_option("--window", s.window, "Tokens before its own that a token sees: a RingCache")
      ->check(CLI::Range(Index{1}, Index{1} << 40));
  app.add_flag("--paged", s.paged, "Sequences of unequal length, or with common beginnings: a PagedCache");
  size("--threads", s.threads, 1024, "Threads");
  app.add_option("--max-error", s.max_error, "Largest rms error against f32 that is allowed")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--snippet", s.snippet, "Write the program to this file too");
  app.add_flag("--json", s.json, "JSON");
  try {
    app.parse(argc, argv);
    if (argc == 1 && isatty(STDIN_FILENO) != 0) dialogue(s);
    return answer(s);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "qkv-which: %s\n", error.what());
    return 2;
  }
}
