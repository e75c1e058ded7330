// support/cache_costs.hpp — what caches of known models cost: the figures of memory.hpp, by name and for any storage.
//
// Forms of a model: its own and the ones it is compared with, of as many heads.
//
//     mha          keys and values of all heads            gqa    of its own kv_heads, else of 8 (fewer heads: of 2)
//     mqa          keys and values of one head             mla    one latent and one rope key
//     mla-naive    MLA's keys and values of all heads, restored
#pragma once

#include <qkv/memory.hpp>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace cache_costs {

using qkv::Index;
using qkv::LatentAttentionConfig;
using qkv::MultiHeadAttentionConfig;

struct Model {
  std::string_view name;
  Index layers;
  std::variant<MultiHeadAttentionConfig, LatentAttentionConfig> attention;
  std::string_view note = "";
};

constexpr MultiHeadAttentionConfig multi_head(Index heads, Index kv_heads, Index head_dim) {
  return {.model_dim = heads * head_dim, .heads = heads, .kv_heads = kv_heads, .head_dim = head_dim};
}
constexpr LatentAttentionConfig kimi() {
  LatentAttentionConfig config = qkv::deepseek_v3;
  config.heads = 64;
  return config;
}

/// Sizes from the config.json published with each model (num_hidden_layers, num_attention_heads, num_key_value_heads,
/// head_dim; kv_lora_rank, qk_rope_head_dim); those that model_config.hpp has are taken from there.
inline constexpr std::array models{
    Model{"deepseek-v2", 60, qkv::deepseek_v2},
    Model{"deepseek-v2-lite", 27, qkv::deepseek_v2_lite},
    Model{"deepseek-v3", 61, qkv::deepseek_v3, "also DeepSeek-R1"},
    Model{"deepseek-r1", 61, qkv::deepseek_v3, "the sizes of deepseek-v3"},
    Model{"kimi-k2", 61, kimi(), "deepseek-v3 with 64 heads"},
    Model{"falcon-7b", 32, qkv::falcon_7b},
    Model{"gemma-2b", 18, multi_head(8, 1, 256)},
    Model{"gemma-7b", 28, multi_head(16, 16, 256)},
    Model{"gpt2", 12, qkv::gpt2_small},
    Model{"llama-2-7b", 32, qkv::llama_2_7b},
    Model{"llama-2-13b", 40, multi_head(40, 40, 128)},
    Model{"llama-2-70b", 80, qkv::llama_3_70b, "the heads of llama-3-70b"},
    Model{"llama-3-8b", 32, qkv::llama_3_8b, "also Llama 3.1"},
    Model{"llama-3-70b", 80, qkv::llama_3_70b, "also Llama 3.1"},
    Model{"llama-3.2-3b", 28, multi_head(24, 8, 128)},
    Model{"mistral-7b", 32, qkv::mistral_7b, "v0.1 needs its last 4096 tokens only"},
    Model{"mixtral-8x7b", 32, qkv::mistral_7b, "the heads of mistral-7b"},
};

inline const std::vector<std::string> storages = []<class... S>(std::type_identity<std::tuple<S...>>) {
  return std::vector<std::string>{qkv::storage_name<S>...};
}(std::type_identity<qkv::StorageTypes>{});

/// f(S()) for the storage of that name.
template <class F>
auto with_storage(std::string_view name, const F& f) {
  const auto find = [&]<class S, class... More>(const auto& self, std::type_identity<std::tuple<S, More...>>) {
    if constexpr (sizeof...(More) > 0)
      if (name != qkv::storage_name<S>) return self(self, std::type_identity<std::tuple<More...>>{});
    qkv::detail::require(name == qkv::storage_name<S>, "there is no storage ", std::string(name));
    return f(S());
  };
  return find(find, std::type_identity<qkv::StorageTypes>{});
}

struct Form {
  std::string name;
  bool own;                         // what the model does; the others are for comparison
  Index numbers;                    // one token, one layer
  Index bytes;                      // one token, one layer, scales included
  Index kv_heads;                   // of keys and values; 0: latent
  double against_mha, against_gqa;  // how many times fewer bytes
};

inline Index gqa_heads(Index heads) { return heads % 8 == 0 && heads > 8 ? 8 : heads % 2 == 0 && heads > 2 ? 2 : 1; }

