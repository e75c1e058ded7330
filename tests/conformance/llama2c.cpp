// llama2c.cpp — Llama2cModel: a whole model, greedy and token for token, with the reader and the layers of
// examples/story_model.hpp.
#include "../../examples/story_model.hpp"

#include "layout.hpp"
#include "operators.hpp"

namespace conformance {

template <class T>
Results llama2c_model(const Case& c) {
  const story::StoryModel<T> model(story::read_checkpoint(c.file("model")));
  const story::Tokenizer tokenizer = story::read_tokenizer(c.file("tokenizer"), model.config().vocabulary);
  const Index steps = c.integer("steps"), from = c.integer("logits_from", 0), to = c.integer("logits_to", 0);
  expect(steps >= 1 && steps <= model.config().max_positions && from >= 0 && from <= to && to <= steps,
         "the model has ", model.config().max_positions, " positions; steps ", steps, ", logits from ", from, " to ",
         to, " must lie within");

  std::vector<story::Token> tokens;
  const Tensor& prompt = c.in("prompt_tokens");
  for (Index i = 0; i < prompt.size(); ++i) tokens.push_back(static_cast<story::Token>(prompt.integer(i)));
  const auto n_prompt = static_cast<Index>(tokens.size());
  expect(n_prompt >= 1 && n_prompt <= steps + 1 && n_prompt == c.integer("n_prompt_tokens", n_prompt),
         "prompt_tokens must hold n_prompt_tokens tokens, 1 to steps + 1; given ", n_prompt);
  if (c.has_key("prompt"))
    expect(tokenizer.encode(c.key("prompt")) == tokens, "the tokenizer encodes the prompt differently");

  // The prompt in one piece, then what has been chosen, one by one.
  auto caches = model.make_caches(steps);
  Matrix<T> logits(steps, model.config().vocabulary);
  for (Index position = 0; position < steps;) {
    const auto first = static_cast<std::size_t>(position);
    const auto count = std::min(tokens.size() - first, static_cast<std::size_t>(steps - position));
    const Matrix<T> next = model.forward(std::span(tokens).subspan(first, count), caches);
    logits.middleRows(position, next.rows()) = next;
    position += next.rows();
    if (static_cast<Index>(tokens.size()) > position) break;  // the prompt was all there was to read
    Index best = 0;
    next.row(next.rows() - 1).maxCoeff(&best);
    tokens.push_back(static_cast<story::Token>(best));
  }

  if (c.has_key("file.text")) {
    std::string text;
    for (std::size_t i = 1; i < tokens.size(); ++i) text += tokenizer.decode(tokens[i - 1], tokens[i]);
    expect(text == read_file(c.file("text")), "the text differs");
  }
  Results results;
  results.emplace("tokens",
                  Tensor{{static_cast<Index>(tokens.size())}, std::vector<double>(tokens.begin(), tokens.end())});
  Tensor kept = tensor_of({1, to - from, logits.cols()});
  set_sequence<T>(kept, 0, logits.middleRows(from, to - from));
  kept.shape = {to - from, logits.cols()};
  results.emplace("logits", std::move(kept));
  return results;
}

template Results llama2c_model<float>(const Case&);
template Results llama2c_model<double>(const Case&);

}  // namespace conformance
