#include "../benchmarks/support/cache_costs.hpp"

#include "support/catch.hpp"

#include <qkv/kv_cache.hpp>
#include <qkv/latent_cache.hpp>

using namespace qkv;

TEST_CASE("what qkv-memory says of a model is what its caches allocate, in every form and storage") {
  constexpr Index tokens = 37;
  for (const auto& model : cache_costs::models)
    for (const std::string& storage : cache_costs::storages)
      for (const auto& form : cache_costs::forms(model, storage)) {
        const Index bytes = cache_costs::with_storage(storage, [&]<class S>(S) {
          const auto* heads = std::get_if<MultiHeadAttentionConfig>(&model.attention);
          const auto* latent = std::get_if<LatentAttentionConfig>(&model.attention);
          if (form.kv_heads == 0)
            return LatentCache<S>({.latent_dim = latent->latent_dim, .rope_dim = latent->rope_dim, .capacity = tokens})
                .bytes();
          const Index key = heads ? heads->head_dim : form.name == "mla-naive" ? latent->head_dim() : latent->nope_dim;
          return KvCache<S>({.kv_heads = form.kv_heads,
                             .head_dim = key,
                             .v_head_dim = heads ? heads->v_head_dim : latent->v_head_dim,
                             .capacity = tokens})
              .bytes();
        });
        INFO(std::string(model.name) << " " << form.name << " " << storage);
        REQUIRE(bytes == tokens * form.bytes);
      }
}

TEST_CASE("every model has exactly one form of its own, and savings are ratios of bytes") {
  for (const auto& model : cache_costs::models) {
    int own = 0;
    for (const auto& form : cache_costs::forms(model, "f32")) own += form.own ? 1 : 0;
    INFO(std::string(model.name));
    REQUIRE(own == 1);
  }
  const auto forms = cache_costs::forms(*cache_costs::find_model("DeepSeek-V3"), "bf16");
  REQUIRE(forms.front().name == "mla-naive");
  REQUIRE(forms.back().name == "mqa");
  for (const auto& form : forms)
    if (form.own) REQUIRE((form.against_mha > 56.8 && form.against_mha < 57.0 && form.against_gqa < 3.6));
}

TEST_CASE("names that are nearly right are suggested; sizes that make no sense are no sizes") {
  using cache_costs::parse_size;
  REQUIRE(cache_costs::find_model("lama-3-8b") == nullptr);
  REQUIRE(cache_costs::near_names("lama-3-8b").front() == "llama-3-8b");
  REQUIRE(cache_costs::near_names("deepsek").size() == 3);
  REQUIRE(cache_costs::near_names("xyzzyplugh").empty());
  REQUIRE(parse_size("128k", false) == Index{131072});
  REQUIRE(parse_size("16GB", true) == Index{16000000000});
  REQUIRE(parse_size("1.5GiB", true) == Index{3} << 29);
  for (const char* wrong : {"", "k", "-5", "0", "1e99", "99999999999999999999", "12 tokens", "nan"})
    REQUIRE_FALSE(parse_size(wrong, false).has_value());
}