/// All forms of a model in a storage, the most bytes first. std::length_error where a figure does not fit an Index.
inline std::vector<Form> forms(const Model& model, std::string_view storage) {
  std::vector<Form> list;
  with_storage(storage, [&]<class S>(S) {
    Index mha = 0, gqa = 0;
    const auto add = [&](const std::string& name, bool own, Index numbers, Index bytes, Index kv_heads) {
      if (name == "mha") mha = bytes;
      if (name.starts_with("gqa")) gqa = bytes;
      list.push_back({name, own, numbers, bytes, kv_heads, 0, 0});
    };
    const auto add_heads = [&](const MultiHeadAttentionConfig& c, bool own) {
      const std::string name = c.kv_heads == c.heads ? "mha"
                               : c.kv_heads == 1     ? "mqa"
                                                     : "gqa-" + std::to_string(c.kv_heads);
      add(name, own, qkv::elements_per_token(c), qkv::bytes_per_token<S>(c), c.kv_heads);
    };
    if (const auto* c = std::get_if<MultiHeadAttentionConfig>(&model.attention)) {
      const bool grouped = c->kv_heads > 1 && c->kv_heads < c->heads;
      std::vector<Index> counts{c->heads, grouped ? c->kv_heads : gqa_heads(c->heads), 1};
      counts.erase(std::unique(counts.begin(), counts.end()), counts.end());
      for (const Index kv_heads : counts) {
        MultiHeadAttentionConfig other = *c;
        other.kv_heads = kv_heads;
        add_heads(other, kv_heads == c->kv_heads);
      }
    } else {
      const auto& latent = std::get<LatentAttentionConfig>(model.attention);
      add("mla-naive", false, qkv::naive_elements_per_token(latent), qkv::naive_bytes_per_token<S>(latent),
          latent.heads);
      std::vector<Index> counts{latent.heads, gqa_heads(latent.heads), 1};
      counts.erase(std::unique(counts.begin(), counts.end()), counts.end());
      for (const Index kv_heads : counts) add_heads(qkv::multi_head_equivalent(latent, kv_heads), false);
      add("mla", true, qkv::elements_per_token(latent), qkv::bytes_per_token<S>(latent), 0);
    }
    for (Form& form : list) {
      form.against_mha = mha > 0 ? qkv::ratio(mha, form.bytes) : 0;
      form.against_gqa = gqa > 0 ? qkv::ratio(gqa, form.bytes) : 0;
    }
    std::stable_sort(list.begin(), list.end(), [](const Form& a, const Form& b) { return a.bytes > b.bytes; });
  });
  return list;
}

/// How many single changes turn a into b (Levenshtein); capital letters count as small ones.
inline std::size_t distance(std::string_view a, std::string_view b) {
  const auto lower = [](char c) { return std::tolower(static_cast<unsigned char>(c)); };
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t changed = diagonal + (lower(a[i - 1]) == lower(b[j - 1]) ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, changed});
    }
  }
  return row[b.size()];
}

inline const Model* find_model(std::string_view name) {
  for (const Model& model : models)
    if (distance(name, model.name) == 0) return &model;
  return nullptr;
}
/// Names like the one that is not there, the nearest first.
inline std::vector<std::string_view> near_names(std::string_view name) {
  std::vector<std::pair<std::size_t, std::string_view>> found;
  for (const Model& model : models) {
    const std::size_t d = distance(name, model.name);
    const bool begins = name.size() >= 4 && distance(name, model.name.substr(0, name.size())) <= 1;
    if (begins || d <= std::max<std::size_t>(2, model.name.size() / 3)) found.emplace_back(d, model.name);
  }
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<std::string_view> names;
  for (const auto& [d, near] : found)
    if (names.size() < 3) names.push_back(near);
  return names;
}

/// "131072", "128k" (times 1024), "1M"; with bytes "16GB" (10⁹), "16GiB" (2³⁰), "512MB". Nothing where it is no whole
/// positive number of units or does not fit.
inline std::optional<Index> parse_size(std::string_view text, bool bytes) {
  double value = 0;
  std::size_t at = 0;
  bool digits = false;
  for (; at < text.size() && std::isdigit(static_cast<unsigned char>(text[at])) != 0; ++at, digits = true)
    value = value * 10 + (text[at] - '0');
  if (at < text.size() && text[at] == '.') {
    double unit = 0.1;
    for (++at; at < text.size() && std::isdigit(static_cast<unsigned char>(text[at])) != 0;
         ++at, unit /= 10, digits = true)
      value += unit * (text[at] - '0');
  }
  std::string suffix(text.substr(at));
  for (char& c : suffix) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  double factor = 0;
  const std::string letters = "kmgt";
  if (suffix.empty() || (bytes && suffix == "b")) factor = 1;
  for (std::size_t i = 0; i < letters.size(); ++i) {
    const std::string letter(1, letters[i]);
    double binary = 1, decimal = 1;
    for (std::size_t j = 0; j <= i; ++j) binary *= 1024, decimal *= 1000;
    if (bytes && (suffix == letter + "b" || suffix == letter)) factor = decimal;
    if ((bytes && suffix == letter + "ib") || (!bytes && suffix == letter)) factor = binary;
  }
  const double result = value * factor;
  if (!digits || factor == 0 || !(result >= 1) || result >= 9.2e18) return std::nullopt;
  return static_cast<Index>(result + 0.5);
}

/// "2.30 GB", in powers of 1000.
inline std::string human(Index bytes) {
  const char* units[] = {"B", "kB", "MB", "GB", "TB", "PB", "EB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 999.95 && unit + 1 < std::size(units)) value /= 1000, ++unit;
  char text[32];
  std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : value < 10 ? "%.2f %s" : "%.1f %s", value, units[unit]);
  return text;
}

}  // namespace cache_costs
